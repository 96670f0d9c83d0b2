"""Packed execution: halted tokens are gone, in one jitted program with static shapes and no trip to the host.

In every layer each image's active tokens are moved to the front, images are sorted by how many they have, and groups
of images run through the smallest of a few static capacities that holds them.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from avit_jax.execution.compiled import CompiledModel, split_model
from avit_jax.execution.plan import PackedPlan, default_plan, layer_loads, padded_loads
from avit_jax.execution.work import Executed, packed_gmacs
from avit_jax.halting.rule import State, Trace, drop_halted, first_state
from avit_jax.model.layers import Block
from avit_jax.model.output import AViTOutput
from avit_jax.model.seen import WHOLE_LAYER, Facts, of_attention
from avit_jax.model.vit import AViT


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Packed:
    """The batch between two layers; images sorted by load, each image's tokens that still count first."""

    tokens: Float[Array, "b n d"]  # whatever lies behind the active ones is never read
    state: State  # in the same order
    index: Int[Array, "b n"]  # where each slot's token lies in its image
    image: Int[Array, " b"]  # where each row's image lies in the batch


def _load(state: State) -> tuple[Bool[Array, "b n"], Int[Array, " b"]]:
    """Slots that must be computed, and their number: active tokens, and those with a head while their image has any."""
    num_tokens, num_outputs = state.active.shape[1], state.output.shape[1]
    needed = state.active
    if num_outputs < num_tokens:
        with_head = jnp.arange(num_tokens)[None] < num_outputs
        needed = (needed | with_head) & needed.any(1, keepdims=True)
    return needed, needed.sum(1)


def _reordered(state: State, rows: Array, slots: Array) -> State:
    """The state of the images in `rows`, the slots of each in another order."""

    def by_slot(values: Array) -> Array:
        return jnp.take_along_axis(values[rows], slots, axis=1)

    # Where only the first tokens have an output, these stay in front.
    whole = state.output.shape[1] == slots.shape[1]
    return State(
        active=by_slot(state.active),
        token_depth=by_slot(state.token_depth),
        output=state.output[rows[:, None], slots] if whole else state.output[rows],
        of_tokens={name: by_slot(values) for name, values in state.of_tokens.items()},
        of_images={name: values[rows] for name, values in state.of_images.items()},
    )


def _run_layer(
    packed: _Packed, plan: PackedPlan, compute: Callable[[Array, Array], tuple[Array, Facts]], width: int
) -> tuple[Array, Facts, _Packed]:
    """What `compute` gives for [B, width] tokens, and what they belong to: sorted, packed, group by group.

    compute(tokens [g, c, D], active [g, c]) gives the first rows of the group's tokens after the layer, and facts of
    these rows.
    """
    needed, load = _load(packed.state)
    rows = jnp.argsort(load)
    # The needed slots first, both in their order: a stable argsort of ~needed, six times as fast on a CPU.
    places = jnp.arange(needed.shape[1])
    slots = jnp.sort(jnp.where(needed[rows], places, places + len(places)), axis=1) % len(places)
    state = _reordered(packed.state, rows, slots)
    index = jnp.take_along_axis(packed.index[rows], slots, axis=1)
    capacities = jnp.asarray(plan.capacities)

    def branch(capacity: int) -> Callable[..., tuple[Array, Facts]]:
        def fitted(values: Array) -> Array:
            missing = width - min(capacity, width)
            return jnp.pad(values[:, :width], ((0, 0), (0, missing), *[(0, 0)] * (values.ndim - 2)))

        def run(rows: Array, slots: Array, active: Array) -> tuple[Array, Facts]:
            # The gather is in here: it moves no more than this capacity's tokens.
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
        lambda x: x.reshape(-1, plan.group_size, *x.shape[1:]), (rows, slots, state.active, load[rows])
    )
    tokens, facts = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), jax.lax.map(group, grouped))
    return tokens, facts, _Packed(packed.tokens, state, index, packed.image[rows])


