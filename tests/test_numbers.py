"""What counts as a number that a user gives."""

from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from avit_jax.runtime.numbers import is_real, is_whole

NO_NUMBERS = [True, False, np.True_, None, "1", "nan", 1j, [1], (1,), np.ones(1), {}]


@pytest.mark.parametrize("value", NO_NUMBERS, ids=repr)
def test_what_is_no_number(value: Any) -> None:
    assert not is_real(value) and not is_whole(value)


@pytest.mark.parametrize("value", [float("nan"), np.float32("nan"), float("inf"), -float("inf"), 1e30, 10**400])
def test_what_lies_in_no_bounds(value: Any) -> None:
    assert not is_real(value) and not is_whole(value)


@pytest.mark.parametrize("value", [0.5, np.float32(0.5), np.float64(0.5), Fraction(1, 2)])
def test_a_fraction_is_no_whole_number(value: Any) -> None:
    assert is_real(value, 0, 1) and not is_whole(value)


@pytest.mark.parametrize("value", [3, np.int8(3), np.uint64(3)])
def test_bounds_belong_to_what_they_bound(value: Any) -> None:
    assert is_whole(value, 3, 3) and is_real(value, 3, 3)
    assert not is_whole(value, 4) and not is_whole(value, 0, 2) and not is_real(value, 3.1) and not is_real(value, 0, 2)
    assert is_whole(2**31 - 1) and not is_whole(2**31)  # JSON takes no more either
