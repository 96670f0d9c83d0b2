"""How long one call takes: most calls, the slow ones and the worst, for packed and planned execution against dense.

    python benchmarks/tails.py --models=fashion   the A-ViT in checkpoints/ on Fashion-MNIST's test images; 1 minute
    python benchmarks/tails.py --models=tiny      A-ViT-Tiny at 224, random weights, drawn depths; 5 minutes on 2 cores

Every call has other images, drawn from a pool. The programs take each batch in turn, and the faster of two such rounds
counts, so that what the machine itself delays is mostly left out. Dense does the same work for all images: its tail is
the machine's. "nothing halts" is packed and planned execution of the same images with a gate that never fires: the most
that any image can cost. Work is the multiply-adds of the program, padding included, as a share of dense. The plan is
made from other images. Writes runs/benchmarks/tails_MODEL.json.

For fashion a second table has what a cap costs: with_config(depth=...) leaves out the last layers.
"""

import argparse
import contextlib
import dataclasses
import io
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
import numpy as np

import avit_jax
from avit_jax import PRESETS, AViT
from avit_jax.data.open import open_dataset
from avit_jax.data.pipeline import evaluation_images
from avit_jax.data.preprocessing import normalize
from avit_jax.data.settings import DataSettings
from avit_jax.evaluate.figures import evaluate
from avit_jax.execution.work import whole_gmacs
from avit_jax.runtime.machine import machine
from benchmarks.drawn import dense_parts, drawn_images, drawn_model
from benchmarks.fashion_mnist import CHECKPOINT
from benchmarks.results import save_results
from benchmarks.throughput import Profile
from configs import fashion_mnist

NEVER = 1e6  # a gate's centre at which no token halts
POOL = {"fashion": 2048, "tiny": 512}  # images; half of them make the plan
ROUNDS = 2
PERCENTILES = (50, 95, 99, 100)


def fashion() -> tuple[AViT, np.ndarray, Any]:
    """The model, images of the pool, and the whole test split."""
    model = avit_jax.load(CHECKPOINT)
    test = open_dataset(DataSettings.from_config(dict(fashion_mnist.get_config().data))).test
    indices = range(POOL["fashion"])
    return model, np.asarray(normalize(evaluation_images(test, indices, model.config), model.config)), test


def tiny() -> tuple[AViT, np.ndarray, None]:
    """The model and images of the pool, at the published depth."""
    config = dataclasses.replace(PRESETS["avit_tiny_patch16_224"], gate_scale=40.0, gate_center=20.0)
    profile = Profile("published", 0.6)
    images = drawn_images(config, profile.depths(config)[: POOL["tiny"]])
    return drawn_model(config, profile.class_depth(config)), images, None


def programs_of(model: AViT, sample: np.ndarray, batch: int) -> dict[str, Any]:
    """The program of each row of the table."""
    plan = avit_jax.plan(model, sample, batch)
    never = model.with_config(gate_center=NEVER)
    return {
        "dense": avit_jax.compile(dense_parts(model), batch),
        "packed": avit_jax.compile(model, batch),
        "planned": avit_jax.compile(model, batch, execution="planned", plan=plan),
        "packed, nothing halts": avit_jax.compile(never, batch),
        "planned, nothing halts": avit_jax.compile(never, batch, execution="planned", plan=plan),
    }


def milliseconds(program: Any, images: np.ndarray) -> float:
    """The time of one call with images on the device, until its outputs are ready."""
    placed = jax.block_until_ready(jax.device_put(images, program.abstract_arguments[1].sharding))
    began = time.perf_counter()
    jax.block_until_ready(program(placed))
    return 1e3 * (time.perf_counter() - began)


