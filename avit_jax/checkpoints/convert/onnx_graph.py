"""The nodes and constants of an ONNX file, read within limits; nothing of the graph is run.

Field numbers: https://github.com/onnx/onnx/blob/main/onnx/onnx.proto.
"""

import dataclasses
import mmap
import re
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from avit_jax.checkpoints.convert.limits import MAX_AXES, MAX_TENSORS, elements
from avit_jax.checkpoints.convert.protobuf import Budget, Field, fields, signed, varints
from avit_jax.runtime.files import shown

MOST_BYTES = 2**31  # protobuf's own limit; larger models keep their weights beside the file
MOST_NODES = 100_000
_MOST_TEXT = 1000  # bytes of a name
_MOST_PIECES = 10_000  # of a tensor; numbers that are not packed are one each
_DTYPES: dict[int, Any] = {
    1: np.float32, 2: np.uint8, 3: np.int8, 6: np.int32, 7: np.int64, 9: np.bool_, 10: np.float16, 11: np.float64,
    16: ml_dtypes.bfloat16,
}  # fmt: skip
_TYPED_FIELDS = {4: "<f4", 10: "<f8"}  # float_data, double_data; all exporters write raw_data


@dataclasses.dataclass
class Node:
    """An operator: what it is, its tensors by name, and the attributes that are read of it."""

    kind: str
    inputs: list[str]
    outputs: list[str]
    name: str
    numbers: dict[str, float]  # attributes that are one number
    texts: dict[str, str]  # attributes that are a text, and the exporter's notes


@dataclasses.dataclass
class OnnxGraph:
    """A graph whose constants have been read."""

    nodes: list[Node]
    constants: dict[str, np.ndarray]
    inputs: dict[str, tuple[int, ...]]  # of each input its shape, 0 for a free length
    producer: str


def read_onnx_graph(path: Path) -> OnnxGraph:
    """The graph in a file. External data is read from plain files in the same folder only.

    Raises ValueError, with the reason, for a file that is damaged, too large or has data elsewhere.
    """
    size = path.stat().st_size
    if size > MOST_BYTES:
        raise ValueError(f"it has {size} bytes and an ONNX file has at most {MOST_BYTES}")
    if not size:
        raise ValueError("it is empty")
    with path.open("rb") as stream:
        # Not closed here: an error's traceback still refers to parts of it.
        content = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    return _Reader(path.absolute().parent).model(memoryview(content))


