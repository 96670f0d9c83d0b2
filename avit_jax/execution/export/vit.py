"""A vision transformer as an ONNX graph: embedding, blocks, heads."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from avit_jax.execution.export.graph import Graph
from avit_jax.model.config import AViTConfig

Weights = Mapping[str, Any]  # nested, as nnx.to_pure_dict gives them, with NumPy arrays


class Layers:
    """The parts of a model's forward pass, each of which adds its operators to a graph.

    Tokens are float32 [batch, tokens, embed_dim]. Queries are scaled by 1 / sqrt(head width) in their weights.
    """

    def __init__(self, graph: Graph, config: AViTConfig, weights: Weights) -> None:
        self.graph = graph
        self.config = config
        self.weights = weights

    def embed(self, images: str) -> str:
        """Special tokens, then patches, with their positions. images: float32 [batch, height, width, channels]."""
        graph, config, weights = self.graph, self.config, self.weights
        rows, columns = config.patch_grid
        size, channels, dim = config.patch_size, config.in_channels, config.embed_dim
        with graph.scope("embed"):
            patches = graph.op("Reshape", images, [-1, rows, size, columns, size, channels])
            patches = graph.op("Transpose", patches, perm=[0, 1, 3, 2, 4, 5])
            patches = graph.op("Reshape", patches, [-1, rows * columns, size * size * channels])
            positions = np.asarray(weights["pos_embed"])
            # The bias and the positions of the patches are one constant.
            patches = graph.op(
                "Add",
                graph.op("MatMul", patches, graph.weight("kernel", weights["patch_embed"]["proj"]["kernel"])),
                graph.weight("positions", positions[:, config.num_special :] + weights["patch_embed"]["proj"]["bias"]),
            )
            if not config.num_special:
                return patches
            names = ("cls_token", "dist_token", "reg_token")
            special = np.concatenate([weights[name] for name in names if name in weights], axis=1)
            first = graph.weight("special", special + positions[:, : config.num_special])
            batch = graph.op("Shape", images, start=0, end=1)
            shape = graph.op("Concat", batch, [config.num_special, dim], axis=0)
            return graph.op("Concat", graph.op("Expand", first, shape), patches, axis=1)

    def block(self, x: str, bias: str | None, layer: int, queries: int | None = None) -> str:
        """A block. bias: of the scores, [batch, 1, 1, tokens]; queries: only the first tokens are computed."""
        return self.transform(self.attend(x, bias, layer, queries)[0], layer)

    def attend(self, x: str, bias: str | None, layer: int, queries: int | None = None) -> tuple[str, str, str]:
        """The attention half of a block; attention [b heads queries n] and keys [b heads width n] beside it."""
        graph, weights = self.graph, self.weights["blocks"]
        with graph.scope(f"blocks.{layer}"):
            with graph.scope("attn"):
                normed = self.norm(x, weights["norm1"], layer)
                mixed, attention, key = self._attention(normed, bias, weights["attn"], layer, queries)
            if queries is not None:
                x = graph.op("Slice", x, [0], [queries], [1])
            return graph.op("Add", x, mixed), attention, key

    def transform(self, x: str, layer: int) -> str:
        """The MLP half of a block."""
        graph, weights = self.graph, self.weights["blocks"]
        with graph.scope(f"blocks.{layer}"):
            with graph.scope("mlp"):
                normed = self.norm(x, weights["norm2"], layer)
                hidden = self.gelu(self.linear(normed, weights["mlp"]["fc1"], layer, "fc1"))
                mixed = self.linear(hidden, weights["mlp"]["fc2"], layer, "fc2")
            return graph.op("Add", x, mixed, name="tokens")

    def _attention(
        self, x: str, bias: str | None, weights: Weights, layer: int, queries: int | None
    ) -> tuple[str, str, str]:
        graph, heads = self.graph, self.config.num_heads
        dim = self.config.embed_dim
        width = dim // heads
        first = x if queries is None else graph.op("Slice", x, [0], [queries], [1])
        parts = []
        for part, (name, rows) in enumerate((("query", first), ("key", x), ("value", x))):
            columns = slice(part * dim, (part + 1) * dim)
            scale = width**-0.5 if name == "query" else 1.0
            qkv = {key: values[..., columns] * np.float32(scale) for key, values in weights["qkv"].items()}
            y = graph.op("Reshape", self.linear(rows, qkv, layer, name), [0, 0, heads, width])
            parts.append(graph.op("Transpose", y, perm=[0, 2, 3, 1] if name == "key" else [0, 2, 1, 3]))
        query, key, value = parts
        scores = graph.op("MatMul", query, key)
        if bias is not None:
            scores = graph.op("Add", scores, bias)
        attention = graph.op("Softmax", scores, axis=-1)
        mixed = graph.op("Transpose", graph.op("MatMul", attention, value), perm=[0, 2, 1, 3])
        return self.linear(graph.op("Reshape", mixed, [0, 0, dim]), weights["proj"], layer, "proj"), attention, key

    def gelu(self, x: str) -> str:
        """GELU in the form that runtimes recognise and compute as one operator; ONNX has one from opset 20 on."""
        graph = self.graph
        with graph.scope("gelu"):
            erf = graph.op("Erf", graph.op("Div", x, 2**0.5))
            return graph.op("Mul", graph.op("Mul", x, graph.op("Add", erf, 1.0)), 0.5)

    def logits(self, outputs: str) -> str:
        """The logits of the model: the mean over its heads. outputs: the final values of the tokens with a head."""
        graph, config = self.graph, self.config
        first_patch = config.num_special
        with graph.scope("head"):
            if config.pool == "mean_norm":
                features = [self.norm(self._patch_mean(outputs, first_patch), self.weights["norm"])]
            else:
                normed = self.norm(outputs, self.weights["norm"])
                if config.pool == "norm_mean":
                    features = [self._patch_mean(normed, first_patch)]
                else:
                    features = [graph.op("Gather", normed, token, axis=1) for token in range(1 + config.distilled)]
                if config.pool == "token_and_mean":
                    features = [graph.op("Concat", *features, self._patch_mean(normed, first_patch), axis=1)]
            if config.num_classes:
                names = ("head", "head_dist")
                features = [
                    self.linear(x, self.weights[name], None, name) for x, name in zip(features, names, strict=False)
                ]
            if len(features) == 1:
                return features[0]
            return graph.op("Mul", graph.op("Add", *features), 0.5)

    def _patch_mean(self, tokens: str, first_patch: int) -> str:
        patches = self.graph.op("Slice", tokens, [first_patch], [self.config.num_tokens], [1])
        return self.graph.op("ReduceMean", patches, [1], keepdims=0)

    def norm(self, x: str, weights: Weights, layer: int | None = None, epsilon: float | None = None) -> str:
        """LayerNorm. layer: of stacked weights; None: they are not stacked. epsilon: None: the config's."""
        scale, bias = (_of_layer(weights[name], layer) for name in ("scale", "bias"))
        graph = self.graph
        with graph.scope("norm"):
            tensors = graph.weight("scale", scale), graph.weight("bias", bias)
        epsilon = self.config.norm_epsilon if epsilon is None else epsilon
        return graph.op("LayerNormalization", x, *tensors, axis=-1, epsilon=epsilon)

    def linear(self, x: str, weights: Weights, layer: int | None, name: str) -> str:
        """x W + b. layer: as for `norm`. name: the scope of its nodes."""
        graph = self.graph
        with graph.scope(name):
            y = graph.op("MatMul", x, graph.weight("kernel", _of_layer(weights["kernel"], layer)))
            if "bias" not in weights:
                return y
            return graph.op("Add", y, graph.weight("bias", _of_layer(weights["bias"], layer)))


def _of_layer(values: np.ndarray, layer: int | None) -> np.ndarray:
    return values if layer is None else values[layer]
