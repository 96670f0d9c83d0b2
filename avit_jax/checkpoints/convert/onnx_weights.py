"""The weights of a vision transformer that PyTorch exported to ONNX, under the names that they had in PyTorch.

Most of them are constants of the same names. Exporters turn the weight of a linear layer and give it a number
(onnx::MatMul_227, val_12): it gets the name of the bias that is added to its product. Class token and positions that
lost their names are found at the place where they join the patches.
"""

import itertools
import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from avit_jax.checkpoints.convert.layouts import family_of
from avit_jax.checkpoints.convert.onnx_graph import Node, OnnxGraph

# Of each family, by the end of the patch embedding's name: class token, positions, distillation token, registers.
_TOKENS = {
    "patch_embed.proj.weight": ("cls_token", "pos_embed", "dist_token", "reg_token"),
    "patch_embeddings.projection.weight": ("cls_token", "position_embeddings", "distillation_token", "register_tokens"),
    "conv_proj.weight": ("class_token", "encoder.pos_embedding", "", ""),
}
_ANONYMOUS = re.compile(r"onnx::.*|val_\d+|expand(_\d+)?|.*[/:].*|_.*|\d+|.*constant.*")
# Operators whose output is their first input, in another shape, type or size.
_SAME = ("Identity", "Cast", "Expand", "Reshape", "Transpose", "Unsqueeze", "Squeeze", "Flatten", "Resize", "Slice")
_QUANTISED = ("DequantizeLinear", "MatMulInteger", "QLinearMatMul", "ConvInteger", "QLinearConv", "MatMulNBits")
_DEEPEST = 40  # steps back through the graph


def weights_in(graph: OnnxGraph) -> tuple[dict[str, np.ndarray], dict[str, Any], list[str]]:
    """Arrays by PyTorch's names and in its shapes; AViTConfig fields that the graph shows; and notes.

    Raises ValueError for a graph that is no vision transformer, or one that this project does not have.
    """
    if graph.producer == "avit_jax":
        raise ValueError("avit_jax.export wrote it, with weights as its runtimes like them: load its checkpoint")
    kinds = {node.kind for node in graph.nodes}
    for kind in _QUANTISED:
        if kind in kinds:
            raise ValueError(f"its weights are quantised ({kind}): export the float32 model")
    trace = _Trace(graph)
    state = trace.named()
    _, prefix, _ = family_of(list(state))
    if not kinds & {"Erf", "Gelu"} or any(node.texts.get("approximate") == "tanh" for node in graph.nodes):
        raise ValueError("its activation is not the exact gelu, which is the only one that AViT has")
    outside = [name for name in state if not name.startswith(prefix)]
    notes = [f"{len(outside)} tensors outside {prefix!r} were left out, such as {outside[0]}"] if outside else []
    for name in outside:
        del state[name]
    for end, tokens in _TOKENS.items():
        stems = [name.removesuffix(end) for name in state if name.endswith(end)]
        if stems:
            notes += trace.add_tokens(state, *(stems[0] + name for name in tokens))
    return state, trace.told(state), notes