class _Reader:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.budget = Budget()
        self.external: dict[str, int] = {}  # bytes of each file beside it
        self.graph = OnnxGraph([], {}, {}, "")

    def model(self, message: memoryview) -> OnnxGraph:
        graphs = []
        for number, value in fields(message, self.budget):
            if number == 2:
                self.graph.producer = _text(value)
            elif number == 7:
                graphs.append(_bytes(value))
        if len(graphs) != 1:
            raise ValueError("it is neither a zip file, nor a pickle, nor safetensors, nor ONNX; or it is truncated")
        for number, value in fields(graphs[0], self.budget):
            if number == 1:
                self.node(_bytes(value))
            elif number == 5:
                self.add(*self.tensor(_bytes(value)))
            elif number == 11:
                self.input(_bytes(value))
        return self.graph

    def add(self, name: str, values: np.ndarray) -> None:
        constants = self.graph.constants
        if name in constants:
            raise ValueError(f"it is damaged: it has two tensors of the name {shown(name, 60)}")
        if len(constants) >= MAX_TENSORS + MOST_NODES:
            raise ValueError(f"it has more than {MAX_TENSORS + MOST_NODES} constants: a ViT has far fewer")
        constants[name] = values

    def node(self, message: memoryview) -> None:
        node = Node("", [], [], "", {}, {})
        if len(self.graph.nodes) >= MOST_NODES:
            raise ValueError(f"it has more than {MOST_NODES} operators: a ViT has far fewer")
        self.graph.nodes.append(node)
        value: np.ndarray | None = None
        for number, content in fields(message, self.budget):
            if number == 1:
                node.inputs.append(_text(content))
            elif number == 2:
                node.outputs.append(_text(content))
            elif number == 3:
                node.name = _text(content)
            elif number == 4:
                node.kind = _text(content)
            elif number == 5:
                found = self.attribute(node, _bytes(content))
                value = found if found is not None else value
            elif number == 9:  # what the exporter says about it
                node.texts.update([self.entry(_bytes(content))])
        if node.kind == "Constant" and value is not None and len(node.outputs) == 1:
            self.add(node.outputs[0], value)

    def attribute(self, node: Node, message: memoryview) -> np.ndarray | None:
        """Put a number or a text among the node's; returns a tensor."""
        name, numbers = "", []
        for number, content in fields(message, self.budget):
            if number == 1:
                name = _text(content)
            elif number == 2:
                node.numbers[name] = float(np.frombuffer(_bytes(content), "<f4")[0])
            elif number == 3:
                node.numbers[name] = signed(_whole(content))
            elif number == 4 and len(_bytes(content)) <= _MOST_TEXT:
                node.texts[name] = _text(content)
            elif number == 5 and node.kind in ("", "Constant"):  # a subgraph's tensors are not weights
                return self.tensor(_bytes(content))[1]
            elif number == 8:
                numbers += self.numbers(content)
        return np.array(numbers, np.int64) if name == "value_ints" else None

    def numbers(self, content: int | memoryview) -> list[int]:
        """Repeated int64 of a field, packed or not."""
        if isinstance(content, int):
            return [signed(content)]
        return [signed(value) for value in varints(content, self.budget)]

    def tensor(self, message: memoryview) -> tuple[str, np.ndarray]:
        name, kind, dims, data, pieces = "", 0, [], None, []
        where: dict[str, str] = {}
        dtype: Any
        for number, content in fields(message, self.budget):
            if number == 1:
                dims += self.numbers(content)
                if len(dims) > MAX_AXES:
                    raise ValueError(f"one of its tensors has more than {MAX_AXES} axes")
            elif number == 2:
                kind = _whole(content)
            elif number == 8:
                name = _text(content)
            elif number == 9:
                data = _bytes(content)
            elif number in _TYPED_FIELDS:
                pieces.append(np.frombuffer(_bytes(content), _TYPED_FIELDS[number]))
            elif number == 7:
                pieces.append(np.array(self.numbers(content), np.int64))
            elif number == 13:
                where.update([self.entry(_bytes(content))])
            if len(pieces) > _MOST_PIECES:
                raise ValueError(f"one of its tensors has more than {_MOST_PIECES} pieces")
        if (dtype := _DTYPES.get(kind)) is None:
            return name, np.zeros(0)  # text and packed types: no weight of a ViT has them
        count = elements(tuple(dims))
        if where:
            return name, self.beside(name, where, np.dtype(dtype), count).reshape(dims)
        if data is None and pieces:
            values = np.concatenate(pieces).astype(dtype)
        else:
            if len(data or b"") % np.dtype(dtype).itemsize:
                raise ValueError(f"it is damaged: {shown(name, 60)} has {len(data or b'')} bytes")
            values = np.frombuffer(data if data is not None else b"", dtype).copy()  # the file is closed at the end
        if values.size != count:
            raise ValueError(f"it is damaged: {shown(name, 60)} has shape {tuple(dims)} and {values.size} values")
        return name, values.reshape(dims)

    def entry(self, message: memoryview) -> tuple[str, str]:
        """A key and its text; texts that are too long for a name, such as a stack trace, are left out."""
        found = {number: _bytes(content) for number, content in fields(message, self.budget)}
        key, text = (found.get(number, memoryview(b"")) for number in (1, 2))
        return _text(key), _text(text) if len(text) <= _MOST_TEXT else ""

    def beside(self, name: str, where: dict[str, str], dtype: np.dtype, count: int) -> np.ndarray:
        """Values that lie in another file. It must have a plain name, in this folder, and hold them."""
        file = where.get("location", "")
        path = self.folder / file
        if not re.fullmatch(r"[\w-][\w.-]{0,200}", file) or path.resolve().parent != self.folder.resolve():
            raise ValueError(f"its weights lie outside its folder, in {shown(file, 100)}: put the file beside it")
        if not path.is_file():
            raise ValueError(f"{shown(file, 100)}, which holds its weights, is missing: put the file beside it")
        offset, length = where.get("offset", "0"), where.get("length", str(count * dtype.itemsize))
        if not all(text.isascii() and text.isdigit() and len(text) < 16 for text in (offset, length)):
            raise ValueError(f"it is damaged: {shown(name, 60)} lies at {shown(offset, 30)}, {shown(length, 30)} bytes")
        size = self.external.setdefault(file, path.stat().st_size)
        if int(length) != count * dtype.itemsize or int(offset) + int(length) > size:
            raise ValueError(f"{file} has {size} bytes and does not hold {shown(name, 60)}: it is damaged or another's")
        return np.fromfile(path, dtype, count, offset=int(offset))

    def input(self, message: memoryview) -> None:
        """ValueInfoProto: name 1, type 2 > tensor_type 1 > shape 2 > dim 1 > dim_value 1."""
        name, lengths = "", []
        for number, content in fields(message, self.budget):
            if number == 1:
                name = _text(content)
            elif number == 2:
                for dim in self.inside([_bytes(content)], 1, 2, 1):
                    values = [value for place, value in fields(dim, self.budget) if place == 1]
                    lengths.append(values[0] if values and isinstance(values[0], int) else 0)
        self.graph.inputs[name] = tuple(lengths)

    def inside(self, messages: list[memoryview], *path: int) -> list[memoryview]:
        for number in path:
            found: list[Field] = [field for message in messages for field in fields(message, self.budget)]
            messages = [value for place, value in found if place == number and isinstance(value, memoryview)]
        return messages


def _bytes(value: int | memoryview) -> memoryview:
    if isinstance(value, int):
        raise ValueError("it is damaged: a number where bytes should be")
    return value


def _whole(value: int | memoryview) -> int:
    if not isinstance(value, int):
        raise ValueError("it is damaged: bytes where a number should be")
    return value


def _text(value: int | memoryview) -> str:
    content = _bytes(value)
    if len(content) > _MOST_TEXT:
        raise ValueError(f"it is damaged: one of its names has {len(content)} bytes")
    return bytes(content).decode("utf-8", "replace")