def _forward(
    model: AViT, images: Float[Array, "b h w c"], count: Int[Array, ""], plan: PackedPlan, image_exit: bool
) -> AViTOutput:
    """The model's output for the first `count` images; the rest are empty and cost nothing."""
    config, rule = model.config, model.config.halting
    x = model.embed(images)
    batch, num_tokens, dim = x.shape
    missing = -batch % plan.group_size
    x = jnp.pad(x, ((0, missing), (0, 0), (0, 0)))
    rows = batch + missing
    state = rule.initial(rows, config) if rule else first_state(rows, num_tokens, config.num_outputs, dim)
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
            seen = model.seen(rule, tokens, state.active, facts)
            state, trace = rule.advance(state, seen, layer=layer, is_last=last, module=model.rule_module)
            if image_exit and not last:  # what is left of the images whose logits are known
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
    # A rule that looks into attention needs all of the last layer.
    short = image_exit and config.pool == "token" and not reads & WHOLE_LAYER
    width = config.num_outputs if short else num_tokens
    compute = functools.partial(read if short else computed, block_at(end))
    tokens, facts, packed = _run_layer(packed, plan, compute, width)
    tokens = jnp.pad(tokens, ((0, 0), (0, num_tokens - width), (0, 0)))
    packed, trace = advanced(packed, tokens, facts, end, last=True)
    # Nothing is known of the other tokens' last layer.
    known = jnp.arange(num_tokens)[None] < width
    trace = Trace({name: jnp.where(known, values, 0) for name, values in trace.of_tokens.items()}, trace.of_images)
    last_layer = trace, packed.index, packed.image
    trace, order, image = jax.tree.map(lambda a, b: jnp.concatenate([a, b[None]]), passed, last_layer)
    return _unpacked(model, packed, trace, order, image, batch)


def _unpacked(model: AViT, packed: _Packed, trace: Trace, index: Array, image: Array, batch: int) -> AViTOutput:
    """The output in the order of the images and their tokens; trace, index and image are of all layers."""

    def by_token(values: Array, index: Array, image: Array) -> Array:
        return jnp.zeros_like(values).at[image[:, None], index].set(values, unique_indices=True)[:batch]

    def by_image(values: Array, image: Array) -> Array:
        return jnp.zeros_like(values).at[image].set(values, unique_indices=True)[:batch]

    def in_order(tokens: Any) -> Any:
        return jax.tree.map(lambda values: by_token(values, packed.index, packed.image), tokens)

    state = packed.state
    whole = state.output.shape[1] == state.active.shape[1]
    state = State(
        active=in_order(state.active),
        token_depth=in_order(state.token_depth),
        output=in_order(state.output) if whole else by_image(state.output, packed.image),
        of_tokens=in_order(state.of_tokens),
        of_images=jax.tree.map(lambda values: by_image(values, packed.image), state.of_images),
    )
    trace = Trace(
        {name: jax.vmap(by_token)(values, index, image) for name, values in trace.of_tokens.items()},
        {name: jax.vmap(by_image)(values, image) for name, values in trace.of_images.items()},
    )
    return model.output(state, trace)


