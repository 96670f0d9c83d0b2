"""Planned execution: halted tokens are removed in stages whose shapes are fixed ahead, at inference and in training."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, Shaped

from avit_jax.execution.noise import Noise
from avit_jax.execution.packing import load
from avit_jax.execution.places import Layout, Move
from avit_jax.execution.stages import PlannedPlan
from avit_jax.halting.rule import Halting, State, Trace
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
) -> tuple[AViTOutput, Ran]:
    """The model's output with the plan's shapes, and what led to it. If `overflow` is True, all of it is wrong.

    count: images that are not padding; None: all. image_exit: an image ends when the tokens that its logits read have
    halted. key: draws dropout and stochastic depth as in masked execution; None: neither. mesh: the images are split
    over all its devices, and each packs its own; the plan is for one device.
    """
    x = model.embed(images, key)
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
    layers = _Layers(model, rule, plan, key, batch, rows, image_exit)
    layout = Layout(plan.group_size, (config.num_tokens,) * plan.groups)
    flat = x.reshape(-1, config.embed_dim)
    overflow = jnp.zeros((), bool)
    index = jnp.broadcast_to(jnp.arange(config.num_tokens), (plan.rows, config.num_tokens))
    image = jnp.arange(plan.rows)
    traces = []
    for stage, end in zip(plan.stages, plan.ends(), strict=True):
        needed, _ = load(state)
        move = Move.packing(needed)
        new = Layout(plan.group_size, stage.capacities)
        overflow |= (needed.sum(1)[move.rows] > jnp.asarray(new.of_rows()[1])).any()
        flat, state, layout = move.tokens(flat, layout, new), move.state(state), new
        index, image = move.apply(index), move.apply_rows(image)
        flat, state, trace = layers.stage(flat, state, index, image, layout, stage.first, end)
        back = _original(index, image)
        traces.append(
            Trace(
                jax.tree.map(jax.vmap(back.apply), trace.of_tokens),
                jax.tree.map(jax.vmap(back.apply_rows), trace.of_images),
            )
        )
    trace = jax.tree.map(lambda *parts: jnp.concatenate(parts)[:, :batch], *traces)
    state = jax.tree.map(lambda v: v[:batch], _original(index, image).state(state))
    return Ran(state, trace, overflow)


def _original(index: Int[Array, "b n"], image: Int[Array, " b"]) -> Move:
    """The move back to the original order. index: original position of each slot; image: original row of each row."""
    rows = jnp.argsort(image)
    return Move(rows, jnp.argsort(index[rows], axis=1), image, index[rows])


@dataclasses.dataclass(frozen=True)
class _Layers:
    """The layers of a model, run on a flat array of tokens."""

    model: AViT
    rule: Halting
    plan: PlannedPlan
    key: PRNGKeyArray | None
    batch: int  # images of this device, without the rows that fill the last group
    rows: _Rows
    image_exit: bool

    def stage(
        self, x: Array, state: State, index: Array, image: Array, layout: Layout, first: int, end: int
    ) -> tuple[Array, State, Trace]:
        """Layers first to end - 1 with one layout; the trace [l b n] is in the layout's order of images and tokens."""
        config = self.model.config
        graphdef, stacked = nnx.split(self.model.blocks)
        rates = jnp.linspace(0, config.drop_path_rate, config.depth) if self.key is not None else None
        # The losses of training read the scores of all tokens, and some rules need the whole last layer.
        short = self.image_exit and config.pool == "token" and not self.rule.reads_last_layer
        own = self.rows.first + jnp.minimum(image, self.batch - 1)  # rows that fill the last group: any image

        def layer(carry: Any, inputs: Any, read_only: bool = False) -> tuple[Any, Trace]:
            x, state = carry
            params, number, rate = inputs
            block = nnx.merge(graphdef, params)
            last = number == config.depth - 1
            active = layout.flat(state.active)
            x = jnp.where(active[:, None], x, 0)
            noise = Noise(config, self.key, number, rate, self.rows.total, own, index, layout)
            x, parts, facts = _run_block(block, x, layout, state, self.rule, noise, read_only)
            state, trace = self._advanced(state, parts, facts, index, number, last, read_only)
            return (x, state), trace

        stop = end - 1 if short and end == config.depth else end
        carry, traces = (x, state), []
        if stop > first:
            weights = jax.tree.map(lambda p: jax.lax.slice_in_dim(p, first, stop), stacked)
            inputs = weights, jnp.arange(first, stop), None if rates is None else rates[first:stop]
            carry, trace = jax.lax.scan(checkpointed(layer, config), carry, inputs)
            traces.append(trace)
        if stop < end:
            params = jax.tree.map(lambda p: p[stop], stacked)
            carry, trace = layer(carry, (params, stop, None), read_only=True)
            traces.append(jax.tree.map(lambda v: v[None], trace))
        return *carry, jax.tree.map(lambda *parts: jnp.concatenate(parts), *traces)

    def _advanced(
        self,
        state: State,
        parts: list[Array],
        facts: list[Facts],
        index: Array,
        number: Int[Array, ""] | int,
        last: Bool[Array, ""] | bool,
        read_only: bool,
    ) -> tuple[State, Trace]:
        """The rule's state after a layer. parts, facts: of each group. read_only: see _run_block."""
        model, rule = self.model, self.rule
        tokens, outputs = state.active.shape[1], state.output.shape[1]
        # Slots that no group has are not active. The heads' tokens have slots even if no image is left.
        width = tokens if read_only else max(*(part.shape[1] for part in parts), outputs % tokens, 1)
        near = _slots(state, width)
        seen = model.seen(rule, _rectangle(parts, width), near.active, _all_facts(facts, width))
        new, trace = rule.advance(near, seen, layer=number, is_last=last, module=model.rule_module)
        state = _with_slots(state, new)
        if self.image_exit:  # drop the rest of the images whose logits are final
            read = jnp.asarray(model.config.tokens_read)[index]
            going = (state.active & read).any(1, keepdims=True)
            ended = rule.finish(state, ~going)
            state = jax.tree.map(lambda a, b: jnp.where(last, a, b), state, ended)
        known = outputs if read_only else width  # tokens that are not computed leave no trace
        of_tokens = jax.tree.map(lambda v: jnp.pad(v[:, :known], ((0, 0), (0, tokens - known))), trace.of_tokens)
        return state, Trace(of_tokens, trace.of_images)


