"""Tensors of a torch.save file: described by the pickle, and read from their storages on request."""

import dataclasses
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from avit_jax.checkpoints.convert.limits import allowance, elements

DTYPES: dict[str, Any] = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}


@dataclasses.dataclass(frozen=True)
class Storage:
    """A block of memory that tensors are views of; `key` says where it is in the file."""

    dtype: np.dtype
    key: str
    size: int


@dataclasses.dataclass(frozen=True)
class TorchTensor:
    """A tensor of the file, not read yet."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    file: "StorageFile"

    def read(self) -> np.ndarray:
        """The values, as a view of their storage. ValueError if they reach beyond it, or repeat it too often."""
        size = elements(self.shape)
        self.file.ask_for(size * self.storage.dtype.itemsize)
        values = self.file.read(self.storage)
        if not size:
            return np.empty(self.shape, values.dtype)
        reach = self.offset + sum((n - 1) * step for n, step in zip(self.shape, self.strides, strict=True))
        if reach >= values.size:
            raise ValueError(f"a tensor of shape {self.shape} reaches beyond its storage of {values.size} values")
        # The step along an axis of length 1 is never taken, so it may be any number.
        steps = [step * values.itemsize if n > 1 else 0 for n, step in zip(self.shape, self.strides, strict=True)]
        return np.lib.stride_tricks.as_strided(values[self.offset :], self.shape, steps, writeable=False)


class StorageFile:
    """Reads each storage once, by its key, and limits the memory of all tensors together."""

    def __init__(self, read: Callable[[Storage], Any], file_size: int) -> None:
        self._read = read
        self._file_size = file_size
        self._left = allowance(file_size)
        self._known: dict[str, np.ndarray] = {}

    def ask_for(self, size: int) -> None:
        """Count a tensor of `size` bytes. Raises ValueError if all tensors together take too much for this file."""
        self._left -= size
        if self._left < 0:
            raise ValueError(
                f"its tensors repeat their storages: together they take more than {allowance(self._file_size)} bytes, "
                f"and the file has {self._file_size}"
            )

    def read(self, storage: Storage) -> np.ndarray:
        """All values of a storage."""
        if storage.key not in self._known:
            values = np.frombuffer(self._read(storage), storage.dtype)
            if values.size != storage.size:
                raise ValueError(f"storage {storage.key} has {values.size} values, but {storage.size} were declared")
            self._known[storage.key] = values
        return self._known[storage.key]


class TorchMapping(dict):
    """A dict, OrderedDict or Namespace of the file; `attributes` is what an OrderedDict carries besides its items."""

    attributes: Any = None
