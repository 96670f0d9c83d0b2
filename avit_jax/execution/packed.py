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
from jaxtyping import Array, Bool, Float, Int, Shaped

from avit_jax.execution.plan import PackedPlan, default_plan
from avit_jax.halting import avit as halting
from avit_jax.model.layers import Block
from avit_jax.model.vit import AViT, AViTOutput, check_images


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Packed:
    """The batch between two layers; images sorted by load, each image's tokens that still count first."""

    tokens: Float[Array, "b n d"]  # whatever lies behind the active ones is never read
    state: halting.HaltingState  # in the same order
    index: Int[Array, "b n"]  # where each slot's token lies in its image
    image: Int[Array, " b"]  # where each row's image lies in the batch


def _load(state: halting.HaltingState) -> tuple[Bool[Array, "b n"], Int[Array, " b"]]:
    """Slots that must be computed, and their number: active tokens, and those with a head while their image has any."""
    num_tokens, num_outputs = state.active.shape[1], state.output.shape[1]
    needed = state.active
    if num_outputs < num_tokens:
        with_head = jnp.arange(num_tokens)[None] < num_outputs
        needed = (needed | with_head) & needed.any(1, keepdims=True)
    return needed, needed.sum(1)


def _by_token(state: halting.HaltingState, rows: Array, slots: Array) -> halting.HaltingState:
    """The state of other rows, their slots in another order."""
    ordered = {
        field.name: jnp.take_along_axis(getattr(state, field.name)[rows], slots, axis=1)
        for field in dataclasses.fields(state)
        if field.name != "output"
    }
    # Where only the first tokens have an output, these stay in front.
    whole = state.output.shape[1] == slots.shape[1]
    output = state.output[rows[:, None], slots] if whole else state.output[rows]
    return halting.HaltingState(output=output, **ordered)


def _run_layer(
    packed: _Packed, plan: PackedPlan, compute: Callable[[Array, Array], Array], width: int
) -> tuple[Array, _Packed]:
    """Tokens after `compute`, [B, width, D], and what they belong to: sorted, packed, group by group.

    compute(tokens [g, c, D], active [g, c]) gives the first rows of the group's tokens after the layer.
    """
    needed, load = _load(packed.state)
    rows = jnp.argsort(load)
    # The needed slots first, both in their order: a stable argsort of ~needed, six times as fast on a CPU.
    places = jnp.arange(needed.shape[1])
    slots = jnp.sort(jnp.where(needed[rows], places, places + len(places)), axis=1) % len(places)
    state = _by_token(packed.state, rows, slots)
    index = jnp.take_along_axis(packed.index[rows], slots, axis=1)
    batch, _, dim = packed.tokens.shape
    capacities = jnp.asarray(plan.capacities)

    def branch(capacity: int) -> Callable[..., Array]:
        def run(rows: Array, slots: Array, active: Array) -> Array:
            if capacity == 0:
                return jnp.zeros((plan.group_size, width, dim), packed.tokens.dtype)
            # The gather is in here: it moves no more than this capacity's tokens.
            tokens = packed.tokens[rows[:, None], slots[:, :capacity]]
            active = active[:, :capacity]
            result = compute(halting.drop_halted(tokens, active), active)[:, :width]
            return jnp.pad(result, ((0, 0), (0, width - result.shape[1]), (0, 0)))

        return run

    branches = [branch(0), *(branch(capacity) for capacity in plan.capacities)]

    def group(inputs: tuple[Array, ...]) -> Array:
        rows, slots, active, load = inputs
        most = load.max()
        choice = jnp.where(most == 0, 0, 1 + jnp.searchsorted(capacities, most))
        return jax.lax.switch(choice, branches, rows, slots, active)

    grouped = jax.tree.map(
        lambda x: x.reshape(-1, plan.group_size, *x.shape[1:]), (rows, slots, state.active, load[rows])
    )
    tokens = jax.lax.map(group, grouped).reshape(batch, width, dim)
    return tokens, _Packed(packed.tokens, state, index, packed.image[rows])