class _Trace:
    """Ways through a graph, from a tensor to what made it and what uses it."""

    def __init__(self, graph: OnnxGraph) -> None:
        self.graph = graph
        self.constants = graph.constants
        self.maker = {output: node for node in graph.nodes for output in node.outputs}
        self.users: dict[str, list[Node]] = {}
        # The first convolution is that of the pictures.
        self.patches = next((node for node in graph.nodes if node.kind == "Conv"), None)
        for node in graph.nodes:
            for name in node.inputs:
                self.users.setdefault(name, []).append(node)

    def constant(self, name: str) -> str | None:
        """The name of the constant behind shapes, types and sizes; None if there is none."""
        for _ in range(_DEEPEST):
            if name in self.constants:
                return name
            node = self.maker.get(name)
            if node is None or node.kind not in _SAME or not node.inputs:
                return None
            name = node.inputs[0]
        return None

    def named(self) -> dict[str, np.ndarray]:
        """All weights whose names are known."""
        floats = {name for name, values in self.constants.items() if values.dtype.kind in "fV" and values.size}
        state = {name: self.constants[name] for name in floats if not _ANONYMOUS.fullmatch(name)}
        for node in self.graph.nodes:
            if node.kind == "Identity" and len(node.outputs) == 1 and not _ANONYMOUS.fullmatch(node.outputs[0]):
                source = self.constant(node.outputs[0])  # equal tensors are written once
                if source in floats:
                    state.setdefault(node.outputs[0], self.constants[source])
            elif node.kind in ("MatMul", "Gemm") and len(node.inputs) > 1:
                weight = self.constants.get(node.inputs[1])
                turned = node.kind == "MatMul" or not node.numbers.get("transB")
                if weight is None or weight.ndim != 2 or not _ANONYMOUS.fullmatch(node.inputs[1]):
                    continue
                name = self.weight_name(node, len(weight.T if turned else weight))
                if name is not None:
                    state.setdefault(name, weight.T if turned else weight)
        return state

    def weight_name(self, node: Node, width: int) -> str | None:
        """The name of a product's weight: that of the bias, or of the module whose scope the exporter wrote."""
        biases = [*node.inputs[2:]]
        for user in self.users.get(node.outputs[0], [])[:8] if node.outputs else []:
            biases += user.inputs[:2] if user.kind == "Add" else []
        for name in biases:
            if name.endswith("bias") and self.size(name) == width:
                return name.removesuffix("bias") + "weight"
        # The older exporter writes /blocks/blocks.0/attn/qkv/MatMul, the newer one ['', 'blocks.0', ..., 'linear'].
        scopes = re.findall(r"'([\w.]*)'", node.texts.get("pkg.torch.onnx.name_scopes", ""))
        if len(scopes) > 1 and "." in scopes[-2]:
            return scopes[-2] + ".weight"
        parts = node.name.strip("/").split("/")
        module = [part for part, after in itertools.pairwise(parts) if not after.startswith(f"{part}.")]
        return ".".join(module) + ".weight" if parts[-1].startswith("MatMul") and "." in node.name else None

    def size(self, name: str) -> int:
        source = self.constant(name)
        return 0 if source is None else self.constants[source].size

    def add_tokens(self, state: dict[str, np.ndarray], first: str, positions: str, second: str, more: str) -> list[str]:
        """Add the tokens and positions that are not there by name, from where they join the patches.

        first, positions, second, more: names of class token, positions, distillation token and registers. Raises
        ValueError if one of them is not found.
        """
        notes: list[str] = []
        known = {id(value) for value in state.values()}
        distilled = any(name.endswith(("head_dist.weight", "distillation_classifier.weight")) for name in state)
        for node in self.graph.nodes:
            if node.kind == "Concat" and len(node.inputs) in (2, 3) and self.is_patches(node.inputs[-1]):
                for name, tensor in zip((first, second if distilled else more), node.inputs[:-1], strict=False):
                    source = self.constant(tensor)
                    if name not in state and source is not None and self.constants[source].ndim == 3:
                        state[name] = self.constants[source]
                        known.add(id(state[name]))
        width = next(len(value) for value in state.values() if value.ndim == 4)
        for node in self.graph.nodes:
            if node.kind == "Add" and positions not in state and len(node.inputs) == 2:
                one, other = node.inputs
                if not (self.is_tokens(one) or self.is_tokens(other)):
                    continue
                other = other if self.is_tokens(one) else one
                rows = [row for row in self.rows(other) if row.ndim > 1 and row.shape[-1] == width]
                if rows:
                    state[positions] = np.concatenate([row.reshape(1, -1, width) for row in rows], axis=1)
                    known.update(map(id, rows))
                    notes.append(f"positions were found where they are added to the tokens: {self.size_note(other)}")
        if positions not in state:
            raise ValueError("its positions are not found in its graph: load the PyTorch file that it was made from")
        for node in self.graph.nodes:
            sources = [self.constant(name) for name in node.inputs[:8]] if node.kind == "Concat" else []
            for source in sources:
                values = None if source is None else self.constants[source]
                if values is not None and values.ndim == 3 and values.shape[-1] == width and id(values) not in known:
                    raise ValueError(
                        f"tokens of shape {values.shape} join the patches and have no name in its graph: load the "
                        "PyTorch file that it was made from"
                    )
        return notes

    def is_patches(self, name: str) -> bool:
        """Whether a tensor is what the first convolution gives, with or without positions."""
        node = self.behind(name)
        if node is not None and node.kind == "Add":
            return any(self.behind(each) is self.patches for each in node.inputs[:2])
        return node is not None and node is self.patches

    def is_tokens(self, name: str) -> bool:
        """Whether a tensor is the patches, alone or with tokens before them."""
        node = self.behind(name)
        joined = node is not None and node.kind == "Concat" and bool(node.inputs) and self.is_patches(node.inputs[-1])
        return joined or (node is not None and node is self.patches)

    def size_note(self, name: str) -> str:
        resized = any(node.kind == "Resize" for node in self.back(name))
        return "the file resizes them to its pictures" if resized else "as they are"

    def behind(self, name: str) -> Node | None:
        """The first operator on the way back that is more than another shape."""
        for _ in range(_DEEPEST):
            node = self.maker.get(name)
            if node is None or node.kind not in _SAME or not node.inputs:
                return node
            name = node.inputs[0]
        return None

    def rows(self, name: str) -> Iterator[np.ndarray]:
        """The constants that a tensor is put together from, in their order."""
        source = self.constant(name)
        if source is not None:
            yield self.constants[source]
            return
        node = self.behind(name)
        if node is not None and node.kind == "Concat" and len(node.inputs) <= 3:
            for part in node.inputs:
                source = self.constant(part)
                if source is not None:
                    yield self.constants[source]

    def back(self, name: str, most: int = 200) -> Iterator[Node]:
        """The operators that a tensor is made by, up to a number of them."""
        waiting, seen = [name], {name}
        while waiting and most:
            node = self.maker.get(waiting.pop())
            if node is None:
                continue
            most -= 1
            yield node
            waiting += [each for each in node.inputs[:8] if each not in seen]
            seen.update(node.inputs[:8])

    def told(self, state: dict[str, np.ndarray]) -> dict[str, Any]:
        """AViTConfig fields that no weight shows: heads, the LayerNorms' epsilon, the size of the pictures."""
        told: dict[str, Any] = {}
        kernel = next((value for name, value in state.items() if value.ndim == 4), None)
        if kernel is None:
            return told
        heads = self.heads(kernel.shape[0])
        if heads is not None:
            told["num_heads"] = heads
        epsilons = {float(f"{value:.3g}") for value in self.epsilons()}
        if len(epsilons) == 1:
            told["norm_epsilon"] = epsilons.pop()
        positions = next((value for name, value in state.items() if re.search(r"pos(ition)?_embed", name)), None)
        sizes = [shape[2:] for shape in self.graph.inputs.values() if len(shape) == 4 and all(shape[2:])]
        patch = kernel.shape[-1]
        if positions is not None and sizes and patch and sizes[0][0] % patch == sizes[0][1] % patch == 0:
            height, width = sizes[0]
            if 0 <= positions.shape[1] - (height // patch) * (width // patch) <= 16:
                told["image_size"] = height if height == width else (height, width)
        return told

    def heads(self, dim: int) -> int | None:
        """The number of heads, from the shape that queries, keys and values get before the first softmax."""
        softmax = next((node for node in self.graph.nodes if node.kind == "Softmax"), None)
        for node in self.back(softmax.inputs[0]) if softmax is not None and softmax.inputs else []:
            if node.kind != "Reshape" or len(node.inputs) < 2:
                continue
            shape = self.numbers(node.inputs[1])
            if 3 <= len(shape) <= 5 and (shape[-1] or 0) > 0:
                heads, rest = divmod(dim, shape[-1] or 1)
                # [tokens, heads, width], [batch, heads, tokens, width], or with heads that are computed.
                found = heads in shape[-3:-1] or (len(shape) > 3 and shape[-2] in (-1, 0, None))
                if not rest and found and 1 < heads <= 128:
                    return heads
        return None

    def numbers(self, name: str) -> list[int | None]:
        """A shape, None for lengths that are computed."""
        source = self.constant(name)
        if source is not None:
            return [int(value) for value in self.constants[source].reshape(-1)[:16]]
        node = self.maker.get(name)
        if node is None or node.kind != "Concat":
            return [None]
        parts = [self.constant(part) for part in node.inputs[:16]]
        return [None if part is None else int(self.constants[part].reshape(-1)[0]) for part in parts]

    def epsilons(self) -> Iterator[float]:
        """Those of LayerNormalization, and of variance + epsilon before a square root."""
        for node in self.graph.nodes:
            if node.kind == "LayerNormalization":
                yield node.numbers.get("epsilon", 1e-5)
            elif node.kind == "Sqrt" and node.inputs:
                added = self.maker.get(node.inputs[0])
                if added is not None and added.kind == "Add":
                    values = [self.constants[name] for name in added.inputs if name in self.constants]
                    yield from (float(value.reshape(-1)[0]) for value in values if value.size == 1)
