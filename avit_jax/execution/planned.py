"""Planned execution: halted tokens are removed in stages whose shapes are fixed ahead, at inference and in training."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from avit_jax.execution.noise import Noise
from avit_jax.execution.packing import load
from avit_jax.execution.places import Layout, Move
from avit_jax.execution.stages import PlannedPlan
from avit_jax.halting.rule import Halting, State, Trace, drop_halted
from avit_jax.model.layers import Block, checkpointed
from avit_jax.model.output import AViTOutput
from avit_jax.model.seen import Facts, of_attention
from avit_jax.model.vit import AViT


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Ran:
    """What the layers leave, in the original order of images and tokens."""

    state: State
    trace: Trace  # of every layer, stacked
    overflow: Bool[Array, ""]  # whether the batch did not fit; then the rest is wrong


def forward(
    model: AViT,
    rule: Halting,
    images: Float[Array, "b h w c"],
    plan: PlannedPlan,
    *,
    count: Int[Array, ""] | None = None,
    image_exit: bool = False,
    key: PRNGKeyArray | None = None,
    mesh: Mesh | None = None,
    positions: Int[Array, "b p 2"] | None = None,
) -> tuple[AViTOutput, Ran]:
    """The model's output with the plan's shapes, and what led to it. If `overflow` is True, all of it is wrong.

    count: images that are not padding; None: all. image_exit: an image ends when the tokens that its logits read have
    halted. key: draws dropout and stochastic depth as in masked execution; None: neither. mesh: the images are split
    over all its devices, and each packs its own; the plan is for one device. positions: where patches are cut, as many
    as the grid has; None: on the grid.
    """
    x = model.embed(images, key, positions)
    state = rule.initial(len(images), model.config, model.draw(rule, images, key))
    if count is not None:
        state = dataclasses.replace(state, active=state.active & (jnp.arange(len(images)) < count)[:, None])
    if mesh is None or mesh.size == 1:
        ran = _run(model, rule, x, state, plan, _Rows(jnp.zeros((), int), len(images)), image_exit, key)
    else:
        ran = _run_on(mesh, model, rule, x, state, plan, image_exit, key)
    return model.output(rule, ran.state, ran.trace), ran


def _run_on(
    mesh: Mesh,
    model: AViT,
    rule: Halting,
    x: Array,
    state: State,
    plan: PlannedPlan,
    image_exit: bool,
    key: PRNGKeyArray | None,
) -> Ran:
    """`_run` for the images of each device."""
    graphdef, params = nnx.split(model)
    total, axes = len(x), mesh.axis_names

    def local(params: Any, x: Array, state: State, key: PRNGKeyArray | None) -> tuple[State, Trace, Array]:
        rows = _Rows(jax.lax.axis_index(axes) * len(x), total)
        ran = _run(nnx.merge(graphdef, params), rule, x, state, plan, rows, image_exit, key)
        return ran.state, ran.trace, jax.lax.pmax(ran.overflow.astype(int), axes) > 0

    everywhere, first, second = PartitionSpec(), PartitionSpec(axes), PartitionSpec(None, axes)
    ran = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(everywhere, first, first, everywhere),
        out_specs=(first, second, everywhere),
        check_vma=False,
    )(params, x, state, key)
    return Ran(*ran)


@dataclasses.dataclass(frozen=True)
class _Rows:
    """Which images of the batch a device has."""

    first: Int[Array, ""]
    total: int  # images of the batch, on all devices


def _run(
    model: AViT,
    rule: Halting,
    x: Float[Array, "b n d"],
    state: State,
    plan: PlannedPlan,
    rows: _Rows,
    image_exit: bool,
    key: PRNGKeyArray | None,
) -> Ran:
    """All layers of a batch on one device, from its embedded tokens and the state before layer 1."""
    config = model.config
    batch, missing = len(x), plan.rows - len(x)
    # Rows that only fill the last group are inactive from the start.
    x, state = jax.tree.map(lambda v: jnp.pad(v, ((0, missing), *[(0, 0)] * (v.ndim - 1))), (x, state))
    layers = _Layers(model, rule, key, batch, rows, image_exit)
    layout = Layout(plan.group_size, (config.num_tokens,) * plan.groups)
    parts = layout.split(x.reshape(-1, config.embed_dim))
    overflow = jnp.zeros((), bool)
    index = jnp.broadcast_to(jnp.arange(config.num_tokens), (plan.rows, config.num_tokens))
    image = jnp.arange(plan.rows)
    read = jnp.broadcast_to(jnp.asarray(config.tokens_read), index.shape)
    capacities, moved, traces = layout.capacities, False, []
    least = state.output.shape[1] % config.num_tokens  # the heads' tokens have places wherever an image has
    for stage, end in zip(plan.stages, plan.ends(), strict=True):
        if stage.capacities != capacities:  # not where the first layers have all places, so that nothing moves
            capacities = stage.capacities
            new = Layout(plan.group_size, tuple(max(c, least) if c else 0 for c in capacities))
            needed, _ = load(state)
            move = Move.packing(needed)
            overflow |= (needed.sum(1)[move.rows] > np.repeat(capacities, plan.group_size)).any()
            parts, state = new.split(move.tokens(layout.joined(parts), layout, new)), move.state(state)
            index, read, image = move.apply(index), move.apply(read), move.apply_rows(image)
            moved, layout = True, new
        parts, state, trace = layers.stage(parts, state, index, image, read, stage.first, end)
        if moved:
            back = _original(index, image)
            trace = Trace(
                jax.tree.map(jax.vmap(back.apply), trace.of_tokens),
                jax.tree.map(jax.vmap(back.apply_rows), trace.of_images),
            )
        traces.append(trace)
    trace = jax.tree.map(lambda *parts: jnp.concatenate(parts)[:, :batch], *traces)
    if moved:
        state = _original(index, image).state(state)
    return Ran(jax.tree.map(lambda v: v[:batch], state), trace, overflow)


def _original(index: Int[Array, "b n"], image: Int[Array, " b"]) -> Move:
    """The move back to the original order. index: original position of each slot; image: original row of each row."""
    rows = jnp.argsort(image)
    return Move(rows, jnp.argsort(index[rows], axis=1), image, index[rows])


@dataclasses.dataclass(frozen=True)
class _Layers:
    """The layers of a model, run group by group."""

    model: AViT
    rule: Halting
    key: PRNGKeyArray | None
    batch: int  # images of this device, without the rows that fill the last group
    rows: _Rows
    image_exit: bool

    def stage(
        self,
        parts: list[Float[Array, "g _ d"]],
        state: State,
        index: Int[Array, "b n"],
        image: Int[Array, " b"],
        read: Bool[Array, "b n"],
        first: int,
        end: int,
    ) -> tuple[list[Array], State, Trace]:
        """Layers first to end - 1 with the same places; the trace [l b n] is in the order of `image` and `index`.

        parts: the tokens of each group. read: tokens that the logits read.
        """
        config = self.model.config
        graphdef, stacked = nnx.split(self.model.blocks)
        rates = jnp.linspace(0, config.drop_path_rate, config.depth) if self.key is not None else None
        # The losses of training read the scores of all tokens, and some rules need the whole last layer.
        short = self.image_exit and config.pool == "token" and not self.rule.reads_last_layer
        own = self.rows.first + jnp.minimum(image, self.batch - 1)  # rows that fill the last group: any image
        size = len(image) // len(parts)
        states, indices, images, reads = (
            [jax.tree.map(lambda v, at=at: v[at : at + size], tree) for at in range(0, len(image), size)]
            for tree in (state, index, own, read)
        )
        # A group without places has slots for the tokens that the rule looks at.
        least = max(state.output.shape[1] % config.num_tokens, 1)
        near = [_slots(state, max(part.shape[1], least)) for part, state in zip(parts, states, strict=True)]

        def layer(carry: Any, inputs: Any, read_only: bool = False) -> tuple[Any, list[Trace]]:
            params, number, rate = inputs
            block = nnx.merge(graphdef, params)
            noise = Noise.of_layer(config, block, self.key, number, rate, self.rows.total)
            groups, traces = [], []
            for (x, state), index, image, read in zip(carry, indices, images, reads, strict=True):
                width = state.active.shape[1]
                z, facts = self._block(block, x, state, noise.of(image, index[:, :width]), read_only)
                state, trace = self._advanced(z, state, facts, read[:, :width], number, read_only)
                groups.append((z[:, : x.shape[1]], state))
                traces.append(trace)
            return groups, traces

        stop = end - 1 if short and end == config.depth else end
        carry, traces = list(zip(parts, near, strict=True)), []
        if stop > first:
            weights = jax.tree.map(lambda p: jax.lax.slice_in_dim(p, first, stop), stacked)
            inputs = weights, jnp.arange(first, stop), None if rates is None else rates[first:stop]
            carry, trace = jax.lax.scan(checkpointed(layer, config), carry, inputs)
            traces.append(trace)
        if stop < end:
            params = jax.tree.map(lambda p: p[stop], stacked)
            carry, trace = layer(carry, (params, stop, None), read_only=True)
            traces.append(jax.tree.map(lambda v: v[None], trace))
        of_groups = jax.tree.map(lambda *layers: jnp.concatenate(layers), *traces)
        ended = [_with_slots(old, new) for old, (_, new) in zip(states, carry, strict=True)]
        state = jax.tree.map(lambda *groups: jnp.concatenate(groups), *ended)
        return [x for x, _ in carry], state, _all_traces(of_groups, config.num_tokens)

    def _block(
        self, block: Block, x: Float[Array, "g c d"], state: State, noise: Noise, read_only: bool
    ) -> tuple[Float[Array, "g w d"], Facts]:
        """The tokens of a group after a layer, and the facts that the rule reads; zeros for slots without a place.

        read_only: only the tokens that the heads read are computed; the others are zeros.
        """
        rule, width = self.rule, state.active.shape[1]

        def computed(x: Array) -> tuple[Array, Facts]:
            mass = rule.mass(state)
            x = drop_halted(x, state.active)
            if read_only:
                z = block.read(x, mass, state.output.shape[1])
                return jnp.pad(z, ((0, 0), (0, width - z.shape[1]), (0, 0))), {}
            branch, facts = block.attn(block.norm1(x), mass, of_attention(rule.reads))
            y = x + noise.attention(branch.astype(x.dtype))
            z = y + noise.mlp(block.norm2(y), block).astype(y.dtype)
            return z, facts | ({"before": x} if "before" in rule.reads else {})

        if x.shape[1]:
            return computed(x)
        shapes = jax.eval_shape(computed, jax.ShapeDtypeStruct((len(x), width, x.shape[2]), x.dtype))
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

    def _advanced(
        self,
        x: Float[Array, "g w d"],
        state: State,
        facts: Facts,
        read: Bool[Array, "g w"],
        number: Int[Array, ""] | int,
        read_only: bool,
    ) -> tuple[State, Trace]:
        """The rule's state of a group after a layer, from what `_block` returns."""
        model, rule = self.model, self.rule
        last = number == model.config.depth - 1
        seen = model.seen(rule, x, state.active, facts)
        state, trace = rule.advance(state, seen, layer=number, is_last=last, module=model.rule_module)
        if self.image_exit:  # drop the rest of the images whose logits are final
            going = (state.active & read).any(1, keepdims=True)
            ended = rule.finish(state, ~going)
            state = jax.tree.map(lambda a, b: jnp.where(last, a, b), state, ended)
        if read_only:  # tokens that are not computed leave no trace
            known = jnp.arange(x.shape[1]) < state.output.shape[1]
            trace = Trace(jax.tree.map(lambda v: jnp.where(known, v, 0), trace.of_tokens), trace.of_images)
        return state, trace


def _slots(state: State, width: int) -> State:
    """The state of the first slots of every image."""
    return state.mapped(lambda values: values[:, :width], lambda values: values)


def _with_slots(state: State, new: State) -> State:
    """The state with its first slots, and all of its images' fields, replaced."""
    tokens = state.active.shape[1]

    def joined(old: Array, new: Array) -> Array:
        return jnp.concatenate([new, old[:, new.shape[1] :]], axis=1)

    return State(
        active=joined(state.active, new.active),
        token_depth=joined(state.token_depth, new.token_depth),
        output=joined(state.output, new.output) if state.output.shape[1] == tokens else new.output,
        of_tokens=jax.tree.map(joined, state.of_tokens, new.of_tokens),
        of_images=new.of_images,
    )


def _all_traces(traces: list[Trace], tokens: int) -> Trace:
    """The trace [l b n] of all groups; slots that a group does not look at have none."""
    padded = [
        Trace(
            jax.tree.map(lambda v: jnp.pad(v, ((0, 0), (0, 0), (0, tokens - v.shape[2]))), trace.of_tokens),
            trace.of_images,
        )
        for trace in traces
    ]
    return jax.tree.map(lambda *groups: jnp.concatenate(groups, axis=1), *padded)