def _exit_images(state: halting.HaltingState, read: Bool[Array, "b n"]) -> halting.HaltingState:
    """Drop what is left of the images in which all the tokens that the logits read have halted."""
    going = (state.active & read).any(1, keepdims=True)
    dropped = state.active & ~going
    return dataclasses.replace(
        state,
        active=state.active & going,
        # They weigh what is left of them, as where a token stops by itself.
        ponder_cost=state.ponder_cost + jnp.where(dropped, state.remainder, 0),
    )


def _forward(
    model: AViT, images: Float[Array, "b h w c"], count: Int[Array, ""], plan: PackedPlan, image_exit: bool
) -> AViTOutput:
    """The model's output for the first `count` images; the rest are empty and cost nothing."""
    config = model.config
    x = model.embed(images)
    batch, num_tokens, dim = x.shape
    missing = -batch % plan.group_size
    x = jnp.pad(x, ((0, missing), (0, 0), (0, 0)))
    rows = batch + missing
    state = halting.initial_state(rows, num_tokens, config.num_outputs, dim)
    state = dataclasses.replace(state, active=jnp.broadcast_to((jnp.arange(rows) < count)[:, None], (rows, num_tokens)))
    index = jnp.broadcast_to(jnp.arange(num_tokens), (rows, num_tokens))
    packed = _Packed(x, state, index, jnp.arange(rows))
    blocks, stacked = nnx.split(model.blocks)
    tokens_read = jnp.array(config.tokens_read)

    def advanced(packed: _Packed, tokens: Array, last: bool) -> tuple[_Packed, Array]:
        state = packed.state
        if config.halts:
            state, scores = halting.advance(state, tokens, **vars(config.halting), is_last=last)
            if image_exit and not last:
                state = _exit_images(state, tokens_read[packed.index])
        else:
            depth = state.token_depth + state.active
            output = jnp.where(last, tokens[:, : config.num_outputs], 0)
            state = dataclasses.replace(state, token_depth=depth, ponder_cost=depth + 1.0, output=output)
            scores = jnp.zeros(state.active.shape)
        return dataclasses.replace(packed, tokens=tokens, state=state), scores

    def block_at(layer: Any) -> Block:
        # One layer's slice at a time: stacked[:-1] would copy nearly all weights in every call.
        return nnx.merge(blocks, jax.tree.map(lambda p: p[layer], stacked))

    def layer(packed: _Packed, index: Array) -> tuple[_Packed, tuple[Array, Array, Array]]:
        tokens, packed = _run_layer(packed, plan, block_at(index), num_tokens)
        packed, scores = advanced(packed, tokens, last=False)
        return packed, (scores, packed.index, packed.image)

    packed, traces = jax.lax.scan(layer, packed, jnp.arange(config.depth - 1))
    last = block_at(config.depth - 1)
    if image_exit and config.pool == "token":
        read = functools.partial(last.read, queries=config.num_outputs)
        tokens, packed = _run_layer(packed, plan, read, config.num_outputs)
        tokens = jnp.pad(tokens, ((0, 0), (0, num_tokens - config.num_outputs), (0, 0)))
        packed, scores = advanced(packed, tokens, last=True)
        # Nothing is known of the other tokens' last channel 0.
        scores = jnp.where(jnp.arange(num_tokens)[None] < config.num_outputs, scores, 0)
    else:
        tokens, packed = _run_layer(packed, plan, last, num_tokens)
        packed, scores = advanced(packed, tokens, last=True)
    scores, index, image = (
        jnp.concatenate([trace, end[None]])
        for trace, end in zip(traces, (scores, packed.index, packed.image), strict=True)
    )
    return _unpacked(model, packed, scores, index, image, batch)


def _unpacked(model: AViT, packed: _Packed, scores: Array, index: Array, image: Array, batch: int) -> AViTOutput:
    """The output in the order of the images and their tokens."""
    state = packed.state

    def restored(values: Array, index: Array, image: Array) -> Array:
        return jnp.zeros_like(values).at[image[:, None], index].set(values, unique_indices=True)[:batch]

    if state.output.shape[1] == state.active.shape[1]:
        outputs = restored(state.output, packed.index, packed.image)
    else:
        outputs = jnp.zeros_like(state.output).at[packed.image].set(state.output, unique_indices=True)[:batch]
    return model.heads(
        outputs,
        restored(state.token_depth, packed.index, packed.image),
        restored(state.ponder_cost, packed.index, packed.image),
        jax.vmap(restored)(scores, index, image),
    )


