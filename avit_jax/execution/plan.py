"""Plans of packed execution: how many images run together, and for how many tokens programs are compiled."""

import dataclasses
import math
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from avit_jax.execution.compiled import check_batch_size
from avit_jax.model.check_images import check_images
from avit_jax.model.config import AViTConfig
from avit_jax.model.vit import AViT
from avit_jax.runtime.files import read_json, write_json
from avit_jax.runtime.mesh import data_mesh, mesh_or_all_cores, replicated

# More tokens or images than any program can hold; far larger numbers would only exhaust the memory.
LARGEST = 2**20


@dataclasses.dataclass(frozen=True)
class PackedPlan:
    """How packed execution groups images. It only affects speed: the result is the same for every plan.

    Raises ValueError for numbers that cannot work.
    """

    num_tokens: int
    group_size: int  # images that run together, sorted by their number of tokens left
    capacities: tuple[int, ...]  # tokens of an image that programs are compiled for, ascending; the last is num_tokens

    def __post_init__(self) -> None:
        for name in ("num_tokens", "group_size"):
            object.__setattr__(self, name, whole_number(name, getattr(self, name)))
        if not isinstance(self.capacities, tuple | list):
            raise ValueError(f"capacities are a {type(self.capacities).__name__}: give a tuple of numbers of tokens")
        object.__setattr__(
            self, "capacities", tuple(whole_number("a capacity", capacity) for capacity in self.capacities)
        )
        rising = all(a < b for a, b in zip(self.capacities, self.capacities[1:], strict=False))
        if not self.capacities or not rising or self.capacities[-1] != self.num_tokens:
            shown = ", ".join(map(str, self.capacities[:8])) + (", ..." if len(self.capacities) > 8 else "")
            raise ValueError(f"capacities are ({shown}): they must rise from 1 or more to the {self.num_tokens} tokens")

    def fitted(self, config: AViTConfig, images: int) -> "PackedPlan":
        """The plan for this number of images on a device: no group is larger, because it would be padded.

        Raises ValueError for a plan of another model.
        """
        if self.num_tokens != config.num_tokens:
            raise ValueError(
                f"the plan is for {self.num_tokens} tokens and the model has {config.num_tokens}: make a new plan"
            )
        return dataclasses.replace(self, group_size=min(self.group_size, images))

    def __str__(self) -> str:
        return f"groups of {self.group_size} images, capacities {', '.join(map(str, self.capacities))} tokens"

    def save(self, path: str | Path) -> None:
        """Write the plan to a JSON file."""
        write_json(Path(path), dataclasses.asdict(self))

    @classmethod
    def load(cls, path: str | Path) -> "PackedPlan":
        """The plan in a file that `save` wrote. Raises ValueError, naming the file, if it is not a plan."""
        content = read_json(Path(path))
        try:
            return cls(**(content | {"capacities": tuple(content["capacities"])}))
        except (TypeError, KeyError, ValueError) as error:
            raise ValueError(f"{path} is not a plan of packed execution: {error}") from error


def whole_number(name: str, value: Any, least: int = 1) -> int:
    """A number of tokens or images as an int; ValueError for anything else, such as a bool, a float or NaN."""
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if whole and least <= value <= LARGEST:
        return int(value)
    if isinstance(value, bool | float) or (whole and abs(value) < 2**64):
        shown = str(value)
    else:
        shown = "a number of 20 digits or more" if whole else f"a {type(value).__name__}"
    raise ValueError(f"{name} is {shown}: it must be at least {least}, at most {LARGEST:,}, and a whole number")


def capacities_every(step: int, config: AViTConfig) -> tuple[int, ...]:
    """Multiples of `step` tokens up to the number of tokens, which is the last."""
    return (*range(step, config.num_tokens, step), config.num_tokens)