class PackedModel(CompiledModel):
    """A model compiled for packed execution of up to `batch_size` images, which it is called with.

    `jax.export.export(packed.jitted)(*packed.abstract_arguments)` is the program as something to serialise: it takes
    packed.params, images and how many of them count.
    """

    made_by = "compile_packed"

    def __init__(self, model: AViT, batch_size: int, plan: PackedPlan, image_exit: bool, mesh: Mesh | None) -> None:
        self._devices = devices = 1 if mesh is None else mesh.shape["data"]
        # A group never has more images than there are: padding it would cost memory and time.
        self.plan = plan = dataclasses.replace(plan, group_size=min(plan.group_size, -(-batch_size // devices)))
        self._halting_seen = not model.config.halts or model.config.depth == 1
        graphdef, params = split_model(model, mesh)
        jitted = jax.jit(packed_program(graphdef, plan, image_exit, mesh))
        images = NamedSharding(mesh, PartitionSpec("data")) if mesh is not None else None
        super().__init__(model.config, batch_size, jitted, params, images, devices)

    def _arguments(self, count: int) -> tuple[np.int32]:
        return (np.int32(count),)

    def _seen(self, output: AViTOutput) -> None:
        """One line where the first images show that nothing is saved."""
        if self._halting_seen:
            return
        self._halting_seen = True
        if output.token_depth.is_fully_addressable and (np.asarray(output.token_depth) == self.config.depth).all():
            rule = self.config.halting
            print(
                "packed execution saves nothing: no token of the first images halted before the last layer; "
                f"{rule.advice if rule else ''}"
            )

    def executed(self, token_depth: Int[np.ndarray, "b n"], images: int) -> Executed:
        """What was done for the first `images` of a batch with these depths; the rest are padding, with depths of 0.

        token_depth is the rule's, as without image exit; the exit is counted, whether this program has it or not.
        """
        loads = layer_loads(token_depth, self.config, image_exit=True)
        # Each device packs its own images.
        by_device = np.stack(np.split(loads, self._devices, axis=1))
        gmacs = packed_gmacs(self.config, padded_loads(by_device, self.plan), self.plan.group_size, images)
        return Executed(int(loads.sum()), gmacs)


def packed_program(
    graphdef: nnx.GraphDef, plan: PackedPlan, image_exit: bool, mesh: Mesh | None
) -> Callable[[Any, Array, Array], AViTOutput]:
    """What compile_packed compiles: (params, images, how many of them count) -> output; for lowering elsewhere."""

    def local(params: Any, images: Array, count: Array) -> AViTOutput:
        return _forward(nnx.merge(graphdef, params), images, count, plan, image_exit)

    if mesh is None:
        return local

    names = [field.name for field in dataclasses.fields(AViTOutput)]

    def shard(params: Any, images: Array, count: Array) -> tuple[Array, ...]:
        first = jax.lax.axis_index("data") * len(images)
        output = local(params, images, jnp.clip(count - first, 0, len(images)))
        return tuple(getattr(output, name) for name in names)

    rows, second = PartitionSpec("data"), PartitionSpec(None, "data")
    sharded = jax.shard_map(
        shard,
        mesh=mesh,
        in_specs=(PartitionSpec(), rows, PartitionSpec()),
        out_specs=tuple(second if name in ("head_logits", "halting_scores") else rows for name in names),
        check_vma=False,
    )
    return lambda params, images, count: AViTOutput(**dict(zip(names, sharded(params, images, count), strict=True)))


def compile_packed(
    model: AViT,
    batch_size: int,
    plan: PackedPlan | None = None,
    *,
    image_exit: bool = True,
    mesh: Mesh | None = None,
) -> PackedModel:
    """Compile packed execution: the same predictions as model(images), halted tokens cost nothing.

    The result takes up to batch_size images and gives as many rows. With image_exit an image ends when the tokens that
    its logits read have halted (class and distillation token, or the patches of a mean): logits stay, token_depth
    counts the layers computed, and with pool "token" the last layer's scores are those of these tokens alone; without
    it depths, ponder costs and scores are those of masked execution. Logits differ from masked execution by rounding,
    about 1e-5; where a token's cumulative score lies within rounding of the threshold, it may stop one layer earlier or
    later and its image's logits differ by more (6.9e-4 was seen). The weights are those of this moment: later
    changes of the model do not reach the result. mesh: with an axis `data`, over which the batch is split; each device
    packs its own images. plan: see plan_packed; speed alone. Raises ValueError for a plan of another model, or a batch
    size below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}: it must be at least 1")
    if model.config.reduction is not None:
        raise ValueError(f"the rule {model.config.reduction.name} is for shrinking execution: use model(images)")
    devices = 1 if mesh is None else mesh.shape["data"]
    plan = plan or default_plan(model.config, -(-batch_size // devices), jax.default_backend())
    if plan.num_tokens != model.config.num_tokens:
        raise ValueError(
            f"the plan is for {plan.num_tokens} tokens and the model has {model.config.num_tokens}: plan anew"
        )
    return PackedModel(model, batch_size, plan, image_exit, mesh)
