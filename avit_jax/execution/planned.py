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
from avit_jax.model.attention import Mass
from avit_jax.model.layers import Block, checkpointed, layer_weights, split_layers
from avit_jax.model.output import AViTOutput
from avit_jax.model.seen import Facts, of_attention, of_tokens
from avit_jax.model.vit import AViT

# With more tokens in a group on average, attention's linear layers run group by group too: the products are large
# enough, and a TPU need not cut their result.
_LARGE = 2048


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
    layout = Layout.of(plan.group_size, (config.num_tokens,) * plan.groups)
    overflow = jnp.zeros((), bool)
    index = jnp.broadcast_to(jnp.arange(config.num_tokens), (plan.rows, config.num_tokens))
    image = jnp.arange(plan.rows)
    read = jnp.broadcast_to(jnp.asarray(config.tokens_read), index.shape)
    capacities, moved, traces = (config.num_tokens,) * plan.groups, False, []
    least = state.output.shape[1] % config.num_tokens  # the heads' tokens have places wherever an image has
    lengths = [end - stage.first for stage, end in zip(plan.stages, plan.ends(), strict=True)]
    stacked = split_layers(nnx.state(model.blocks), lengths)
    for stage, end, weights in zip(plan.stages, plan.ends(), stacked, strict=True):
        if stage.capacities != capacities:  # not where the first layers have all places, so that nothing moves
            capacities = stage.capacities
            new = Layout.of(plan.group_size, [max(c, least) if c else 0 for c in capacities])
            needed, _ = load(state)
            move = Move.packing(needed)
            overflow |= (needed.sum(1)[move.rows] > np.repeat(capacities, plan.group_size)).any()
            x, state = move.tokens(x, layout, new), move.state(state)
            index, read, image = move.apply(index), move.apply(read), move.apply_rows(image)
            moved, layout = True, new
        x, state, trace = layers.stage(weights, x, layout, state, index, image, read, stage.first, end)
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
    """The layers of a model. Attention runs group by group; all else takes the tokens of all groups at once."""

    model: AViT
    rule: Halting
    key: PRNGKeyArray | None
    batch: int  # images of this device, without the rows that fill the last group
    rows: _Rows
    image_exit: bool

    def stage(
        self,
        weights: Any,
        x: Float[Array, "*t d"],
        layout: Layout,
        state: State,
        index: Int[Array, "b n"],
        image: Int[Array, " b"],
        read: Bool[Array, "b n"],
        first: int,
        end: int,
    ) -> tuple[Float[Array, "*t d"], State, Trace]:
        """Layers first to end - 1 with the same places; the trace [l b n] is in the order of `image` and `index`.

        weights: of these layers, stacked. x: the tokens of `layout`. read: tokens that the logits read.
        """
        config = self.model.config
        graphdef, everything = nnx.split(self.model.blocks)
        everything = jax.lax.stop_gradient(everything)
        rates = jnp.linspace(0, config.drop_path_rate, config.depth) if self.key is not None else None
        # The losses of training read the scores of all tokens, and some rules need the whole last layer.
        short = self.image_exit and config.pool == "token" and not self.rule.reads_last_layer
        own = self.rows.first + jnp.minimum(image, self.batch - 1)  # rows that fill the last group: any image
        # The rule looks at no more slots than the fullest group has places.
        width = max(*layout.capacities, config.num_outputs % config.num_tokens, 1)

        def layer(carry: Any, inputs: Any, read_only: bool = False) -> tuple[Any, Trace]:
            (x, state), (part, number, rate) = carry, inputs
            block = nnx.merge(graphdef, layer_weights(part, everything, number))
            if read_only:
                facts = self._read(block, x, layout, state)
            else:
                noise = Noise.of_layer(config, block, self.key, number, rate, self.rows.total)
                x, facts = self._block(block, x, layout, state, noise.of(own, index, layout))
            state, trace = self._advanced(state, facts, read[:, :width], number, read_only)
            return (x, state), trace

        stop = end - 1 if short and end == config.depth else end
        carry, traces = (x, state.mapped(lambda values: values[:, :width], lambda values: values)), []
        if stop > first:
            scanned = jax.tree.map(lambda p: p[: stop - first], weights) if stop < end else weights
            inputs = scanned, jnp.arange(first, stop), None if rates is None else rates[first:stop]
            carry, trace = jax.lax.scan(checkpointed(layer, config), carry, inputs)
            traces.append(trace)
        if stop < end:
            params = jax.tree.map(lambda p: p[-1], weights)
            carry, trace = layer(carry, (params, stop, None), read_only=True)
            traces.append(jax.tree.map(lambda v: v[None], trace))
        trace = jax.tree.map(lambda *layers: jnp.concatenate(layers), *traces)
        none = ((0, 0), (0, 0), (0, config.num_tokens - width))
        of_tokens = jax.tree.map(lambda v: jnp.pad(v, none), trace.of_tokens)
        x, near = carry
        return x, _with_slots(state, near), Trace(of_tokens, trace.of_images)

    def _block(
        self, block: Block, x: Float[Array, "*t d"], layout: Layout, state: State, noise: Noise
    ) -> tuple[Float[Array, "*t d"], Facts]:
        """The tokens after a layer, and the facts, with zeros for slots without a place."""
        reads, width = self.rule.reads, state.active.shape[1]

        def attended(columns: Array, mass: Mass) -> tuple[Array, Facts]:
            if columns.shape[1]:
                return block.attn.attended(columns, mass, of_attention(reads))
            some = jax.ShapeDtypeStruct((len(columns), 1, columns.shape[2]), columns.dtype)
            shapes = jax.eval_shape(lambda c: block.attn.attended(c, None, of_attention(reads)), some)
            return jax.tree.map(lambda v: jnp.zeros((len(v), 0, *v.shape[2:]), v.dtype), shapes)

        x = drop_halted(x, layout.of_tokens(state.active))
        normed, columns, proj = block.norm1(x), block.attn.columns, block.attn.proj
        each = sum(layout.sizes) > _LARGE * len(layout.sizes)
        parts = map(columns, layout.split(normed)) if each else layout.split(columns(normed))
        mixed, of_groups = zip(*map(attended, parts, self._masses(layout, state)), strict=True)
        branch = layout.joined(list(map(proj, mixed))) if each else proj(layout.joined(list(mixed)))
        y = x + noise.attention(branch.astype(x.dtype))
        z = y + noise.mlp(block.norm2(y), block).astype(y.dtype)

        def slots(values: Array) -> Array:
            return layout.slots(layout.split(values), width)

        config = self.model.config
        some = config.num_outputs < config.num_tokens
        outputs = layout.first(z, config.num_outputs) if some else slots(z)
        facts = {name: layout.slots([found[name] for found in of_groups], width) for name in of_groups[0]}
        whole = {name: slots(values) for name, values in (("before", x), ("tokens", z)) if name in reads}
        return z, facts | whole | {"outputs": outputs, "gate": slots(z[..., 0])}

    def _read(self, block: Block, x: Float[Array, "*t d"], layout: Layout, state: State) -> Facts:
        """The facts of a layer of which only the tokens that the heads read are computed; the others are zeros."""
        heads = self.model.config.num_outputs

        def read(part: Array, mass: Mass) -> Array:
            return block.read(part, mass, heads) if part.shape[1] else part

        parts = layout.split(drop_halted(x, layout.of_tokens(state.active)))
        outputs = list(map(read, parts, self._masses(layout, state)))
        return of_tokens(layout.slots(outputs, state.active.shape[1]), heads)

    def _masses(self, layout: Layout, state: State) -> list[Mass]:
        """The mass of each group's keys."""
        mass = self.rule.mass(state)
        return [None] * len(layout.sizes) if mass is None else list(layout.cut(mass))

    def _advanced(
        self, state: State, facts: Facts, read: Bool[Array, "b w"], number: Int[Array, ""] | int, read_only: bool
    ) -> tuple[State, Trace]:
        """The rule's state after a layer, from the facts of its tokens."""
        model, rule = self.model, self.rule
        last = number == model.config.depth - 1
        seen = model.seen(rule, state.active, facts)
        state, trace = rule.advance(state, seen, layer=number, is_last=last, module=model.rule_module)
        if self.image_exit:  # drop the rest of the images whose logits are final
            going = (state.active & read).any(1, keepdims=True)
            ended = rule.finish(state, ~going)
            state = jax.tree.map(lambda a, b: jnp.where(last, a, b), state, ended)
        if read_only:  # tokens that are not computed leave no trace
            known = jnp.arange(state.active.shape[1]) < state.output.shape[1]
            trace = Trace(jax.tree.map(lambda v: jnp.where(known, v, 0), trace.of_tokens), trace.of_images)
        return state, trace


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
