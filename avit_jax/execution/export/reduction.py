"""Rules with a fixed number of tokens as ONNX graphs: arrays get shorter within a layer or before it."""

import numpy as np

from avit_jax.execution.export.graph import FLOAT32, INT32, Graph
from avit_jax.execution.export.vit import Layers
from avit_jax.reduction.dynamicvit import DynamicViT
from avit_jax.reduction.tome import ToMe
from avit_jax.reduction.topk import EViT, TopK

REDUCTIONS = (TopK, EViT, ToMe, DynamicViT)  # of exactly these types


def run_reduction(layers: Layers, tokens: str, rule: TopK | ToMe | DynamicViT) -> tuple[str, str]:
    """The final values of the tokens with a head [b outputs d], and the token_depth of all tokens [b tokens], int32.

    tokens: as the first layer gets them. A token that is dropped or merged within a layer has been computed in it.
    """
    graph, config = layers.graph, layers.config
    counts, acts = rule.counts(config), rule.acts_in(config)
    with graph.scope("reduction"):
        batch = graph.op("Shape", tokens, start=0, end=1)
        shape = graph.op("Concat", batch, [config.num_tokens], axis=0)
        place = graph.op("Expand", list(range(config.num_tokens)), shape)  # of the token that leads each slot
        rows = graph.op("Unsqueeze", graph.op("Range", 0, graph.op("Squeeze", batch), 1), [1])
        ones = graph.op("Expand", 1.0, graph.op("Concat", shape, [1], axis=0))
    choice = _Choice(layers, rule, batch, rows)
    x, size, count = tokens, ones, config.num_tokens
    bias: str | None = None
    places: list[str] = []
    for layer in range(config.depth):
        if isinstance(rule, DynamicViT) and layer in acts:
            with graph.scope(f"reduction.{layer}"):
                x, place = choice.predicted(x, place, rule.layers.index(layer), count, counts[layer])
            count = counts[layer]
        places.append(place)
        if layer == config.depth - 1:
            x = layers.block(x, bias, layer, queries=config.num_outputs)
            break
        x, attention, key = layers.attend(x, bias, layer)
        if layer in acts and not isinstance(rule, DynamicViT):
            with graph.scope(f"reduction.{layer}"):
                if isinstance(rule, ToMe):
                    x, place, size = choice.merged(x, place, size, key, count, counts[layer])
                    if rule.proportional:
                        bias = graph.op("Unsqueeze", graph.op("Log", graph.op("Squeeze", size, [2])), [1, 2])
                else:
                    x, place = choice.kept(x, place, attention, count, counts[layer])
            count = counts[layer]
        x = layers.transform(x, layer)
    with graph.scope("reduction"):
        every = graph.op("Concat", *places, axis=1)
        zeros = graph.op("Expand", 0.0, shape)
        computed = graph.op("Expand", 1.0, graph.op("Shape", every))
        token_depth = graph.op("ScatterElements", zeros, every, computed, axis=1, reduction="add")
        return x, graph.op("Cast", token_depth, to=INT32)


