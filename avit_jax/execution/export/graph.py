"""A builder of ONNX graphs: operators are added one by one, and arrays among their inputs become constants."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import onnx

# ONNX's numbers of types, for Cast.
FLOAT32, INT32, INT64 = 1, 6, 7

# A tensor of the graph by its name, or a value: Python integers become int64, other numbers float32.
Tensor = str | int | float | Sequence[int] | Sequence[float] | np.ndarray


class Graph:
    """Nodes, constants, inputs and outputs of a graph, in the order in which they were added."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, onnx.TensorProto] = {}
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []
        self._scope = ""
        self._counts: dict[str, int] = {}

    @contextlib.contextmanager
    def scope(self, name: str) -> Iterator[None]:
        """Names within begin with this name: nodes of a part of the model can be found by it."""
        before, self._scope = self._scope, f"{self._scope}{name}/"
        yield
        self._scope = before

    def input(self, name: str, dtype: str, shape: Sequence[int | str]) -> str:
        """An input of the graph; a dimension is a number, or the name of one that is free."""
        self.inputs.append(_value_info(name, dtype, shape))
        return name

    def output(self, tensor: str, name: str, dtype: str, shape: Sequence[int | str]) -> None:
        """Make a tensor an output of the graph under this name."""
        self.op("Identity", tensor, name=name)
        self.outputs.append(_value_info(name, dtype, shape))

    def op(self, kind: str, *inputs: Tensor, name: str | None = None, **attributes: Any) -> str:
        """Add an operator with one output; returns its name. name: of the output, if it is not numbered."""
        return self.ops(kind, 1, *inputs, name=name, **attributes)[0]

    def ops(self, kind: str, outputs: int, *inputs: Tensor, name: str | None = None, **attributes: Any) -> list[str]:
        """Add an operator with several outputs; returns their names."""
        import onnx

        own = self._scope + name if name else self._numbered(kind)
        results = [own] if outputs == 1 else [f"{own}.{place}" for place in range(outputs)]
        tensors = [each if isinstance(each, str) else self._constant(each) for each in inputs]
        self.nodes.append(onnx.helper.make_node(kind, tensors, results, name=own, **attributes))
        return results

    def weight(self, name: str, values: np.ndarray) -> str:
        """A parameter of the model, under its name in the current scope."""
        import onnx

        full = self._scope + name
        self.constants[full] = onnx.numpy_helper.from_array(np.ascontiguousarray(values), full)
        return full

    def _constant(self, value: Any) -> str:
        """A small constant; equal ones are stored once."""
        import onnx

        values = np.asarray(value)
        if not isinstance(value, np.ndarray):
            values = values.astype(np.int64 if values.dtype.kind == "i" else np.float32)
        name = f"constant/{values.dtype}{list(values.shape)}{values.tobytes().hex()}"
        self.constants.setdefault(name, onnx.numpy_helper.from_array(values, name))
        return name

    def _numbered(self, kind: str) -> str:
        stem = self._scope + kind
        self._counts[stem] = self._counts.get(stem, 0) + 1
        return stem if self._counts[stem] == 1 else f"{stem}_{self._counts[stem]}"


def _value_info(name: str, dtype: str, shape: Sequence[int | str]) -> Any:
    import onnx

    return onnx.helper.make_tensor_value_info(name, onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), shape)