def default_plan(config: AViTConfig, batch_size: int, platform: str, cores: int = 1) -> PackedPlan:
    """The plan that is used when there is no sample of images to measure.

    batch_size: images on one device. platform: JAX's name, such as "cpu". cores: CPU cores of each device.
    """
    if platform == "cpu":
        # Groups of about 400 rows fill a core's matmul and stay in its cache. Cores that share one operation wait for
        # each other at its end, so each needs twice as many (benchmarks/plain_process.py).
        rows = 384 if cores == 1 else 768 * cores
        group_size = 2 ** max(0, math.ceil(math.log2(rows / config.num_tokens)))
        capacities = capacities_every(16 if config.num_tokens > 128 else 8 if config.num_tokens > 64 else 4, config)
    elif platform == "tpu":
        group_size = -(-batch_size // 8)
        # A compiled v5e block costs the same for 64 to 128 tokens, and less below 48 (benchmarks/packed_tpu.py).
        few = [capacity for capacity in (16, 32, 48) if capacity < config.num_tokens]
        capacities = (*few, *capacities_every(128, config))
    else:
        group_size, capacities = -(-batch_size // 8), capacities_every(32, config)
    return PackedPlan(config.num_tokens, min(batch_size, group_size), capacities)


def check_rule(config: AViTConfig) -> None:
    """Raises ValueError for a reduction rule, which packed execution cannot run."""
    if config.reduction is not None:
        raise ValueError(f"the rule {config.reduction.name} is for shrinking execution: use model(images)")


def plan_packed(
    model: AViT, images: Float[Array | np.ndarray, "b h w c"], batch_size: int, *, mesh: Mesh | None = None
) -> PackedPlan:
    """The plan with which this device runs a sample of images fastest: groups and capacities by measured cost.

    Times one block for several group sizes and numbers of tokens, and adds up what each plan would run for batches of
    batch_size of these images, image exit included. Among plans within 1 % of the best, it returns the one with the
    fewest capacities, which compiles fastest. images: as the model takes them. mesh: as for compile_packed; its devices
    are timed together, because they may share cores. Raises ValueError for gates, for a reduction rule, for images
    that the model does not take, and if there are fewer of them than batch_size.
    """
    config = model.config
    check_batch_size(batch_size)
    check_images(images, config)
    check_rule(config)
    if config.gates is not None:
        raise ValueError("a plan is measured for tokens that stop and the rule gates lets them return: leave plan out")
    if batch_size > len(images):
        raise ValueError(f"batch_size is {batch_size} and the sample has {len(images)} images: give at least a batch")
    mesh = mesh_or_all_cores(mesh, batch_size) or data_mesh(1)
    devices = mesh.shape["data"]
    own = -(-batch_size // devices)
    loads = np.pad(_loads(model, images, batch_size), ((0, 0), (0, 0), (0, own * devices - batch_size)))
    loads = np.concatenate(np.split(loads, devices, axis=2))
    steps = (64, 128) if jax.default_backend() == "tpu" else (4, 8, 16, 32) if config.num_tokens <= 64 else (8, 16, 32)
    sizes = [2**k for k in range(9) if 2**k <= own]
    plans = []
    for group_size in sizes:
        measured, milliseconds = _block_milliseconds(model, group_size, mesh)
        for step in steps:
            plan = PackedPlan(config.num_tokens, group_size, capacities_every(step, config))
            tokens = padded_loads(loads, plan)
            cost = np.where(tokens > 0, np.interp(tokens, measured, milliseconds), 0).sum()
            plans.append((cost, plan))
    best = min(cost for cost, _ in plans)
    near = [(len(plan.capacities), cost, plan) for cost, plan in plans if cost <= 1.01 * best]
    return min(near, key=lambda candidate: candidate[:2])[2]


def padded_loads(loads: Int[np.ndarray, "batches l b"], plan: PackedPlan) -> Int[np.ndarray, "batches l groups"]:
    """The capacity with which each group of a plan runs, from the tokens that each image needs in each layer."""
    batches, depth, batch = loads.shape
    missing = -batch % plan.group_size
    ordered = np.sort(np.pad(loads, ((0, 0), (0, 0), (missing, 0))), axis=-1)
    fullest = ordered.reshape(batches, depth, -1, plan.group_size).max(-1)
    capacities = np.array([0, *plan.capacities])
    return capacities[np.searchsorted(capacities, fullest)]


def layer_loads(token_depth: Int[np.ndarray, "b n"], config: AViTConfig, image_exit: bool) -> Int[np.ndarray, "l b"]:
    """The number of tokens that packed execution computes in each layer of each image.

    token_depth: layers by the rule, as masked execution returns them. image_exit: see compile_packed.
    """
    end = token_depth[:, np.array(config.tokens_read)].max(1, keepdims=True)
    executed = np.minimum(token_depth, end) if image_exit else token_depth
    layers = np.arange(1, config.depth + 1)[:, None, None]
    active = executed >= layers
    if config.pool == "token":  # the tokens with a head keep their slots while their image has any token left
        active[:, :, : config.num_outputs] |= active.any(2, keepdims=True)
    return active.sum(2)


def _loads(model: AViT, images: Any, batch_size: int) -> np.ndarray:
    graphdef, params = nnx.split(model)
    depths = jax.jit(lambda params, images: nnx.merge(graphdef, params)(images).token_depth)
    batches = []
    for start in range(0, len(images) - batch_size + 1, batch_size):
        token_depth = np.asarray(depths(params, images[start : start + batch_size]))
        batches.append(layer_loads(token_depth, model.config, image_exit=True))
    return np.stack(batches)


def _block_milliseconds(model: AViT, group_size: int, mesh: Mesh) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of tokens and the measured time of a block with a group of them on each device; medians of 5."""
    blocks, stacked = nnx.split(model.blocks)
    params = jax.device_put(jax.tree.map(lambda p: p[0], stacked), replicated(mesh))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    repeats = -(-4096 // (group_size * model.config.num_tokens))  # calling a small block costs more than the block

    def blocks_in_a_row(params: Any, x: Array) -> Array:
        block = nnx.merge(blocks, params)
        return jax.lax.fori_loop(0, repeats, lambda _, x: block(x, jnp.ones(x.shape[:2], bool)), x)

    run = jax.jit(blocks_in_a_row)
    tokens = np.unique(np.linspace(1, model.config.num_tokens, 7).round().astype(int))
    milliseconds = []
    for count in tokens:
        shape = (group_size * mesh.shape["data"], count, model.config.embed_dim)
        x = jax.device_put(jnp.ones(shape), rows)
        seconds = []
        for timed in [False] + [True] * 5:
            began = time.perf_counter()
            jax.block_until_ready(run(params, x))
            if timed:
                seconds.append(time.perf_counter() - began)
        milliseconds.append(1e3 * statistics.median(seconds) / repeats)
    return tokens, np.array(milliseconds)
