"""Removal for a model with gates: a layer computes only the patches and sublayers that are on, group by group.

In every layer, and for attention and MLP apart, images are sorted by how many tokens they compute: none if the sublayer
is off. Groups of images run with the smallest of a few static capacities, or not at all. What comes out is scattered
back to where it belongs, and a token that is off keeps its value. Heads differ from image to image: they stay masks.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from avit_jax.execution.compiled import CountedModel, on_each_device, split_model
from avit_jax.execution.gated import gated_output
from avit_jax.execution.places import needed_first
from avit_jax.execution.plan import PackedPlan, padded_loads
from avit_jax.execution.work import Executed, gated_packed_gmacs
from avit_jax.gated.gate_heads import GateHeads
from avit_jax.gated.gates import Choice
from avit_jax.model.attention import of_channels
from avit_jax.model.layers import Block
from avit_jax.model.output import AViTOutput, GatedOutput
from avit_jax.model.vit import AViT


class GatedPackedModel(CountedModel):
    """A model with gates, compiled for packed execution; call it with up to `batch_size` images."""

    made_by = "compile_packed"
    execution = "packed"

    def __init__(self, model: AViT, batch_size: int, plan: PackedPlan, mesh: Mesh | None) -> None:
        self.plan = plan
        graphdef, params = split_model(model, mesh)
        jitted = jax.jit(gated_packed_program(graphdef, plan, mesh))
        super().__init__(model.config, batch_size, jitted, params, mesh)

    def executed(self, token_depth: Int[np.ndarray, "b n"], images: int, output: AViTOutput | None = None) -> Executed:
        """The work done for the first `images` of a batch. output: of the batch, for its gates."""
        assert isinstance(output, GatedOutput)
        there = (token_depth > 0).any(1)
        tokens = np.asarray(output.token_gates).sum(-1) * there
        loads = [(tokens * np.asarray(output.sublayer_gates)[..., part]).astype(int) for part in (0, 1)]
        padded = [padded_loads(self._by_device(own), self.plan) for own in loads]
        gmacs = gated_packed_gmacs(self.config, padded[0], padded[1], self.plan.group_size, images)
        return Executed(int(np.maximum(*loads).sum()), gmacs)


def gated_packed_program(
    graphdef: nnx.GraphDef, plan: PackedPlan, mesh: Mesh | None
) -> Callable[[Any, Array, Array], AViTOutput]:
    """The function that compile_packed compiles for gates: (params, images, number that count) -> output."""

    def local(params: Any, images: Array, count: Array) -> tuple[GatedOutput, tuple[Array, ...]]:
        return forward(nnx.merge(graphdef, params), images, count, plan), ()

    program = on_each_device(local, mesh, GatedOutput)
    return lambda params, images, count: program(params, images, count)[0]


def forward(model: AViT, images: Float[Array, "b h w c"], count: Int[Array, ""], plan: PackedPlan) -> GatedOutput:
    """The model's output for the first `count` images; the rest cost nothing beyond their gates."""
    config, rule = model.config, model.config.gates
    assert rule is not None
    batch, missing = len(images), -len(images) % plan.group_size
    x = jnp.pad(model.embed(images), ((0, missing), (0, 0), (0, 0)))
    there = jnp.arange(len(x)) < count
    blocks, stacked = nnx.split(model.blocks)
    gates, maps = nnx.split(rule.maps(model))

    def layer(x: Array, index: Array) -> tuple[Array, Choice]:
        block: Block = nnx.merge(blocks, jax.tree.map(lambda p: p[index], stacked))
        of_layer: GateHeads = nnx.merge(gates, jax.tree.map(lambda p: p[index], maps))
        seen = block.norm1(x)
        choice = rule.choose(of_layer, seen.astype(jnp.float32), x, layer=index, num_special=config.num_special)
        on, runs = choice.tokens > 0.5, (choice.sublayers > 0.5) & there[:, None]

        def attention(seen: Array, active: Array, heads: Array) -> Array:
            return block.attn.gated(seen, active, heads).astype(x.dtype)

        def mlp(y: Array, active: Array, heads: Array) -> Array:
            return block.mlp(block.norm2(y) * of_channels(heads, y.shape[-1]), None).astype(x.dtype)

        y = x + _added(attention, seen, on & runs[:, :1], choice.heads, plan)
        return y + _added(mlp, y, on & runs[:, 1:], choice.heads, plan), choice

    x, choices = jax.lax.scan(layer, x, jnp.arange(config.depth))
    choices = jax.tree.map(lambda values: values[:, :batch], choices)
    return gated_output(model, x[:batch], choices)


def _added(
    compute: Callable[[Array, Array, Array], Array],
    tokens: Float[Array, "b n d"],
    needed: Bool[Array, "b n"],
    heads: Float[Array, "b h"],
    plan: PackedPlan,
) -> Float[Array, "b n d"]:
    """What a sublayer adds to the needed tokens, 0 for the others.

    compute(tokens [g, c, D], active [g, c], heads [g, H]) is the sublayer for a group of images.
    """
    number = needed.shape[1]
    counts = needed.sum(1)
    rows = jnp.argsort(counts)
    slots = needed_first(needed[rows])
    capacities = jnp.asarray(plan.capacities)

    def branch(capacity: int) -> Callable[..., Array]:
        def run(rows: Array, slots: Array, counts: Array) -> Array:
            active = jnp.arange(capacity) < counts[:, None]
            # The first slot, so that a group's images without any token have a key; what it gives is thrown away.
            keys = active | (jnp.arange(capacity) == 0)
            chosen = slots[:, :capacity]
            result = jnp.where(active[..., None], compute(tokens[rows[:, None], chosen], keys, heads[rows]), 0)
            whole = jnp.zeros((len(rows), number, tokens.shape[2]), result.dtype)
            return whole.at[jnp.arange(len(rows))[:, None], chosen].set(result, unique_indices=True)

        return run

    def nothing(rows: Array, *_: Array) -> Array:
        return jnp.zeros((len(rows), *tokens.shape[1:]), tokens.dtype)

    branches = [nothing, *(branch(capacity) for capacity in plan.capacities)]

    def group(inputs: tuple[Array, ...]) -> Array:
        most = inputs[2].max()
        return jax.lax.switch(jnp.where(most == 0, 0, 1 + jnp.searchsorted(capacities, most)), branches, *inputs)

    grouped = jax.tree.map(lambda v: v.reshape(-1, plan.group_size, *v.shape[1:]), (rows, slots, counts[rows]))
    added = jax.lax.map(group, grouped).reshape(tokens.shape)
    return added[jnp.argsort(rows)]