class _Choice:
    """Which tokens stay, within a layer or before it, and what becomes of the others."""

    def __init__(self, layers: Layers, rule: TopK | ToMe | DynamicViT, batch: str, rows: str) -> None:
        self.layers = layers
        self.graph: Graph = layers.graph
        self.config = layers.config
        self.rule = rule
        self.batch = batch
        self.rows = rows

    def kept(self, x: str, place: str, attention: str, before: int, after: int) -> tuple[str, str]:
        """The patches with the highest class attention, in their order; EViT's fused token comes last."""
        graph, special = self.graph, self.config.num_special
        fuses = isinstance(self.rule, EViT)
        stay = after - special - fuses
        of_class = graph.op("Slice", attention, [0], [self.config.class_token + self.config.distilled], [2])
        scores = graph.op("Slice", graph.op("ReduceMean", of_class, [1, 2], keepdims=0), [special], [before], [1])
        chosen, order = self._highest(scores, stay)
        if not fuses:
            return self._gathered(x, place, order, before)
        there = graph.op("Expand", 1.0, graph.op("Shape", scores))
        gone = graph.op("Expand", 0.0, graph.op("Shape", chosen))
        dropped = graph.op("ScatterElements", there, chosen, gone, axis=1)  # 1 for patches that are dropped
        weights = graph.op("Unsqueeze", graph.op("Mul", dropped, scores), [1])
        fused = graph.op("MatMul", weights, graph.op("Slice", x, [special], [before], [1]))
        first = graph.op("Add", graph.op("ArgMax", dropped, axis=1), special)
        x, _ = self._gathered(x, place, order, before)
        place = graph.op("GatherElements", place, graph.op("Concat", *order, first, axis=1), axis=1)
        return graph.op("Concat", x, fused, axis=1), place

    def predicted(self, x: str, place: str, stage: int, before: int, after: int) -> tuple[str, str]:
        """DynamicViT: before a layer, the patches with the highest scores of a stage's predictor, in their order."""
        graph, layers, special = self.graph, self.layers, self.config.num_special
        weights = layers.weights["rule_module"]["stages"]
        patches = graph.op("Slice", x, [special], [before], [1])
        normed = layers.norm(patches, weights["norm"], stage, epsilon=1e-5)
        embedded = layers.gelu(layers.linear(normed, weights["fc1"], stage, "fc1"))
        own, shared = graph.ops("Split", 2, embedded, [self.config.embed_dim // 2] * 2, axis=2)
        mean = graph.op("Expand", graph.op("ReduceMean", shared, [1]), graph.op("Shape", shared))
        hidden = graph.op("Concat", own, mean, axis=2)
        for name in ("fc2", "fc3"):
            hidden = layers.gelu(layers.linear(hidden, weights[name], stage, name))
        chances = graph.op("LogSoftmax", layers.linear(hidden, weights["fc4"], stage, "fc4"), axis=-1)
        keep, drop = (graph.op("Gather", chances, which, axis=2) for which in range(2))
        _, order = self._highest(graph.op("Sub", keep, drop), after - special)
        return self._gathered(x, place, order, before)

    def merged(self, x: str, place: str, size: str, key: str, before: int, after: int) -> tuple[str, str, str]:
        """ToMe: special tokens, the rest of the even patches, then the odd ones, into which the others have merged."""
        graph, special = self.graph, self.config.num_special
        first_a, first_b = special + special % 2, special + 1 - special % 2  # patches at even and odd positions
        places_a, places_b = (list(range(first, before, 2)) for first in (first_a, first_b))
        merges = before - after
        metric = graph.op("ReduceMean", key, [1], keepdims=0)
        metric = graph.op("Div", metric, graph.op("ReduceL2", metric, [1]))
        a = graph.op("Transpose", graph.op("Gather", metric, places_a, axis=2), perm=[0, 2, 1])
        similarity = graph.op("MatMul", a, graph.op("Gather", metric, places_b, axis=2))
        best = graph.op("ReduceMax", similarity, [2], keepdims=0)
        _, chosen = graph.ops("TopK", 2, best, [merges], axis=1)
        order = [self._special()]
        left = len(places_a) - merges
        if left:  # the places of A that stay, in their order: those that go are moved behind all others
            moved = graph.op("Expand", len(places_a), graph.op("Shape", chosen))
            there = graph.op("Expand", list(range(len(places_a))), graph.op("Shape", best))
            behind = graph.op("ScatterElements", there, chosen, moved, axis=1, reduction="add")
            stays, _ = graph.ops("TopK", 2, behind, [left], axis=1, largest=0)
            order.append(graph.op("Add", graph.op("Mul", stays, 2), first_a))
        order.append(graph.op("Expand", places_b, graph.op("Concat", self.batch, [len(places_b)], axis=0)))
        weighted = graph.op("Concat", graph.op("Mul", x, size), size, axis=2)
        joining, _ = self._gathered(weighted, place, [graph.op("Add", graph.op("Mul", chosen, 2), first_a)], before)
        leading, place = self._gathered(weighted, place, order, before)
        partner = graph.op("GatherElements", graph.op("ArgMax", similarity, axis=2, keepdims=0), chosen, axis=1)
        slot = graph.op("Unsqueeze", graph.op("Add", partner, special + left), [1])
        joins = graph.op("Cast", graph.op("Equal", slot, np.arange(after)[:, None]), to=FLOAT32)  # [b after merges]
        summed = graph.op("Add", leading, graph.op("MatMul", joins, joining))
        x, size = graph.ops("Split", 2, summed, [self.config.embed_dim, 1], axis=2)
        return graph.op("Div", x, size), place, size

    def _highest(self, scores: str, stay: int) -> tuple[str, list[str]]:
        """The patches with the highest scores [b stay]; and the special tokens and these patches, in their order."""
        graph = self.graph
        _, chosen = graph.ops("TopK", 2, scores, [stay], axis=1)
        in_order, _ = graph.ops("TopK", 2, chosen, [stay], axis=1, largest=0)
        return chosen, [self._special(), graph.op("Add", in_order, self.config.num_special)]

    def _special(self) -> str:
        graph, special = self.graph, self.config.num_special
        return graph.op("Expand", list(range(special)), graph.op("Concat", self.batch, [special], axis=0))

    def _gathered(self, x: str, place: str, order: list[str], before: int) -> tuple[str, str]:
        """The tokens x [b before _] and their places, in this order."""
        graph = self.graph
        chosen = graph.op("Concat", *order, axis=1)
        flat = graph.op("Add", chosen, graph.op("Mul", self.rows, before))
        x = graph.op("Gather", graph.op("Flatten", x, axis=2), flat)
        return x, graph.op("GatherElements", place, chosen, axis=1)