class PackedModel:
    """A model compiled for packed execution of up to `batch_size` images, which it is called with.

    `jax.export.export(packed.jitted)(*packed.abstract_arguments)` is the program as something to serialise: it takes
    packed.params, images and how many of them count.
    """

    def __init__(self, model: AViT, batch_size: int, plan: PackedPlan, image_exit: bool, mesh: Mesh | None) -> None:
        self.config = model.config
        self.batch_size = batch_size
        devices = 1 if mesh is None else mesh.shape["data"]
        # A group never has more images than there are: padding it would cost memory and time.
        self.plan = plan = dataclasses.replace(plan, group_size=min(plan.group_size, -(-batch_size // devices)))
        graphdef, state = nnx.split(model)
        # Plain dicts can be exported. JAX's arrays never change, NumPy's may.
        params = jax.tree.map(lambda p: p if isinstance(p, jax.Array) else jnp.array(p), nnx.to_pure_dict(state))
        self.params = jax.device_put(params, NamedSharding(mesh, PartitionSpec())) if mesh is not None else params
        self._images = NamedSharding(mesh, PartitionSpec("data")) if mesh is not None else None
        self.jitted = jax.jit(packed_program(graphdef, plan, image_exit, mesh))
        self._rows = -(-batch_size // devices) * devices
        shape = (self._rows, *self.config.image_shape, self.config.in_channels)
        abstract = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=self._images)
        self.abstract_arguments = (self.params, abstract, jnp.int32(batch_size))  # for lower and jax.export
        self.compiled = self.jitted.lower(*self.abstract_arguments).compile()
        self._halting_seen = not self.config.halts or self.config.depth == 1

    def __call__(self, images: Shaped[Array | np.ndarray, "..."]) -> AViTOutput:
        """The output for each image. Raises ValueError for other images than the model takes, or too many of them."""
        check_images(images, self.config)
        count = len(images)
        if count > self.batch_size:
            raise ValueError(
                f"{count} images for a program compiled for {self.batch_size}: compile_packed(model, {count})"
            )
        if count < self._rows:
            pad = np.pad if isinstance(images, np.ndarray) else jnp.pad
            images = pad(images, ((0, self._rows - count), (0, 0), (0, 0), (0, 0)))
        if self._images is not None:
            images = jax.device_put(images, self._images)
        # A compiled program takes no tracers, and does not run where jit is off.
        no_jit = jax.config.jax_disable_jit  # type: ignore[attr-defined]
        as_function = no_jit or isinstance(images, jax.core.Tracer)
        if as_function:
            output = self.jitted(self.params, jnp.asarray(images), jnp.int32(count))
        else:
            output = self.compiled(self.params, images, np.int32(count))
        if count < self._rows:
            output = self._first(output, count)
        if not self._halting_seen and not as_function and count:
            self._say_whether_it_halts(output)
        return output

    def _say_whether_it_halts(self, output: AViTOutput) -> None:
        """One line where the first images show that nothing is saved."""
        self._halting_seen = True
        if output.token_depth.is_fully_addressable and (np.asarray(output.token_depth) == self.config.depth).all():
            print(
                "packed execution saves nothing: no token of the first images halted before the last layer; "
                "avit_jax.start_gate(model, images, target_depth=...) or fine-tuning makes tokens halt"
            )

    def _first(self, output: AViTOutput, count: int) -> AViTOutput:
        """The output of the first `count` images."""
        return AViTOutput(
            output.logits[:count],
            output.head_logits[:, :count],
            output.token_depth[:count],
            output.ponder_cost[:count],
            output.halting_scores[:, :count],
        )


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
    devices = 1 if mesh is None else mesh.shape["data"]
    plan = plan or default_plan(model.config, -(-batch_size // devices), jax.default_backend())
    if plan.num_tokens != model.config.num_tokens:
        raise ValueError(
            f"the plan is for {plan.num_tokens} tokens and the model has {model.config.num_tokens}: plan anew"
        )
    return PackedModel(model, batch_size, plan, image_exit, mesh)
