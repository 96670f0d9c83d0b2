"""Plans of planned execution: stages of layers with shapes fixed ahead, from the tokens that a sample needs."""

import dataclasses
import functools
import math
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from avit_jax.execution.compiled import check_batch_size, predict
from avit_jax.execution.plan import layer_loads, whole_number
from avit_jax.execution.work import block_macs
from avit_jax.model.check_images import check_images
from avit_jax.model.config import AViTConfig
from avit_jax.model.vit import AViT
from avit_jax.runtime.files import read_json, write_json
from avit_jax.runtime.mesh import data_devices, mesh_or_all_cores

MOST_STAGES = 6  # each is a program of its own; compiling one takes seconds
_DRAWN_BATCHES = 2000  # a plan has room for all of them
GROUPS = 8  # of images
_MULTIPLE = 4  # capacities are multiples of it
_MARGIN = 0.03  # places beyond those that the drawn batches need, as a fraction
_SPREAD = 2.0  # of the noise on drawn loads, in standard deviations over the fifth root of the number of images
_MOVE = 0.08  # what moving the tokens of a stage to their new places costs, as a fraction of a block


@dataclasses.dataclass(frozen=True)
class Stage:
    """Layers that run with the same shapes: `capacities` tokens for each image of each group, groups by rising load.

    Raises ValueError for numbers that cannot work.
    """

    first: int  # layer, from 0
    capacities: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "first", whole_number("the first layer of a stage", self.first, 0))
        if not isinstance(self.capacities, tuple | list):
            raise ValueError(f"capacities are a {type(self.capacities).__name__}: give a tuple of numbers of tokens")
        object.__setattr__(self, "capacities", tuple(whole_number("a capacity", c, 0) for c in self.capacities))


