"""A-ViT's rule as an ONNX graph: halted tokens are gathered away after every layer."""

import dataclasses

import numpy as np

from avit_jax.execution.export.graph import FLOAT32, INT32, INT64
from avit_jax.execution.export.vit import Layers
from avit_jax.halting.avit import AViTGate

_FAR = 3e4  # taken from the scores of keys that are not there: their weight is exactly 0, and float16 can hold it


@dataclasses.dataclass(frozen=True)
class Compaction:
    """How halted tokens are removed.

    image_exit: once the tokens with a head have halted, the others of the image are removed too. one_image: there is
    never more than one image, so nothing is padded. step: numbers of tokens are rounded up to a multiple of it.
    """

    image_exit: bool = True
    one_image: bool = False
    step: int = 1


@dataclasses.dataclass(frozen=True)
class _Slots:
    """The tokens of the batch between two layers; n is the number of tokens that the fullest image has left."""

    tokens: str  # [b n d]
    place: str  # [b n], each token's position in its image; float32
    active: str  # [b n], 1 for active tokens, 0 for those that only fill up
    cumulative: str  # [b n], sum of the halting scores so far
    count: str  # [1], n


def run_gate(layers: Layers, tokens: str, rule: AViTGate, how: Compaction) -> tuple[str, str]:
    """The final values of the tokens with a head [b outputs d], and the token_depth of all tokens [b tokens], int32.

    tokens: as the first layer gets them. The tokens with a head stay in front even when they have halted.
    """
    graph, config = layers.graph, layers.config
    depth, outputs = config.depth, config.num_outputs
    gate = _Gate(layers, rule, how)
    with graph.scope("halting"):
        batch = graph.op("Shape", tokens, start=0, end=1)
        gate.first_slot_of(batch)
        shape = graph.op("Concat", batch, [config.num_tokens], axis=0)
        ones = graph.op("Expand", 1.0, shape)
        slots = _Slots(
            tokens,
            place=graph.op("Expand", np.arange(config.num_tokens, dtype=np.float32), shape),
            active=ones,
            cumulative=graph.op("Expand", 0.0, shape),
            count=graph.op("Identity", [config.num_tokens]),
        )
    values: list[str] = []
    shares: list[str] = []
    passed: list[_Slots] = []
    for layer in range(depth - 1):
        x = layers.block(slots.tokens, gate.bias(slots) if layer else None, layer)
        with graph.scope(f"halting.{layer}"):
            values.append(graph.op("Slice", x, [0], [outputs], [1]))
            slots, share = gate.advance(dataclasses.replace(slots, tokens=x))
        shares.append(share)
        passed.append(slots)
    values.append(layers.block(slots.tokens, gate.bias(slots) if depth > 1 else None, depth - 1, queries=outputs))
    with graph.scope("halting"):
        token_depth = ones
        if passed:
            places = graph.op("Cast", graph.op("Concat", *(slots.place for slots in passed), axis=1), to=INT64)
            active = graph.op("Concat", *(slots.active for slots in passed), axis=1)
            token_depth = graph.op("ScatterElements", ones, places, active, axis=1, reduction="add")
        return _weighted(layers, batch, values, shares), graph.op("Cast", token_depth, to=INT32)


def _weighted(layers: Layers, batch: str, values: list[str], shares: list[str]) -> str:
    """The sum of a token's values in all layers, each [b outputs d], with their weights.

    The weights are the steps of the share of its output that it has by then, which starts at 0 and ends at 1.
    """
    graph, config = layers.graph, layers.config
    depth, outputs = config.depth, config.num_outputs
    shape = graph.op("Concat", batch, [outputs], axis=0)
    ends = [graph.op("Expand", end, shape) for end in (0.0, 1.0)]
    reached = graph.op("Concat", ends[0], *shares, ends[1], axis=1)
    reached = graph.op("Reshape", reached, [-1, depth + 1, outputs])
    before, after = (graph.op("Slice", reached, [first], [first + depth], [1]) for first in range(2))
    weights = graph.op("Unsqueeze", graph.op("Transpose", graph.op("Sub", after, before), perm=[0, 2, 1]), [2])
    every = graph.op("Reshape", graph.op("Concat", *values, axis=1), [-1, depth, outputs, config.embed_dim])
    weighted = graph.op("MatMul", weights, graph.op("Transpose", every, perm=[0, 2, 1, 3]))
    return graph.op("Squeeze", weighted, [2])


