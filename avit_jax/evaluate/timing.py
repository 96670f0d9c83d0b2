"""Programs timed in turn, so that other load on the machine affects all of them alike."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from avit_jax.model.vit import AViTOutput
from avit_jax.runtime.mesh import batch_sharding

_STEADY = 0.1  # quartiles of ratios further apart than this share of their median: the machine was not idle
_MOST_REPEATS = 3  # of the rounds


@dataclasses.dataclass
class Timed:
    """A program, the batches it runs on, and the images/s of each round."""

    run: Callable[[Array], Any]
    batches: list[Array]
    calls: int = 1  # in a sample; short runs are repeated
    plan: str | None = None  # of packed execution
    rates: list[float] = dataclasses.field(default_factory=list)

    def sample(self) -> None:
        """Add one rate, from `calls` runs, waiting for their outputs."""
        began = time.perf_counter()
        for call in range(self.calls):
            jax.block_until_ready(self.run(self.batches[call % len(self.batches)]))
        images = self.calls * len(self.batches[0])
        self.rates.append(images / (time.perf_counter() - began))

    def figures(self, batch: int) -> dict[str, Any]:
        """Median, lowest and highest images/s of the rounds. batch: images, for the table."""
        return {
            "batch": batch,
            "images_per_second": statistics.median(self.rates),
            "low": min(self.rates),
            "high": max(self.rates),
        }


def sample_in_turn(programs: Iterable[Timed]) -> None:
    """One round: a sample of each program."""
    for program in programs:
        program.sample()


def ratios_in_turn(programs: Mapping[int, Timed], beside: Mapping[int, Timed], rounds: int) -> dict[str, Any]:
    """Images/s of each program and their ratios to another one's, by the name of the program; medians and quartiles.

    beside: the other program of each. The rounds are repeated, at most three times in all, until the ratios agree.
    """
    for _ in range(_MOST_REPEATS):
        for _ in range(rounds):
            sample_in_turn([*programs.values(), *beside.values()])
        ratios = {
            name: np.percentile(np.divide(program.rates, beside[name].rates), (25, 50, 75)).tolist()
            for name, program in programs.items()
        }
        if all(high - low <= _STEADY * middle for low, middle, high in ratios.values()):
            break
    found = {}
    for name, (low_ratio, ratio, high_ratio) in ratios.items():
        low, middle, high = np.percentile(programs[name].rates, (25, 50, 75)).tolist()
        found[str(name)] = {"images_per_second": middle, "low_quartile": low, "high_quartile": high, "ratio": ratio}
        found[str(name)] |= {"low_ratio": low_ratio, "high_ratio": high_ratio}
    return found


def images_per_second(
    programs: Sequence[Callable[[Array | np.ndarray], AViTOutput]],
    images: Float[np.ndarray, "b h w c"],
    mesh: Mesh,
    rounds: int = 7,
) -> list[float]:
    """Images/s of each program on the same batch: median of `rounds` (at least 5) warm runs, the programs in turn.

    The batch is split over the mesh's devices, and timing includes waiting for the outputs.
    """
    batch = jax.device_put(images, batch_sharding(mesh))
    timed = [Timed(program, [batch]) for program in programs]
    for program in programs:
        jax.block_until_ready(program(batch))
    for _ in range(max(rounds, 5)):
        sample_in_turn(timed)
    return [statistics.median(program.rates) for program in timed]