@dataclasses.dataclass(frozen=True)
class PlannedPlan:
    """The shapes of planned execution on one device. They decide how fast it is and how often a batch does not fit.

    Before each stage, images are sorted by their tokens left and cut into groups of group_size. Halted tokens are gone,
    and every image of a group has the same number of places. Raises ValueError for numbers that cannot work.
    """

    num_tokens: int
    depth: int
    batch_size: int  # images on one device
    group_size: int
    stages: tuple[Stage, ...]

    def __post_init__(self) -> None:
        for name in ("num_tokens", "depth", "batch_size", "group_size"):
            object.__setattr__(self, name, whole_number(name, getattr(self, name)))
        if not isinstance(self.stages, tuple | list) or not all(isinstance(stage, Stage) for stage in self.stages):
            raise ValueError("stages must be a tuple of Stage")
        object.__setattr__(self, "stages", tuple(self.stages))
        firsts = [stage.first for stage in self.stages]
        if not firsts or firsts[0] != 0 or firsts != sorted(set(firsts)) or firsts[-1] >= self.depth:
            shown = ", ".join(map(str, firsts[:8])) + (", ..." if len(firsts) > 8 else "")
            raise ValueError(f"stages begin at layers ({shown}): give rising layers from 0, below depth {self.depth}")
        for stage in self.stages:
            wrong = len(stage.capacities) != self.groups or max(stage.capacities) > self.num_tokens
            if wrong or not stage.capacities[-1]:
                shown = ", ".join(map(str, stage.capacities[:8])) + (", ..." if len(stage.capacities) > 8 else "")
                raise ValueError(
                    f"the stage at layer {stage.first} has the capacities ({shown}): give {self.groups} numbers of "
                    f"tokens from 0 to {self.num_tokens}, one for each group, and the last at least 1"
                )

    def check(self, config: AViTConfig, images: int) -> None:
        """Raises ValueError unless the plan is for a model of this shape and this number of images on a device."""
        made_for = self.num_tokens, self.depth, self.batch_size
        if made_for != (config.num_tokens, config.depth, images):
            raise ValueError(
                f"the plan is for {self.num_tokens} tokens, {self.depth} layers and {self.batch_size} images on a "
                f"device, and this is {config.num_tokens}, {config.depth} and {images}: make a new one with "
                "avit_jax.plan"
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

    def capacities(self) -> Int[np.ndarray, "l groups"]:
        """The places of each image of each group in each layer."""
        return np.concatenate(
            [
                np.tile(stage.capacities, (end - stage.first, 1))
                for stage, end in zip(self.stages, self.ends(), strict=True)
            ]
        )

    def share(self) -> float:
        """The places of all layers, as a fraction of those that every token of every image would take."""
        return float(self.capacities().sum() * self.group_size / (self.batch_size * self.num_tokens * self.depth))

    def fits(self, loads: Int[np.ndarray, "l b"]) -> bool:
        """Whether a device's images fit. loads: tokens that each layer computes (execution.plan.layer_loads)."""
        most = group_loads(loads, self.group_size)
        return all((most[stage.first] <= stage.capacities).all() for stage in self.stages)

    def __str__(self) -> str:
        shown = "; ".join(f"from layer {s.first}: {', '.join(map(str, s.capacities))}" for s in self.stages)
        images = "1 image" if self.group_size == 1 else f"{self.group_size} images"
        return f"groups of {images}, tokens for each group {shown}"

    def save(self, path: str | Path) -> None:
        """Write the plan to a JSON file."""
        write_json(Path(path), dataclasses.asdict(self))

    @classmethod
    def from_json(cls, content: Any) -> "PlannedPlan":
        """The inverse of dataclasses.asdict. Raises ValueError if it is not a plan."""
        try:
            numbers = ("num_tokens", "depth", "batch_size", "group_size")
            stages = tuple(
                Stage(
                    whole_number("the first layer of a stage", stage["first"], 0),
                    tuple(whole_number("a capacity", capacity, 0) for capacity in stage["capacities"]),
                )
                for stage in content["stages"]
            )
            fields = {name: whole_number(name, content[name]) for name in numbers}
            return cls(**(content | fields | {"stages": stages}))
        except (TypeError, KeyError) as error:
            raise ValueError(f"it lacks a field or has one of another kind: {error}") from error

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
    margin: float = _MARGIN,
    most_stages: int = MOST_STAGES,
    groups: int = GROUPS,
    mesh: Mesh | None = None,
) -> PlannedPlan:
    """A plan with which about 1 in 1,000 batches of images such as these does not fit.

    images: a sample, as the model takes them; a few hundred are enough. batch_size, image_exit, mesh: as for
    compile_planned; the plan is for the images of one device. margin: places beyond those needed, as a fraction.
    most_stages, groups: of layers and of images; more save work and take longer to compile. Raises ValueError without
    images, and for a model without a halting rule.
    """
    config = model.config
    if config.halting is None:
        raise ValueError("planned execution is for a model with a halting rule: this one has none")
    check_batch_size(batch_size)
    check_images(images, config)
    if not len(images):
        raise ValueError("a plan is made from images: give a few hundred")
    mesh = mesh_or_all_cores(mesh, batch_size)
    own = -(-batch_size // data_devices(mesh))
    loads = layer_loads(_depths(model, np.asarray(images)), config, image_exit=image_exit)
    return plan_loads(loads, config, own, margin=margin, most_stages=most_stages, groups=groups)


def plan_loads(
    loads: Int[np.ndarray, "l n"],
    config: AViTConfig,
    batch_size: int,
    *,
    margin: float = _MARGIN,
    most_stages: int = MOST_STAGES,
    groups: int = GROUPS,
) -> PlannedPlan:
    """As `plan`, from the tokens that each layer computes of each image (execution.plan.layer_loads)."""
    if not 0 <= margin < math.inf:
        raise ValueError(f"margin is {margin}: give a fraction from 0")
    whole_number("most_stages", most_stages)
    rng = np.random.default_rng(0)
    # New images go beyond those of the sample, so images are drawn with noise (a smoothed bootstrap). Twice the usual
    # width leaves 0 to 3 of 2,000 new batches without room where it was measured, and takes 1 % more places.
    noise = _SPREAD * loads.std(1, keepdims=True) * loads.shape[1] ** -0.2
    fullest = np.zeros((len(loads), batch_size))
    for _ in range(_DRAWN_BATCHES):
        drawn = loads[:, rng.integers(0, loads.shape[1], batch_size)]
        drawn = np.where(drawn > 0, drawn + noise * rng.standard_normal(batch_size), 0)
        fullest = np.maximum(fullest, np.sort(drawn, axis=1))
    fullest = np.minimum(np.rint(fullest), config.num_tokens).astype(int)
    return plan_fullest(fullest, config, batch_size, margin=margin, most_stages=most_stages, groups=groups)


def plan_fullest(
    fullest: Int[np.ndarray, "l b"],
    config: AViTConfig,
    batch_size: int,
    *,
    margin: float,
    most_stages: int = MOST_STAGES,
    groups: int = GROUPS,
) -> PlannedPlan:
    """The plan for the fullest batch: for each layer the sorted loads of its images, rising. The rest: see `plan`."""
    group_size = -(-batch_size // whole_number("groups", groups))
    most = group_loads(fullest, group_size)
    most[:, -1] = np.maximum(most[:, -1], 1)  # a group must have places
    wanted = np.where(most > 0, np.ceil((most * (1 + margin) + 1) / _MULTIPLE) * _MULTIPLE, 0)
    capacities = np.minimum(wanted, config.num_tokens).astype(int)
    cost = np.asarray(block_macs(capacities.astype(float), config.embed_dim, config.mlp_dim)).sum(-1)
    stages = tuple(Stage(first, tuple(capacities[first].tolist())) for first in boundaries(cost, most_stages))
    return PlannedPlan(config.num_tokens, len(fullest), batch_size, group_size, stages)


def group_loads(loads: Int[np.ndarray, "l b"], group_size: int) -> Int[np.ndarray, "l groups"]:
    """The largest load in each group, if images are sorted by load in every layer and the first group is filled up."""
    ordered = np.sort(np.pad(loads, ((0, 0), (-loads.shape[1] % group_size, 0))), axis=1)
    return ordered.reshape(len(loads), -1, group_size).max(-1)


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


def boundaries(cost: Float[np.ndarray, " l"], most: int, move: float = _MOVE) -> list[int]:
    """The first layers of at most `most` stages with the least work.

    cost: of a layer with the shapes of layer l. move: what beginning a stage costs, as a fraction of its layer.
    """
    depth = len(cost)

    @functools.cache
    def best(first: int, stages: int) -> tuple[float, tuple[int, ...]]:
        """The least work of the layers from `first` on, and where later stages begin."""
        options: list[tuple[float, tuple[int, ...]]] = [((depth - first) * cost[first], ())]
        if stages > 1:
            for nxt in range(first + 1, depth):
                rest, begins = best(nxt, stages - 1)
                options.append(((nxt - first) * cost[first] + move * cost[nxt] + rest, (nxt, *begins)))
        return min(options, key=lambda option: option[0])

    return [0, *best(0, most)[1]]


def _depths(model: AViT, images: np.ndarray, batch_size: int = 64) -> Int[np.ndarray, "b n"]:
    """token_depth of every image, by one program for all batches."""
    size = min(len(images), batch_size)
    padded = np.pad(images, ((0, -len(images) % size), (0, 0), (0, 0), (0, 0)))
    depths = [np.asarray(predict(model, part).token_depth) for part in np.split(padded, len(padded) // size)]
    return np.concatenate(depths)[: len(images)]
