"""Numbers that a user gives: which values count as one. True and False are no numbers, and NaN lies in no bounds."""

import numbers
from typing import Any

MOST_WHOLE = 2**31 - 1  # the longest axis of an array in JAX
MOST_REAL = 1e9  # float32 squares it without overflow


def is_whole(value: Any, least: int = -MOST_WHOLE, most: int = MOST_WHOLE) -> bool:
    """Whether a value is a whole number within bounds, of Python's or NumPy's types."""
    return _is_a(numbers.Integral, value) and least <= int(value) <= most


def is_real(value: Any, least: int | float = -MOST_REAL, most: int | float = MOST_REAL) -> bool:
    """Whether a value is a number within bounds, of Python's or NumPy's types."""
    return _is_a(numbers.Real, value) and bool(least <= value <= most)


def _is_a(kind: type, value: Any) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)
