"""A small pickle machine that runs no code from the file.

The machine knows tensors and plain containers. Anything else that a pickle asks for is refused by name, so nothing that
the file names is ever imported or called. Its work is bounded: it never hashes, compares or prints a container from the
file, because a few hundred bytes can describe one with 2^60 parts, or one nested so deeply that Python's stack
overflows.
"""

import dataclasses
import io
import pickletools
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from avit_jax.checkpoints.convert.limits import (
    MAX_AXES,
    MAX_CONTAINERS,
    MAX_NESTING,
    MAX_OPCODES,
    MAX_PLAIN_KEYS,
    count,
    elements,
)
from avit_jax.checkpoints.convert.torch_tensors import DTYPES, Storage, StorageFile, TorchMapping, TorchTensor
from avit_jax.runtime.files import shown


@dataclasses.dataclass(frozen=True)
class _Name:
    """A function or class that a pickle names, and that it is allowed to name."""

    module: str
    name: str


_ALLOWED = {
    *(("torch", storage) for storage in DTYPES),
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
_CONTAINERS: dict[str, type] = {"EMPTY_DICT": TorchMapping, "EMPTY_LIST": list, "EMPTY_SET": set}
_PLAIN_KEYS = (int, float, bool, bytes, type(None))


class PickleMachine:
    """Executes pickles on plain values. pickletools reads the opcodes; nothing else of Python's unpickling runs."""

    def __init__(self, file: StorageFile) -> None:
        self._file = file
        self.storages: dict[str, Storage] = {}
        self._opcodes_left = MAX_OPCODES
        self._plain_keys_left = MAX_PLAIN_KEYS
        self._nesting: dict[int, int] = {}  # id of a container -> how many levels it has
        self._sealed: set[int] = set()  # ids of those that are part of another one
        self._alive: list[Any] = []  # all containers, so that no id is used twice

    def run(self, source: io.BytesIO) -> Any:
        """The object in one pickle. Raises ValueError if it asks for something that is not allowed, or is damaged."""
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        try:
            for opcode, argument, _ in pickletools.genops(source):
                self._work(1)
                if opcode.name == "STOP":
                    return self._stack.pop()
                self._execute(opcode.name, argument)
        except (IndexError, KeyError, TypeError, AttributeError, UnicodeError, OverflowError) as error:
            raise ValueError(f"its pickle is damaged ({type(error).__name__}: {error})") from error
        raise ValueError("its pickle has no end")

    def _work(self, steps: int) -> None:
        self._opcodes_left -= steps
        if self._opcodes_left < 0:
            raise ValueError(f"its pickle has more than {MAX_OPCODES} steps: no checkpoint needs so many")

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
        elif opcode in _CONTAINERS:
            stack.append(self._new(_CONTAINERS[opcode]()))
        elif opcode in _TUPLES:
            self._tuple(_TUPLES[opcode])
        elif opcode in ("TUPLE", "SETITEMS", "APPENDS", "ADDITEMS"):
            self._collect(opcode)
        elif opcode in ("SETITEM", "APPEND"):
            stack.insert(-2 if opcode == "SETITEM" else -1, _MARK)
            self._collect(opcode + "S")
        elif opcode in ("GLOBAL", "STACK_GLOBAL"):
            name = stack.pop() if opcode == "STACK_GLOBAL" else argument.split(" ", 1)[1]
            module = stack.pop() if opcode == "STACK_GLOBAL" else argument.split(" ", 1)[0]
            stack.append(_allowed(module, name))
        elif opcode in ("REDUCE", "NEWOBJ"):
            arguments = stack.pop()
            stack.append(self._call(stack.pop(), arguments))
        elif opcode == "BUILD":
            self._give_state(stack.pop())
        elif opcode == "BINPERSID":
            stack.append(self._storage(stack.pop()))
        elif opcode not in ("PROTO", "FRAME"):
            raise ValueError(f"its pickle uses {opcode}, which neither tensors nor plain containers need")

    def _new(self, container: Any, values: Iterable[Any] = ()) -> Any:
        """Count a container that has just been made of `values`."""
        if len(self._alive) >= MAX_CONTAINERS:
            raise ValueError(f"its pickle has more than {MAX_CONTAINERS} containers")
        self._alive.append(container)
        self._nesting[id(container)] = 1
        self._hold(container, values)
        return container

    def _hold(self, container: Any, values: Iterable[Any]) -> None:
        """Count the nesting of a container that is about to get `values`, and seal those of them that are containers.

        A sealed container cannot change, because its nesting is already part of another one's. No pickler needs that,
        except for an object that contains itself.
        """
        deepest = 0
        for value in values:
            if (levels := self._nesting.get(id(value), 0)) > 0:
                deepest = max(deepest, levels)
                self._sealed.add(id(value))
        if id(container) in self._sealed:
            raise ValueError("its pickle is damaged: it changes a container that is part of another one, or of itself")
        levels = max(self._nesting[id(container)], deepest + 1)
        if levels > MAX_NESTING:
            raise ValueError(f"its pickle nests containers more than {MAX_NESTING} deep")
        self._nesting[id(container)] = levels

    def _tuple(self, length: int) -> None:
        stack = self._stack
        start = len(stack) - length
        if start < 0:
            raise ValueError("its pickle is damaged: a tuple of more values than there are")
        values = tuple(stack[start:])
        del stack[start:]
        stack.append(self._new(values, values) if values else values)

    def _collect(self, opcode: str) -> None:
        """Put everything above the last mark into a tuple, or into the container below the mark."""
        stack = self._stack
        start = len(stack) - 1
        while stack[start] is not _MARK:
            start -= 1
            if start < 0:
                raise ValueError("its pickle is damaged: a mark is missing")
        values = stack[start + 1 :]
        del stack[start:]
        if opcode == "TUPLE":
            stack.extend(values)
            return self._tuple(len(values))
        target = stack[-1]
        if opcode == "SETITEMS" and isinstance(target, dict):
            self._set_items(target, values[::2], values[1::2])
        elif opcode == "APPENDS" and isinstance(target, list):
            self._hold(target, values)
            target.extend(values)
        elif opcode == "ADDITEMS" and isinstance(target, set):
            self._check_keys(values)
            target.update(values)
        else:
            raise ValueError(f"its pickle is damaged: {opcode} for a {type(target).__name__}")

    def _set_items(self, target: dict[Any, Any], keys: Sequence[Any], values: Sequence[Any]) -> None:
        if len(keys) != len(values):
            raise ValueError("its pickle is damaged: a key without a value")
        self._check_keys(keys)
        self._hold(target, values)
        target.update(zip(keys, values, strict=True))

    def _check_keys(self, keys: Iterable[Any]) -> None:
        """Raises ValueError for keys that Python might hash for hours, or that are made to collide.

        Python hashes text with a secret seed, but not numbers, so only a harmless number of those is allowed.
        """
        for key in keys:
            if type(key) is str:
                continue
            if type(key) not in _PLAIN_KEYS:
                raise ValueError(f"its pickle has a {type(key).__name__} for a key, which must be text or a number")
            if type(key) is int and key.bit_length() > 64:
                raise ValueError(f"its pickle has {shown(key)} for a key")
            self._plain_keys_left -= 1
            if self._plain_keys_left < 0:
                raise ValueError(f"its pickle has more than {MAX_PLAIN_KEYS} keys that are not text")

    def _storage(self, promise: Any) -> Storage:
        if not isinstance(promise, tuple) or len(promise) not in (5, 6):
            raise ValueError("its pickle is damaged: a reference to something other than a storage")
        kind, name, key, _, size = promise[:5]
        if type(kind) is not str or kind != "storage" or not isinstance(name, _Name) or name.name not in DTYPES:
            raise ValueError("its pickle is damaged: a reference to something other than a storage")
        if len(promise) == 6 and promise[5] is not None:
            raise ValueError("it has views of storages, as torch before 0.4 wrote them: save it again")
        if type(key) is not str or len(key) > 100 or not key.isprintable():
            raise ValueError(f"its pickle is damaged: a storage is called {shown(key, 100)}")
        storage = Storage(np.dtype(DTYPES[name.name]), key, count(size))
        if self.storages.setdefault(key, storage) != storage:
            raise ValueError(f"storage {key} is declared with two sizes or types")
        return storage

    def _call(self, function: Any, arguments: Any) -> Any:
        if not isinstance(function, _Name) or not isinstance(arguments, tuple):
            raise ValueError(f"its pickle is damaged: a {type(function).__name__} is called")
        if function.name in ("_rebuild_tensor", "_rebuild_tensor_v2"):
            return self._tensor(*arguments[:4])
        if function.name == "_rebuild_parameter":
            return arguments[0]
        if function.name in ("OrderedDict", "Namespace"):
            return self._mapping(arguments)
        if function.name in ("Size", "device", "set"):
            return arguments
        raise ValueError(f"its pickle is damaged: {function.name} is called")

    def _tensor(self, storage: Any, offset: Any, shape: Any, strides: Any) -> TorchTensor:
        plain = isinstance(shape, tuple | list) and isinstance(strides, tuple | list)
        if not isinstance(storage, Storage) or not plain or len(shape) != len(strides):
            raise ValueError("its pickle is damaged: a tensor without a storage, or with other strides than axes")
        if len(shape) <= MAX_AXES:
            shape, strides = tuple(shape), tuple(map(count, strides))
        elements(shape)
        return TorchTensor(storage, count(offset), shape, strides, self._file)

    def _mapping(self, arguments: tuple[Any, ...]) -> TorchMapping:
        """An OrderedDict as Python 3 pickles it, empty at first, or as Python 2 did, from one list of pairs."""
        mapping = self._new(TorchMapping())
        if not arguments:
            return mapping
        pairs = arguments[0]
        if len(arguments) > 1 or not isinstance(pairs, list | tuple):
            raise ValueError("its pickle is damaged: a mapping is made of something other than pairs")
        self._work(len(pairs))
        if not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs):
            raise ValueError("its pickle is damaged: a mapping is made of something other than pairs")
        self._set_items(mapping, [key for key, _ in pairs], [value for _, value in pairs])
        return mapping

    def _give_state(self, state: Any) -> None:
        target = self._stack[-1]
        if not isinstance(target, TorchMapping):
            raise ValueError(f"its pickle is damaged: a {type(target).__name__} is given attributes")
        self._hold(target, [state])
        target.attributes = state


def _allowed(module: Any, name: Any) -> _Name:
    if type(module) is not str or type(name) is not str:
        raise ValueError(f"its pickle is damaged: a {type(name).__name__} of a {type(module).__name__} for a function")
    if (module, name) not in _ALLOWED:
        raise ValueError(
            f"it asks for {shown(module, 60)}.{shown(name, 60)}, which is neither a tensor nor a plain container: "
            "if you trust the file, load it with torch and save only model.state_dict()"
        )
    return _Name(module, name)
