"""Plans of planned execution: stages of layers with shapes fixed ahead, from the tokens that a sample needs."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from avit_jax.execution.plan import layer_loads, whole_number
from avit_jax.execution.work import block_macs
from avit_jax.model.config import AViTConfig
from avit_jax.model.vit import AViT
from avit_jax.runtime.files import read_json, write_json

MOST_STAGES = 6  # each is a program of its own; compiling one takes seconds
_DRAWN_BATCHES = 2000  # with which overflow is estimated
# Moving the tokens of a stage to their new places, as a fraction of a block.
_MOVE = 0.08


@dataclasses.dataclass(frozen=True)
class Stage:
    """Layers that run with the same shapes: `capacities` tokens for each image of each group, groups by rising load."""

    first: int  # layer, from 0
    capacities: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class PlannedPlan:
    """The shapes of planned execution on one device. They decide speed, and how often a batch does not fit.

    Before each stage, images are sorted by their tokens left and cut into groups of group_size; halted tokens are gone,
    and every image of a group has the same number of places. Raises ValueError for numbers that cannot work.
    """

    num_tokens: int
    depth: int
    batch_size: int
    group_size: int
    stages: tuple[Stage, ...]

    def __post_init__(self) -> None:
        for name in ("num_tokens", "depth", "batch_size", "group_size"):
            object.__setattr__(self, name, whole_number(name, getattr(self, name)))
        firsts = [stage.first for stage in self.stages]
        if not firsts or firsts[0] != 0 or firsts != sorted(set(firsts)) or firsts[-1] >= self.depth:
            raise ValueError(f"stages begin at layers {firsts}: give rising layers from 0, below depth {self.depth}")
        for stage in self.stages:
            if len(stage.capacities) != self.groups or not all(0 <= c <= self.num_tokens for c in stage.capacities):
                raise ValueError(
                    f"the stage at layer {stage.first} has the capacities {stage.capacities}: give {self.groups} "
                    f"numbers of tokens from 0 to {self.num_tokens}, one for each group"
                )

    @property
    def groups(self) -> int:
        """The number of groups of images; the batch is padded to fill the last."""
        return -(-self.batch_size // self.group_size)

    @property
    def rows(self) -> int:
        """Images that the program computes, padding included."""
        return self.groups * self.group_size

    def ends(self) -> list[int]:
        """The layer after each stage."""
        return [*(stage.first for stage in self.stages[1:]), self.depth]

    def tokens(self) -> Int[np.ndarray, " l"]:
        """Tokens that each layer computes for the whole batch."""
        counts = np.zeros(self.depth, int)
        for stage, end in zip(self.stages, self.ends(), strict=True):
            counts[stage.first : end] = self.group_size * sum(stage.capacities)
        return counts

    def __str__(self) -> str:
        shown = "; ".join(f"from layer {s.first}: {', '.join(map(str, s.capacities))}" for s in self.stages)
        return f"groups of {self.group_size} images, tokens for each group {shown}"

    def save(self, path: str | Path) -> None:
        """Write the plan to a JSON file."""
        write_json(Path(path), dataclasses.asdict(self))

    @classmethod
    def from_json(cls, content: Any) -> "PlannedPlan":
        """The inverse of dataclasses.asdict. Raises ValueError if it is not a plan."""
        try:
            stages = tuple(
                Stage(
                    whole_number("first", s["first"], 0),
                    tuple(whole_number("a capacity", c, 0) for c in s["capacities"]),
                )
                for s in content["stages"]
            )
            return cls(**(content | {"stages": stages}))
        except (TypeError, KeyError) as error:
            raise ValueError(f"this is not a plan of planned execution: {error}") from error

    @classmethod
    def load(cls, path: str | Path) -> "PlannedPlan":
        """The plan in a file that `save` wrote. Raises ValueError, naming the file, if it is not a plan."""
        try:
            return cls.from_json(read_json(Path(path)))
        except ValueError as error:
            raise ValueError(f"{path} is not a plan of planned execution: {error}") from error


def plan(
    model: AViT,
    images: Float[Array | np.ndarray, "b h w c"],
    batch_size: int,
    *,
    image_exit: bool = True,
    margin: float = 0.02,
    most_stages: int = MOST_STAGES,
) -> PlannedPlan:
    """The plan for batches of images such as these, made so that at most 1 batch in 1,000 does not fit.

    images: a sample, as the model takes them; a few hundred are enough. batch_size: images on one device. margin:
    places added to what the drawn batches need, as a fraction. most_stages: a bound for compile time. Raises
    ValueError without images, or for a model without a halting rule.
    """
    if not model.config.halts:
        raise ValueError("planned execution is for a model with a halting rule: this one has none")
    if not len(images):
        raise ValueError("a plan is made from images: give at least one")
    depths = _depths(model, np.asarray(images))
    loads = layer_loads(depths, model.config, image_exit=image_exit)
    return plan_loads(loads, model.config, batch_size, margin=margin, most_stages=most_stages)


def plan_loads(
    loads: Int[np.ndarray, "l n"],
    config: AViTConfig,
    batch_size: int,
    *,
    margin: float = 0.02,
    most_stages: int = MOST_STAGES,
) -> PlannedPlan:
    """As `plan`, from the tokens that each layer computes of each image (execution.plan.layer_loads)."""
    rng = np.random.default_rng(0)
    drawn = rng.integers(0, loads.shape[1], (_DRAWN_BATCHES, batch_size))
    fullest = np.sort(loads[:, drawn], axis=-1).max(1)
    return plan_fullest(fullest, config, batch_size, margin=margin, most_stages=most_stages)


def plan_fullest(
    fullest: Int[np.ndarray, "l b"],
    config: AViTConfig,
    batch_size: int,
    *,
    margin: float,
    most_stages: int = MOST_STAGES,
    group_size: int | None = None,
    multiple: int = 4,
) -> PlannedPlan:
    """The plan for the fullest batch: for each layer the sorted loads of its images, rising.

    margin: see `plan`. group_size: images in a group; None: a quarter of the batch. multiple: capacities are multiples
    of it.
    """
    group_size = group_size or max(1, -(-batch_size // 4))
    groups = -(-batch_size // group_size)
    padded = np.pad(fullest, ((0, 0), (groups * group_size - batch_size, 0)))
    most = padded.reshape(len(fullest), groups, group_size).max(-1)
    wanted = np.where(most > 0, np.ceil((most * (1 + margin) + 1) / multiple) * multiple, 0)
    capacities = np.minimum(wanted, config.num_tokens).astype(int)
    cost = np.asarray(block_macs(capacities.astype(float), config.embed_dim, config.mlp_dim)).sum(-1)
    firsts = _boundaries(cost, most_stages)
    stages = tuple(Stage(first, tuple(capacities[first].tolist())) for first in firsts)
    return PlannedPlan(config.num_tokens, len(fullest), batch_size, group_size, stages)


def sorted_loads(token_depth: Int[Array, "b n"], config: AViTConfig, devices: int) -> Int[Array, "l _"]:
    """What plan_fullest takes, from one batch: the sorted loads of a device's images, the largest of all devices.

    token_depth: of the whole batch, whose images are split over the devices in order.
    """
    layers = jnp.arange(1, config.depth + 1)[:, None, None]
    active = token_depth[None] >= layers
    if config.pool == "token":  # as layer_loads, without image exit
        heads = jnp.arange(config.num_tokens) < config.num_outputs
        active |= heads & active.any(2, keepdims=True)
    loads = active.sum(2).reshape(config.depth, devices, -1)
    return jnp.sort(loads, axis=-1).max(1)


def _boundaries(cost: Float[np.ndarray, " l"], most: int) -> list[int]:
    """The first layers of at most `most` stages with the least work. cost: of a layer with the shapes of layer l."""
    depth = len(cost)

    @functools.cache
    def best(first: int, stages: int) -> tuple[float, tuple[int, ...]]:
        """The least work of the layers from `first` on, and where later stages begin."""
        options: list[tuple[float, tuple[int, ...]]] = [((depth - first) * cost[first], ())]
        if stages > 1:
            for nxt in range(first + 1, depth):
                rest, begins = best(nxt, stages - 1)
                options.append(((nxt - first) * cost[first] + _MOVE * cost[nxt] + rest, (nxt, *begins)))
        return min(options, key=lambda option: option[0])

    return [0, *best(0, most)[1]]


@functools.partial(jax.jit, static_argnums=0)
def _depth_step(graphdef: nnx.GraphDef, params: Any, images: Array) -> Array:
    return nnx.merge(graphdef, params)(images).token_depth


def _depths(model: AViT, images: np.ndarray, batch_size: int = 64) -> Int[np.ndarray, "b n"]:
    graphdef, params = nnx.split(model)
    parts = [images[first : first + batch_size] for first in range(0, len(images), batch_size)]
    return np.concatenate([np.asarray(_depth_step(graphdef, params, part)) for part in parts])
