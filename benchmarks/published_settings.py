"""Images per second of rules at their published settings, and of A-ViT at its published depth: 224x224, random weights.

    python benchmarks/published_settings.py                            Tiny and Small, about 30 minutes on 2 cores
    python benchmarks/published_settings.py --models=tiny --batches=16 --rounds=3

Rules with a fixed number of tokens cost the same for every image and all weights. A-ViT's depths are drawn
(benchmarks/throughput.py: mean 0.60 of the layers for Tiny, 0.78 for Small). Every rule runs where its tokens are
really gone. All programs of a model run in turn in one process; medians are reported. "allowed" is the speed-up that
the saved multiply-adds would give, against the static model whose last layer computes only what the logits read; GMACs
are counted the same way. Each rule is at its own best batch, and at batch 1. Writes
runs/benchmarks/published_settings.json.
"""

import argparse
import dataclasses
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
import numpy as np

from avit_jax import MCTF, PRESETS, AViTConfig, DynamicViT, EViT, ToMe, TopK, compile
from avit_jax.evaluate.timing import Timed, sample_in_turn
from avit_jax.execution.program import AUTO
from avit_jax.execution.work import image_gmacs
from avit_jax.model.config import NO_RULE
from avit_jax.runtime.hints import nearest
from avit_jax.runtime.machine import machine
from avit_jax.runtime.mesh import batch_sharding, data_mesh, use_all_cores
from benchmarks.drawn import drawn_images, drawn_model
from benchmarks.profiles import MODELS, Profile
from benchmarks.results import save_results

SHORT = "static, last layer short"
RULES = {
    "ToMe, r 8": ToMe(8),
    "ToMe, r 13": ToMe(13),
    "EViT, 0.7": EViT(0.7),
    "EViT, 0.5": EViT(0.5),
    "top-k, 0.7": TopK(0.7),
    "DynamicViT, 0.7": DynamicViT(0.7),
    "MCTF, r 16": MCTF(16),
    "MCTF, 0.35 in layers 3, 6, 9": MCTF(0.35, layers=(3, 6, 9)),
}


@dataclasses.dataclass
class Row:
    """One rule of one model."""

    name: str
    gmacs: float  # of an image, the last layer short
    timed: dict[int, Timed]  # by batch
    compile_seconds: dict[int, float]

    def rate(self, batch: int) -> float:
        """Images per second."""
        return statistics.median(self.timed[batch].rates)

    def best(self) -> int:
        """The batch with the most images per second."""
        return max(self.timed, key=self.rate)


def rows_of(config: AViTConfig, profile: Profile, batches: list[int]) -> list[Row]:
    """The rows of a model, compiled and warm."""
    avit = drawn_model(config, profile.class_depth(config))
    static = avit.with_config(**NO_RULE)
    images = drawn_images(config, profile.depths(config)[: max(batches)])
    models = [("static", static, "masked"), (SHORT, static, "shrinking"), ("A-ViT, packed", avit, AUTO)]
    models += [(name, static.with_config(rule=rule), AUTO) for name, rule in RULES.items()]
    rows = []
    for name, model, execution in models:
        timed, seconds = {}, {}
        depths: Any = None
        for batch in batches:
            mesh = data_mesh(batch)
            placed = jax.device_put(images[:batch], batch_sharding(mesh))
            began = time.perf_counter()
            program = compile(model, batch, execution=execution, mesh=mesh)
            seconds[batch] = time.perf_counter() - began
            output = jax.block_until_ready(program(placed))
            depths = output.token_depth
            took = time.perf_counter()
            jax.block_until_ready(program(placed))
            calls = max(1, round(0.4 / (time.perf_counter() - took)))
            timed[batch] = Timed(program, [placed], calls=calls)
        whole = name == "static"
        gmacs = float(np.asarray(image_gmacs(model.config, depths, short_last_layer=not whole)).mean())
        rows.append(Row(name, gmacs, timed, seconds))
        print(f"compiled {name}: {', '.join(f'{s:.0f} s' for s in seconds.values())}", flush=True)
    return rows


def benchmark(name: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure one model, print its table, and give its rows for the JSON."""
    preset, fraction = MODELS[name]
    config = dataclasses.replace(PRESETS[preset], gate_scale=40.0, gate_center=20.0)
    rows = rows_of(config, Profile("published", fraction), options.batches)
    for _ in range(options.rounds):
        sample_in_turn(timed for row in rows for timed in row.timed.values())
    reference = next(row for row in rows if row.name == SHORT)
    first = options.batches[0]
    print(f"\n{name} ({machine()})")
    print(
        f"{'':30}{'GMACs':>7}{'images/s':>10}{'batch':>7}{'speed-up':>10}{'allowed':>9}"
        f"{f'batch {first}':>9}{'speed-up':>10}"
    )
    found = []
    for row in rows:
        best = row.best()
        speed_up, alone = row.rate(best) / reference.rate(reference.best()), row.rate(first) / reference.rate(first)
        allowed = reference.gmacs / row.gmacs
        print(
            f"{row.name:30}{row.gmacs:>7.3f}{row.rate(best):>10.1f}{best:>7}{speed_up:>10.2f}{allowed:>9.2f}"
            f"{row.rate(first):>9.1f}{alone:>10.2f}",
            flush=True,
        )
        found.append(
            {"name": row.name, "gmacs": row.gmacs, "speed_up": speed_up, "allowed": allowed}
            | {"speed": [timed.figures(batch) for batch, timed in row.timed.items()]}
            | {"compile_seconds": row.compile_seconds}
        )
    return found


def main() -> None:
    """Measure, print the tables, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS), help="comma-separated: " + ", ".join(MODELS))
    parser.add_argument("--batches", default="1,16,32", help="comma-separated, rising")
    parser.add_argument("--rounds", type=int, default=11)
    options = parser.parse_args()
    if options.rounds < 1 or not all(batch.isdigit() and int(batch) for batch in options.batches.split(",")):
        parser.error(f"--rounds={options.rounds} --batches={options.batches}: give whole numbers of at least 1")
    options.batches = sorted({int(batch) for batch in options.batches.split(",")})
    names = options.models.split(",")
    for name in names:
        if name not in MODELS:
            parser.error(f"there is no model {name!r}: {nearest(name, MODELS)}")
    use_all_cores()
    results: dict[str, Any] = {"machine": machine(), "rounds": options.rounds}
    for name in names:
        results[name] = benchmark(name, options)
    save_results(Path("runs/benchmarks/published_settings.json"), results)


if __name__ == "__main__":
    main()
