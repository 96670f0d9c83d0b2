"""What torch.save wrote, as NumPy arrays, without torch: a small pickle machine that runs no code of the file's.

The machine knows tensors and plain containers. Whatever else a pickle asks for is refused by name, so that nothing that
the file says is ever imported or called; memory stays proportional to the file, because tensors are only described
until one is asked for.
"""

import dataclasses
import functools
import mmap
import pickletools
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

_DTYPES: dict[str, Any] = {
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
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
_MAX_EXPANDED = 2**28  # bytes: of a tensor that repeats its storage (torch.expand), where the file bounds nothing


@dataclasses.dataclass(frozen=True)
class _Storage:
    """A piece of memory that tensors look into; `key` says where it lies in the file."""

    dtype: np.dtype
    key: str
    size: int


@dataclasses.dataclass(frozen=True)
class TorchTensor:
    """A tensor of the file, not read yet."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    file: "_StorageFile"

    def read(self) -> np.ndarray:
        """The values; ValueError where they reach beyond their storage."""
        values = self.file.read(self.storage)
        reach = self.offset + sum((n - 1) * step for n, step in zip(self.shape, self.strides, strict=True))
        if 0 in self.shape:
            return np.empty(self.shape, values.dtype)
        size = int(np.prod(self.shape, dtype=object))
        if reach >= values.size:
            raise ValueError(f"a tensor of shape {self.shape} reaches beyond its storage of {values.size} values")
        if size > values.size and size * values.itemsize > _MAX_EXPANDED:
            raise ValueError(f"a tensor of shape {self.shape} repeats a storage of no more than {values.size} values")
        strides = [step * values.itemsize for step in self.strides]
        return np.lib.stride_tricks.as_strided(values[self.offset :], self.shape, strides, writeable=False)


class _StorageFile:
    """Reads storages by key; the last one is kept, because tensors often share theirs."""

    def __init__(self, read: Callable[[_Storage], Any]) -> None:
        self._read = functools.lru_cache(maxsize=1)(read)

    def read(self, storage: _Storage) -> np.ndarray:
        values = np.frombuffer(self._read(storage), storage.dtype)
        if values.size != storage.size:
            raise ValueError(f"storage {storage.key} has {values.size} values where {storage.size} were promised")
        return values


class TorchMapping(dict):
    """A dict, OrderedDict or Namespace of the file; `attributes` is what an OrderedDict carries besides its items."""

    attributes: Any = None


def read_torch_file(path: Path) -> Any:
    """The object in the file; its tensors are TorchTensor. Raises ValueError, saying why, where it cannot be read."""
    with path.open("rb") as stream:
        if zipfile.is_zipfile(stream):
            return _read_zip(path)
    return _read_legacy(path)


def _read_zip(path: Path) -> Any:
    archive = zipfile.ZipFile(path)
    entries = {info.filename: info for info in archive.infolist()}
    roots = [name.removesuffix("/data.pkl") for name in entries if name.endswith("/data.pkl")]
    if len(roots) != 1:
        raise ValueError("it is a zip file without one data.pkl, so torch.save did not write it")

    def entry(name: str) -> bytes:
        info = entries.get(f"{roots[0]}/{name}")
        if info is None:
            raise ValueError(f"its part {name} is missing")
        if info.compress_type != zipfile.ZIP_STORED:  # torch never compresses; a bomb would
            raise ValueError(f"its part {name} is compressed, which torch.save does not do")
        return archive.read(info)

    if f"{roots[0]}/byteorder" in entries and entry("byteorder") != b"little":
        raise ValueError("its numbers are not little-endian")
    file = _StorageFile(lambda storage: entry(f"data/{storage.key}"))
    return _PickleMachine(file).run(entry("data.pkl"))


def _read_legacy(path: Path) -> Any:
    """The format before torch 1.6: five pickles in a row, then the storages, each after its length."""
    with path.open("rb") as stream:
        # A mapped file: reading beyond its end gives what is there, and costs no memory of the promised length.
        data = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    places: dict[str, int] = {}

    def storage_bytes(storage: _Storage) -> Any:
        start = places[storage.key]
        return memoryview(data)[start : start + storage.size * storage.dtype.itemsize]

    machine = _PickleMachine(_StorageFile(storage_bytes))
    if machine.run(data) != _LEGACY_MAGIC:
        raise ValueError("torch.save did not write it")
    if (protocol := machine.run(data)) != _LEGACY_PROTOCOL:
        raise ValueError(f"its legacy protocol is {protocol!r}, not {_LEGACY_PROTOCOL}")
    system = machine.run(data)
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise ValueError("its numbers are not little-endian")
    content, keys = machine.run(data), machine.run(data)
    if not isinstance(keys, list) or set(map(str, keys)) != machine.storages.keys():
        raise ValueError("its list of storages is not that of its tensors")
    for key in map(str, keys):
        storage = machine.storages[key]
        count = int.from_bytes(data.read(8), "little")
        if count != storage.size:
            raise ValueError(f"storage {key} has {count} values where {storage.size} were promised")
        places[key] = data.tell()
        if places[key] + count * storage.dtype.itemsize > len(data):
            raise ValueError(f"it ends within storage {key}")
        data.seek(places[key] + count * storage.dtype.itemsize)
    return content


@dataclasses.dataclass(frozen=True)
class _Name:
    """Something of a module's that a pickle names, and that it is allowed to name."""

    module: str
    name: str


_ALLOWED = {
    *(("torch", storage) for storage in _DTYPES),
    ("torch._utils", "_rebuild_tensor"),
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch._utils", "_rebuild_parameter"),
    ("torch", "Size"),
    ("torch", "device"),
    ("__builtin__", "set"),
    ("builtins", "set"),
    ("collections", "OrderedDict"),
    ("argparse", "Namespace"),  # the settings that training scripts put beside the weights
}
_MARK = object()
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "MARK": _MARK}
_LITERALS = {
    *("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES"),
}
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class _PickleMachine:
    """Executes pickles over plain values; pickletools reads the opcodes, nothing else of Python's unpickling runs."""

    def __init__(self, file: _StorageFile) -> None:
        self._file = file
        self.storages: dict[str, _Storage] = {}

    def run(self, source: bytes | mmap.mmap) -> Any:
        """The object of one pickle. Raises ValueError for what it may not ask for, and for damage."""
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        try:
            for opcode, argument, _ in pickletools.genops(source):  # type: ignore[arg-type]  # mmap reads as files do
                if opcode.name == "STOP":
                    return self._stack.pop()
                self._execute(opcode.name, argument)
        except (IndexError, KeyError, TypeError, AttributeError, UnicodeError, OverflowError) as error:
            raise ValueError(f"its pickle is damaged ({type(error).__name__}: {error})") from error
        raise ValueError("its pickle has no end")

    def _execute(self, opcode: str, argument: Any) -> None:
        stack = self._stack
        if opcode in _LITERALS:
            stack.append(argument)
        elif opcode in _CONSTANTS:
            stack.append(_CONSTANTS[opcode])
        elif opcode in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
            self._memo[len(self._memo) if opcode == "MEMOIZE" else argument] = stack[-1]
        elif opcode in ("BINGET", "LONG_BINGET"):
            stack.append(self._memo[argument])
        elif opcode in ("EMPTY_DICT", "EMPTY_LIST", "EMPTY_SET"):
            stack.append({"EMPTY_DICT": TorchMapping, "EMPTY_LIST": list, "EMPTY_SET": set}[opcode]())
        elif opcode in _TUPLES:
            cut = len(stack) - _TUPLES[opcode]
            stack[cut:] = [tuple(stack[cut:])]
        elif opcode in ("TUPLE", "SETITEMS", "APPENDS", "ADDITEMS"):
            self._collect(opcode)
        elif opcode in ("SETITEM", "APPEND"):
            stack.insert(-2 if opcode == "SETITEM" else -1, _MARK)
            self._collect(opcode + "S")
        elif opcode in ("GLOBAL", "STACK_GLOBAL"):
            if opcode == "STACK_GLOBAL":
                argument = f"{stack.pop(-2)} {stack.pop()}"
            stack.append(_allowed(*argument.split(" ", 1)))
        elif opcode in ("REDUCE", "NEWOBJ"):
            arguments = stack.pop()
            stack.append(self._call(stack.pop(), arguments))
        elif opcode == "BUILD":
            state = stack.pop()
            _give_state(stack[-1], state)
        elif opcode == "BINPERSID":
            stack.append(self._storage(stack.pop()))
        elif opcode not in ("PROTO", "FRAME"):
            raise ValueError(f"its pickle uses {opcode}, which neither tensors nor plain containers need")

    def _collect(self, opcode: str) -> None:
        """Everything above the last mark, into a tuple or into the container below the mark."""
        stack = self._stack
        start = len(stack) - 1
        while stack[start] is not _MARK:
            start -= 1
            if start < 0:
                raise ValueError("its pickle is damaged: a mark is missing")
        values = stack[start + 1 :]
        del stack[start:]
        if opcode == "TUPLE":
            stack.append(tuple(values))
        elif opcode == "SETITEMS" and isinstance(stack[-1], dict):
            stack[-1].update(zip(values[::2], values[1::2], strict=True))
        elif opcode == "APPENDS" and isinstance(stack[-1], list):
            stack[-1].extend(values)
        elif opcode == "ADDITEMS" and isinstance(stack[-1], set):
            stack[-1].update(values)
        else:
            raise ValueError(f"its pickle is damaged: {opcode} for a {type(stack[-1]).__name__}")

    def _storage(self, promise: tuple[Any, ...]) -> _Storage:
        kind, name, key, _, size = promise[:5]
        if kind != "storage" or not isinstance(name, _Name) or name.name not in _DTYPES or len(promise) not in (5, 6):
            raise ValueError("its pickle is damaged: a reference to something else than a storage")
        if len(promise) == 6 and promise[5] is not None:
            raise ValueError("it has views of storages, as torch before 0.4 wrote them: save it again")
        storage = _Storage(np.dtype(_DTYPES[name.name]), str(key), _count(size))
        if self.storages.setdefault(storage.key, storage) != storage:
            raise ValueError(f"storage {storage.key} is promised with two sizes or types")
        return storage

    def _call(self, function: Any, arguments: tuple[Any, ...]) -> Any:
        if not isinstance(function, _Name):
            raise ValueError(f"its pickle is damaged: a {type(function).__name__} is called")
        if function.name in ("_rebuild_tensor", "_rebuild_tensor_v2"):
            storage, offset, shape, strides = arguments[:4]
            if not isinstance(storage, _Storage) or len(shape) != len(strides):
                raise ValueError("its pickle is damaged: a tensor without a storage, or with other strides than axes")
            shape, strides = tuple(map(_count, shape)), tuple(map(_count, strides))
            return TorchTensor(storage, _count(offset), shape, strides, self._file)
        if function.name == "_rebuild_parameter":
            return arguments[0]
        if function.name in ("OrderedDict", "Namespace"):
            return TorchMapping(*arguments)
        if function.name in ("Size", "device", "set"):
            return arguments
        raise ValueError(f"its pickle is damaged: {function.name} is called")


def _allowed(module: str, name: str) -> _Name:
    if (module, name) not in _ALLOWED:
        raise ValueError(
            f"it asks for {module}.{name}, which is neither a tensor nor a plain container: where you trust the file, "
            "load it with torch and save model.state_dict() alone"
        )
    return _Name(module, name)


def _give_state(target: Any, state: Any) -> None:
    if not isinstance(target, TorchMapping):
        raise ValueError(f"its pickle is damaged: a {type(target).__name__} is given attributes")
    target.attributes = state


def _count(value: Any) -> int:
    if not isinstance(value, int) or value < 0:
        raise ValueError(f"its pickle is damaged: {value!r:.50} where a size belongs")
    return value