def _run_block(
    block: Block,
    x: Float[Array, "t d"],
    layout: Layout,
    state: State,
    rule: Halting,
    noise: Noise,
    read_only: bool,
) -> tuple[Float[Array, "t d"], list[Array], list[Facts]]:
    """A layer on the flat array: its tokens, flat and by group, and the facts that the rule reads, by group.

    read_only: only the tokens that the heads read; the flat array is then not used again.
    """
    masses = layout.split(layout.flat(rule.mass(state)))
    if read_only:
        outputs = state.output.shape[1]
        parts = [
            block.read(part, mass, outputs) if part.shape[1] else part
            for part, mass in zip(layout.split(x), masses, strict=True)
        ]
        return x, parts, []
    branch, facts = block.attn.of_groups(block.norm1(x), layout.split, masses, of_attention(rule.reads))
    y = x + noise.attention(branch.astype(x.dtype), block)
    z = y + noise.mlp(block.norm2(y), block).astype(y.dtype)
    if "before" in rule.reads:
        facts = [f | {"before": before} for f, before in zip(facts, layout.split(x), strict=True)]
    return z, layout.split(z), facts


def _rectangle(parts: list[Shaped[Array, "g _ ..."]], width: int) -> Shaped[Array, "b w ..."]:
    """The parts of all groups as one array, each padded to `width` tokens."""
    padded = [jnp.pad(p, ((0, 0), (0, width - p.shape[1]), *[(0, 0)] * (p.ndim - 2))) for p in parts]
    return jnp.concatenate(padded)


def _all_facts(facts: list[Facts], width: int) -> dict[str, Array]:
    """The facts of all groups. Groups without places have none; the last group has places (PlannedPlan)."""

    def of_group(known: Facts, name: str, like: Array) -> Array:
        return known.get(name, jnp.zeros((len(like), 0, *like.shape[2:]), like.dtype))

    last = facts[-1] if facts else {}
    return {name: _rectangle([of_group(f, name, like) for f in facts], width) for name, like in last.items()}


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
