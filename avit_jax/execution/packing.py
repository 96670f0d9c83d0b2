"""One batch through packed execution: in every layer images are sorted and packed, and run group by group."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from avit_jax.execution.places import needed_first
from avit_jax.execution.plan import PackedPlan
from avit_jax.halting.rule import State, Trace, drop_halted, first_state
from avit_jax.model.layers import Block
from avit_jax.model.output import AViTOutput
from avit_jax.model.seen import Facts, of_attention, of_tokens
from avit_jax.model.vit import AViT


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Packed:
    """The batch between two layers: images sorted by load, and in each image the tokens to compute first."""

    tokens: Float[Array, "b n d"]  # slots after the active tokens are never read
    state: State  # in the same order
    index: Int[Array, "b n"]  # position in its image of each slot's token
    image: Int[Array, " b"]  # position in the batch of each row's image


def load(state: State) -> tuple[Bool[Array, "b n"], Int[Array, " b"]]:
    """The slots to compute, and their number: active tokens, and tokens with a head if the image has active tokens."""
    num_tokens, num_outputs = state.active.shape[1], state.output.shape[1]
    needed = state.active
    if num_outputs < num_tokens:
        with_head = jnp.arange(num_tokens)[None] < num_outputs
        needed = (needed | with_head) & needed.any(1, keepdims=True)
    return needed, needed.sum(1)


def _reordered(state: State, rows: Array, slots: Array) -> State:
    """The state of the images in `rows`, the slots of each in another order."""

    def by_slot(values: Array) -> Array:
        return values[rows[:, None], slots] if values.ndim > 2 else jnp.take_along_axis(values[rows], slots, axis=1)

    return state.mapped(by_slot, lambda values: values[rows])


def _run_layer(
    packed: _Packed, plan: PackedPlan, compute: Callable[[Array, Array], tuple[Array, Facts]], width: int
) -> tuple[Array, Facts, _Packed]:
    """Sort and pack the images and run `compute` group by group; returns [B, width] tokens, their facts, their order.

    compute(tokens [g, c, D], active [g, c]) returns the first tokens of each image of the group after the layer, and
    facts of these tokens.
    """
    needed, counts = load(packed.state)
    rows = jnp.argsort(counts)
    slots = needed_first(needed[rows])
    state = _reordered(packed.state, rows, slots)
    index = jnp.take_along_axis(packed.index[rows], slots, axis=1)
    capacities = jnp.asarray(plan.capacities)

    def branch(capacity: int) -> Callable[..., tuple[Array, Facts]]:
        def fitted(values: Array) -> Array:
            missing = width - min(capacity, width)
            return jnp.pad(values[:, :width], ((0, 0), (0, missing), *[(0, 0)] * (values.ndim - 2)))

        def run(rows: Array, slots: Array, active: Array) -> tuple[Array, Facts]:
            # Gathering inside the branch moves only as many tokens as its capacity.
            tokens = packed.tokens[rows[:, None], slots[:, :capacity]]
            active = active[:, :capacity]
            return jax.tree.map(fitted, compute(drop_halted(tokens, active), active))

        return run

    def nothing(*inputs: Array) -> tuple[Array, Facts]:
        shapes = jax.eval_shape(branch(plan.capacities[-1]), *inputs)
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

    branches = [nothing, *(branch(capacity) for capacity in plan.capacities)]

    def group(inputs: tuple[Array, ...]) -> tuple[Array, Facts]:
        rows, slots, active, load = inputs
        most = load.max()
        choice = jnp.where(most == 0, 0, 1 + jnp.searchsorted(capacities, most))
        return jax.lax.switch(choice, branches, rows, slots, active)

    grouped = jax.tree.map(
        lambda x: x.reshape(-1, plan.group_size, *x.shape[1:]), (rows, slots, state.active, counts[rows])
    )
    tokens, facts = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), jax.lax.map(group, grouped))
    return tokens, facts, _Packed(packed.tokens, state, index, packed.image[rows])


def forward(
    model: AViT, images: Float[Array, "b h w c"], count: Int[Array, ""], plan: PackedPlan, image_exit: bool
) -> AViTOutput:
    """The model's output for the first `count` images; the rest are empty and cost nothing.

    plan, image_exit: see compile_packed.
    """
    config, rule = model.config, model.config.halting
    x = model.embed(images)
    batch, num_tokens, dim = x.shape
    missing = -batch % plan.group_size
    x = jnp.pad(x, ((0, missing), (0, 0), (0, 0)))
    rows = batch + missing
    if rule is None:
        state = first_state(rows, num_tokens, config.num_outputs, dim)
    else:
        draw = model.draw(rule, jnp.pad(images, ((0, missing), (0, 0), (0, 0), (0, 0)))) if rule.draws else None
        state = rule.initial(rows, config, draw)
    state = dataclasses.replace(state, active=jnp.broadcast_to((jnp.arange(rows) < count)[:, None], (rows, num_tokens)))
    index = jnp.broadcast_to(jnp.arange(num_tokens), (rows, num_tokens))
    packed = _Packed(x, state, index, jnp.arange(rows))
    blocks, stacked = nnx.split(model.blocks)
    tokens_read = jnp.array(config.tokens_read)
    reads = rule.reads if rule else frozenset()

    def computed(block: Block, tokens: Array, active: Array) -> tuple[Array, Facts]:
        y, facts = block.attend(tokens, active, reads=of_attention(reads))
        return block.transform(y), facts | ({"before": tokens} if "before" in reads else {})

    def read(block: Block, tokens: Array, active: Array) -> tuple[Array, Facts]:
        return block.read(tokens, active, config.num_outputs), {}

    def advanced(packed: _Packed, tokens: Array, facts: Facts, layer: Any, last: bool) -> tuple[_Packed, Trace]:
        state = packed.state
        if rule is None:
            output = jnp.where(last, tokens[:, : config.num_outputs], 0)
            state, trace = (
                dataclasses.replace(state, token_depth=state.token_depth + state.active, output=output),
                Trace(),
            )
        else:
            seen = model.seen(rule, state.active, facts | of_tokens(tokens, config.num_outputs))
            state, trace = rule.advance(state, seen, layer=layer, is_last=last, module=model.rule_module)
            if image_exit and not last:  # drop the rest of the images whose logits are final
                going = (state.active & tokens_read[packed.index]).any(1, keepdims=True)
                state = rule.finish(state, ~going)
        return dataclasses.replace(packed, tokens=tokens, state=state), trace

    def block_at(layer: Any) -> Block:
        # One layer's slice at a time: stacked[:-1] would copy nearly all weights in every call.
        return nnx.merge(blocks, jax.tree.map(lambda p: p[layer], stacked))

    def layer(packed: _Packed, index: Array) -> tuple[_Packed, tuple[Trace, Array, Array]]:
        tokens, facts, packed = _run_layer(packed, plan, functools.partial(computed, block_at(index)), num_tokens)
        packed, trace = advanced(packed, tokens, facts, index, last=False)
        return packed, (trace, packed.index, packed.image)

    packed, passed = jax.lax.scan(layer, packed, jnp.arange(config.depth - 1))
    end = config.depth - 1
    short = image_exit and config.pool == "token" and not (rule is not None and rule.reads_last_layer)
    width = config.num_outputs if short else num_tokens
    compute = functools.partial(read if short else computed, block_at(end))
    tokens, facts, packed = _run_layer(packed, plan, compute, width)
    tokens = jnp.pad(tokens, ((0, 0), (0, num_tokens - width), (0, 0)))
    packed, trace = advanced(packed, tokens, facts, end, last=True)
    # A short last layer computes no trace for the other tokens.
    known = jnp.arange(num_tokens)[None] < width
    trace = Trace({name: jnp.where(known, values, 0) for name, values in trace.of_tokens.items()}, trace.of_images)
    last_layer = trace, packed.index, packed.image
    trace, order, image = jax.tree.map(lambda a, b: jnp.concatenate([a, b[None]]), passed, last_layer)
    return _unpacked(model, packed, trace, order, image, batch)


def _unpacked(model: AViT, packed: _Packed, trace: Trace, index: Array, image: Array, batch: int) -> AViTOutput:
    """The output in the original order of images and tokens; trace, index and image are of all layers."""

    def by_token(values: Array, index: Array, image: Array) -> Array:
        return jnp.zeros_like(values).at[image[:, None], index].set(values, unique_indices=True)[:batch]

    def by_image(values: Array, image: Array) -> Array:
        return jnp.zeros_like(values).at[image].set(values, unique_indices=True)[:batch]

    state = packed.state.mapped(
        lambda values: by_token(values, packed.index, packed.image), lambda values: by_image(values, packed.image)
    )
    trace = Trace(
        {name: jax.vmap(by_token)(values, index, image) for name, values in trace.of_tokens.items()},
        {name: jax.vmap(by_image)(values, image) for name, values in trace.of_images.items()},
    )
    return model.output(model.config.halting, state, trace)
