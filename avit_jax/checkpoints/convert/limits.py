"""Limits for a file of weights. A file beyond them is damaged or hostile: no ViT comes near them."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from avit_jax.runtime.files import shown

MAX_TENSORS = 10_000  # ViT-g with two moving averages and an optimizer has fewer than 5,000
MAX_PARTS = 20_000  # entries of a zip file: one for each tensor, and a few more
MAX_DIRECTORY = 2**22  # bytes of a zip file's table of contents; an entry takes about 100
MAX_HEADER = 2**23  # bytes of a safetensors header; a tensor takes about 120
MAX_PICKLE = 2**24  # bytes of a pickle, without the tensors' values
MAX_OPCODES = 500_000  # a tensor takes about 60
MAX_CONTAINERS = 200_000  # tuples, lists, dicts and sets of a pickle; a tensor takes 5
MAX_NESTING = 64  # containers inside each other
MAX_PLAIN_KEYS = 10_000  # dict keys that are not text; an optimizer numbers its parameters
MAX_AXES = 8  # of a tensor
MAX_NAME = 300  # characters of a tensor's name
_MAX_COUNT = 2**62  # values of a tensor: what NumPy can count


def allowance(file_size: int) -> int:
    """Bytes that the arrays of a file of this many bytes may take; there is a margin for shared and compressed ones."""
    return 2 * file_size + 2**26


def count(value: Any) -> int:
    """A size from a file, checked. Raises ValueError for anything but a whole number from 0 to 2^62."""
    if type(value) is not int or not 0 <= value <= _MAX_COUNT:
        raise ValueError(f"it is damaged: {shown(value, 50)} in place of a size")
    return value


def elements(shape: tuple[Any, ...]) -> int:
    """The number of values of an array. Raises ValueError if the shape is impossible."""
    if len(shape) > MAX_AXES:
        raise ValueError(f"one of its tensors has {len(shape)} axes: at most {MAX_AXES} are allowed")
    total = 1
    for length in shape:
        total *= count(length)
        if total > _MAX_COUNT:  # checked at every step: Python would multiply numbers of any length
            raise ValueError("one of its tensors has more than 2^62 values")
    return total


def check_names(state: Mapping[Any, Any]) -> None:
    """Raises ValueError if there are too many tensors, or if a name cannot be printed in one line."""
    if len(state) > MAX_TENSORS:
        raise ValueError(f"it has {len(state)} tensors: a ViT has at most {MAX_TENSORS}")
    for name in state:
        if len(name) > MAX_NAME or not name.isprintable():
            raise ValueError(
                f"the name of one of its tensors has {len(name)} characters, or some that cannot be printed: "
                f"{shown(name, 100)}"
            )


def check_folder(path: Path, shapes: Iterable[tuple[int, ...]]) -> None:
    """Raises ValueError if float32 arrays of these shapes take far more bytes than the folder's compressed files."""
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    total = 4 * sum(map(elements, shapes))
    if total > allowance(size):
        raise ValueError(
            f"the checkpoint {shown(path)} has {size} bytes, and its arrays {total}: weights do not compress that well"
        )