def benchmark(name: str, model: AViT, images: np.ndarray, batch: int, calls: int) -> list[dict[str, Any]]:
    """The rows of one model and batch size, printed."""
    sample, images = np.split(images, 2)
    programs = programs_of(model, sample, batch)
    rng = np.random.default_rng(0)
    batches = [rng.choice(len(images), batch, replace=False) for _ in range(calls)]
    milliseconds_of = {row: np.full(calls, np.inf) for row in programs}
    for program in programs.values():
        with contextlib.redirect_stdout(io.StringIO()):  # packed execution says that nothing halts
            milliseconds(program, images[:batch])
    for _ in range(ROUNDS):
        for call, chosen in enumerate(batches):
            for row, program in programs.items():
                if row.endswith("halts") and call % 5:  # it does the same work for all images
                    continue
                taken = milliseconds(program, images[chosen])
                milliseconds_of[row][call] = min(milliseconds_of[row][call], taken)
    masked = avit_jax.compile(model, 64, execution="masked")
    depths = np.concatenate([masked(part).token_depth for part in np.split(images, len(images) // 64)])
    dense = float(np.median(milliseconds_of["dense"]))
    rows = []
    for row, program in programs.items():
        taken = milliseconds_of[row][np.isfinite(milliseconds_of[row])]
        shown = [np.full_like(depths[c], model.config.depth) if row.endswith("halts") else depths[c] for c in batches]
        work = [1.0 if row == "dense" else share(program, depth) for depth in shown]
        found = {"model": name, "batch": batch, "row": row, "calls": len(taken)}
        found["of_dense"] = float(np.median(taken)) / dense
        found |= {f"ms_{p}": float(np.percentile(taken, p)) for p in PERCENTILES}
        found |= {f"work_{p}": float(np.percentile(work, p)) for p in PERCENTILES}
        found["overflows"] = getattr(program, "overflows", 0) / max(1, getattr(program, "batches", 0))
        rows.append(found)
        print(
            f"{name:8}{batch:5}  {row:24}"
            + "".join(f"{found[f'ms_{p}']:9.2f}" for p in PERCENTILES)
            + f"{found['of_dense']:9.2f}{found['work_50']:8.2f}{found['work_100']:8.2f}{found['overflows']:8.1%}",
            flush=True,
        )
    return rows


def share(program: Any, token_depth: np.ndarray) -> float:
    """The work of a program for a batch whose tokens have these depths, as a share of dense."""
    return float(program.executed(token_depth, len(token_depth)).gmacs / whole_gmacs(program.config))


def caps(model: AViT, test: Any) -> list[dict[str, Any]]:
    """Accuracy, mean work and the bound if layers are left out, printed."""
    rows = []
    for depth in range(model.config.depth, model.config.depth - 6, -1):
        shorter = model.with_config(depth=depth)
        found = evaluate(shorter, test, 200)
        whole = whole_gmacs(model.config)
        bound = whole_gmacs(shorter.config) / whole
        rows.append({"depth": depth, "top1": found.top1, "work": found.gmacs / whole, "bound": bound})
        print(f"{depth:2} layers: top-1 {found.top1:.2%}, mean work {found.gmacs / whole:.3f}, at most {bound:.3f}")
    return rows


def numbers(text: str) -> list[int]:
    """Numbers with commas between them."""
    return [int(number) for number in text.split(",")]


MODELS: dict[str, Callable[[], tuple[AViT, np.ndarray, Any]]] = {"fashion": fashion, "tiny": tiny}


def main() -> None:
    """Measure, print the tables, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="fashion,tiny", type=lambda text: text.split(","))
    parser.add_argument("--batches", default="1,32", type=numbers)
    parser.add_argument("--calls", default="100,30", type=numbers, help="at each batch size")
    options = parser.parse_args()
    avit_jax.use_all_cores()
    print(machine())
    times = f"{'p50 ms':>9}{'p95':>9}{'p99':>9}{'worst':>9}{'/dense':>9}"
    print(f"{'model':8}{'batch':>5}  {'':24}{times}{'work':>8}{'worst':>8}{'unfit':>8}")
    for name in options.models:
        model, images, test = MODELS[name]()
        rows = []
        for batch, calls in zip(options.batches, options.calls, strict=True):
            rows += benchmark(name, model, images, batch, calls)
        capped = [] if test is None else caps(model, test)
        save_results(Path(f"runs/benchmarks/tails_{name}.json"), {"machine": machine(), "rows": rows, "caps": capped})


if __name__ == "__main__":
    main()
