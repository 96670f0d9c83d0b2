"""Images per second of each execution of a model, each at its best batch size, and the machine that they are from."""

import math
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Mapping
from importlib import metadata
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Int

from avit_jax.data.pipeline import evaluation_images
from avit_jax.data.preprocessing import normalize
from avit_jax.data.sources import Images
from avit_jax.evaluate.timing import Timed, sample_in_turn
from avit_jax.execution.packed import PackedModel
from avit_jax.execution.program import compile
from avit_jax.model.vit import AViT
from avit_jax.runtime.bars import Steps
from avit_jax.runtime.machine import processor
from avit_jax.runtime.mesh import available_cores, batch_sharding, data_mesh

ROUNDS = 5
FACTORS = (1 / 4, 1 / 2, 1, 2)  # batch sizes to try, as multiples of the evaluation's
SAMPLE_SECONDS = 0.2  # a sample repeats short runs for this long, because a run of 10 ms is mostly noise
MOST_BATCHES = 8  # different batches in a sample
LONGEST_RUN = 1.0  # seconds; no larger batch is tried if the dense model takes longer
Variants = Mapping[str, tuple[AViT, str]]  # by name: the model, and its execution
_FASTEST = ("packed", "shrinking")  # the executions that are compared with dense


def batch_sizes(batch_size: int, images: int) -> list[int]:
    """Batch sizes to try, smallest first: from a quarter of the evaluation's to the same or, on a CPU, twice as many.

    No size is above `images`. An accelerator's memory may not hold a larger batch than the evaluation's. Sizes are
    multiples of the number of devices.
    """
    devices = jax.local_device_count()
    factors = [factor for factor in FACTORS if factor <= 1 or jax.default_backend() == "cpu"]
    sizes = (min(images, max(1, round(batch_size * factor))) for factor in factors)
    return sorted({size - size % devices if size > devices else size for size in sizes})


def measure_speeds(
    variants: Variants, split: Images, indices: Int[np.ndarray, " n"], batch_size: int, steps: Steps
) -> dict[str, Any]:
    """images/s of each variant at several batch sizes, all in turn, and at its best one.

    batch_size: of the evaluation. indices: of images in the data, which may be sorted by class; batches are spread
    evenly over them. steps: has kinds "batch" (one for each of batch_sizes) and "round" (ROUNDS). A sample lasts at
    least SAMPLE_SECONDS. Figures are medians of ROUNDS samples, with arrays on the devices, and include waiting for the
    outputs.
    """
    found: dict[int, dict[str, Timed]] = {}
    for size in batch_sizes(batch_size, len(indices)):
        with steps.step("batch", f"compiling for batches of {size} images"):
            timed = _compiled(variants, split, indices, size, None if not found else LONGEST_RUN)
        if timed is None:
            steps.leave_out("batch")
            break
        found[size] = timed
    _sample(found, steps)
    by_batch = {name: [timed[name].figures(size) for size, timed in found.items()] for name in variants}
    best = {name: max(rows, key=lambda row: row["images_per_second"]) for name, rows in by_batch.items()}
    packed = next((name for name, (_, execution) in variants.items() if execution == "packed"), None)
    speeds: dict[str, Any] = {
        "batch_sizes": list(found),
        "rounds": ROUNDS,
        "sample_seconds": SAMPLE_SECONDS,
        "devices": int(data_mesh(max(found)).size),
        "plan": found[best[packed]["batch"]][packed].plan if packed else None,
        "by_batch": by_batch,
        "best_batch": {name: row["batch"] for name, row in best.items()},
        "images_per_second": {name: row["images_per_second"] for name, row in best.items()},
    }
    own = next((name for name in _FASTEST if name in variants), None)
    if own and "dense" in variants:
        ours, dense = (found[best[name]["batch"]][name].rates for name in (own, "dense"))
        ratios = [a / b for a, b in zip(ours, dense, strict=True)]
        value = best[own]["images_per_second"] / best["dense"]["images_per_second"]
        speeds["speed_up"] = {"value": value, "low": min(ratios), "high": max(ratios)}
    return speeds


def measure_at(
    batches: Mapping[str, int], variants: Variants, split: Images, indices: Int[np.ndarray, " n"], steps: Steps
) -> dict[str, float]:
    """images/s of each variant at its own batch size, all in turn; steps has kinds "setting" (one each) and "round"."""
    timed: dict[int, dict[str, Timed]] = {size: {} for size in batches.values()}
    for name, variant in variants.items():
        with steps.step("setting", f"compiling {name}"):
            timed[batches[name]] |= _compiled({name: variant}, split, indices, batches[name], None) or {}
    _sample(timed, steps)
    rates = {
        name: statistics.median(program.rates) for programs in timed.values() for name, program in programs.items()
    }
    return {name: rates[name] for name in variants}


def _compiled(
    variants: Variants, split: Images, indices: Int[np.ndarray, " n"], size: int, longest: float | None
) -> dict[str, Timed] | None:
    """The variants compiled and warm at this batch size; None if the first takes more than `longest` seconds."""
    mesh = data_mesh(size)
    config = next(iter(variants.values()))[0].config

    def batches(count: int) -> list[Array]:
        chosen = indices[np.linspace(0, len(indices) - 1, count * size).round().astype(int)]
        images = normalize(evaluation_images(split, chosen, config), config)
        # Every batch is itself spread evenly over the data.
        return [jax.device_put(images[start::count], batch_sharding(mesh)) for start in range(count)]

    found: dict[str, Timed] = {}
    first = batches(1)
    for name, (model, execution) in variants.items():
        run = compile(model, size, execution=execution, mesh=mesh)
        jax.block_until_ready(run(first[0]))
        began = time.perf_counter()
        jax.block_until_ready(run(first[0]))
        took = time.perf_counter() - began
        if longest is not None and not found and took > longest:
            return None
        plan = str(run.plan) if isinstance(run, PackedModel) else None
        found[name] = Timed(run, first, max(1, math.ceil(SAMPLE_SECONDS / took)), plan)
    most = min(max(timed.calls for timed in found.values()), len(indices) // size, MOST_BATCHES)
    if most > 1:
        several = batches(most)
        for timed in found.values():
            timed.batches = several
    return found


def _sample(found: Mapping[int, Mapping[str, Timed]], steps: Steps) -> None:
    for number in range(ROUNDS):
        with steps.step("round", f"timing, round {number + 1} of {ROUNDS}"):
            sample_in_turn(program for timed in found.values() for program in timed.values())


def environment() -> dict[str, Any]:
    """The machine, the versions, and the command, for report.json."""
    devices = jax.devices()
    names = ("jax", "jaxlib", "flax", "numpy")
    return {
        "processor": processor(),
        "cores": available_cores(),
        "devices": f"{len(devices)} x {devices[0].device_kind}",
        "backend": jax.default_backend(),
        "system": platform.platform(terse=True),
        "versions": {"python": platform.python_version()} | {name: metadata.version(name) for name in names},
        "command": shlex.join(["python", *sys.argv]),
    }
