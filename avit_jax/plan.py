"""Plans of packed execution: how many images run together, and for how many tokens programs are compiled."""

import dataclasses
from pathlib import Path

from avit_jax.config import AViTConfig
from avit_jax.files import read_json, write_json


@dataclasses.dataclass(frozen=True)
class PackedPlan:
    """Speed alone: whatever the plan, the result is the same. Raises ValueError for numbers that cannot work."""

    num_tokens: int
    group_size: int  # images that run together, sorted by how many tokens they have left
    capacities: tuple[int, ...]  # tokens of an image that a group is computed with, ascending; the last is num_tokens

    def __post_init__(self) -> None:
        if self.group_size < 1:
            raise ValueError(f"group_size is {self.group_size}: it must be at least 1")
        rising = all(a < b for a, b in zip(self.capacities, self.capacities[1:], strict=False))
        if not self.capacities or not rising or self.capacities[0] < 1 or self.capacities[-1] != self.num_tokens:
            raise ValueError(
                f"capacities are {self.capacities}: they must rise from 1 or more to the {self.num_tokens} tokens"
            )

    def __str__(self) -> str:
        return f"groups of {self.group_size} images, capacities {', '.join(map(str, self.capacities))} tokens"

    def save(self, path: str | Path) -> None:
        """Write it as JSON."""
        write_json(Path(path), dataclasses.asdict(self))

    @classmethod
    def load(cls, path: str | Path) -> "PackedPlan":
        """The plan in a file that `save` wrote. Raises ValueError, naming the file, where it is none."""
        content = read_json(Path(path))
        try:
            return cls(**(content | {"capacities": tuple(content["capacities"])}))
        except (TypeError, KeyError, ValueError) as error:
            raise ValueError(f"{path} is no plan of packed execution: {error}") from error


def capacities_every(step: int, config: AViTConfig) -> tuple[int, ...]:
    """Multiples of `step` up to the number of tokens, which is the last."""
    return (*range(step, config.num_tokens, step), config.num_tokens)


def default_plan(config: AViTConfig, batch_size: int, platform: str) -> PackedPlan:
    """A plan that is good without a sample of images."""
    step = 32 if platform == "tpu" else 16
    group_size = min(batch_size, 2 if platform == "cpu" else max(1, batch_size // 8))
    return PackedPlan(config.num_tokens, group_size, capacities_every(step, config))