class _Gate:
    """What happens to the tokens after a layer."""

    def __init__(self, layers: Layers, rule: AViTGate, how: Compaction) -> None:
        self.graph = layers.graph
        self.rule = rule
        self.outputs = layers.config.num_outputs
        self.width = layers.config.embed_dim
        self.tokens = layers.config.num_tokens
        self.how = how
        # Otherwise the token with the head is the first of the active ones, or the image is finished.
        self.keeps_heads = self.outputs > 1 or not how.image_exit
        self.rows = ""

    def first_slot_of(self, batch: str) -> None:
        """Prepare the numbers of the images, [b 1]."""
        graph = self.graph
        self.rows = graph.op("Unsqueeze", graph.op("Range", 0, graph.op("Squeeze", batch), 1), [1])

    def bias(self, slots: _Slots) -> str | None:
        """What is added to the scores of each key: [b 1 1 n]; None if every key is there."""
        if self.how.one_image and not self.keeps_heads and self.how.step == 1:
            return None
        graph = self.graph
        return graph.op("Unsqueeze", graph.op("Mul", graph.op("Sub", slots.active, 1.0), _FAR), [1, 2])

    def advance(self, slots: _Slots) -> tuple[_Slots, str]:
        """The tokens of the next layer; and the share of the output that the tokens with a head have by now."""
        graph, rule, outputs = self.graph, self.rule, self.outputs
        channel = graph.op("Gather", slots.tokens, 0, axis=2)
        score = graph.op("Sigmoid", graph.op("Sub", graph.op("Mul", channel, rule.gate_scale), rule.gate_center))
        # It only grows, so a token that has halted stays halted, whatever it adds while it fills up a slot.
        cumulative = graph.op("Add", slots.cumulative, score)
        goes_on = graph.op("Less", cumulative, 1 - rule.halt_epsilon)
        heads_go_on = graph.op("Slice", goes_on, [0], [outputs], [1])
        share = graph.op("Where", heads_go_on, graph.op("Slice", cumulative, [0], [outputs], [1]), 1.0)
        if self.how.image_exit:
            goes_on = graph.op("And", goes_on, self._any(heads_go_on))
        active = graph.op("Cast", goes_on, to=FLOAT32)
        return self._packed(slots, cumulative, active), share

    def _any(self, heads_go_on: str) -> str:
        graph = self.graph
        if self.outputs == 1:
            return heads_go_on
        one, other = (graph.op("Slice", heads_go_on, [head], [head + 1], [1]) for head in range(2))
        return graph.op("Or", one, other)

    def _packed(self, slots: _Slots, cumulative: str, active: str) -> _Slots:
        graph, step = self.graph, self.how.step
        needed = active
        if self.keeps_heads:
            has_head = graph.op("Less", slots.place, float(self.outputs))
            needed = graph.op("Max", active, graph.op("Cast", has_head, to=FLOAT32))
        counts = graph.op("ReduceSum", needed, [1], keepdims=self.how.one_image)
        fullest = counts if self.how.one_image else graph.op("ReduceMax", counts, [0])
        if step > 1:
            fullest = graph.op("Mul", graph.op("Ceil", graph.op("Div", fullest, float(step))), float(step))
        count = graph.op("Reshape", graph.op("Max", graph.op("Cast", fullest, to=INT64), 1), [1])
        if step > 1:
            count = graph.op("Min", count, slots.count)
        # The needed tokens in the order of their places, then some of the others. No two values are equal, because
        # OpenVINO puts equal ones in any order. Those of needed tokens are above 0.
        ranks = graph.op("Sub", graph.op("Mul", needed, float(self.tokens)), slots.place)
        values, order = graph.ops("TopK", 2, ranks, count, axis=1)
        if self.keeps_heads:
            active = graph.op("GatherElements", active, order, axis=1)
        else:
            active = graph.op("Cast", graph.op("Greater", values, 0.0), to=FLOAT32)
        flat = order if self.how.one_image else graph.op("Add", order, graph.op("Mul", self.rows, slots.count))
        tokens = graph.op("Gather", graph.op("Reshape", slots.tokens, [-1, self.width]), flat, name="tokens")
        return _Slots(
            tokens,
            place=graph.op("GatherElements", slots.place, order, axis=1),
            active=active,
            cumulative=graph.op("GatherElements", cumulative, order, axis=1),
            count=count,
        )
