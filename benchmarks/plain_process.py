"""Images per second of the two calls that README shows, with their default arguments, in an ordinary process.

    python benchmarks/plain_process.py                           one JAX device for all cores; about 4 minutes
    python benchmarks/plain_process.py --all_cores               after avit_jax.use_all_cores(): a device for each core
    python benchmarks/plain_process.py --group_sizes=2,4,8,16 also packed with other plans

Packed is avit_jax.compile(model, batch), dense the same call for the same weights without token halting. The depths are
those of the published budgets (benchmarks/throughput.py). All variants run in turn in one process, with the images on
the devices; medians are reported, and the ratio is to dense at its best batch. Writes
runs/benchmarks/plain_process.json, or plain_process_all_cores.json.
"""

import argparse
import dataclasses
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
import numpy as np

import avit_jax
from avit_jax import PRESETS, AViT
from avit_jax.execution.plan import PackedPlan
from avit_jax.runtime.machine import machine
from benchmarks.drawn import dense_parts, drawn_images, drawn_model
from benchmarks.results import save_results
from benchmarks.throughput import MODELS, Profile, Variant, measure


def variant(name: str, model: AViT, images: np.ndarray, plan: PackedPlan | None = None) -> tuple[Variant, Any]:
    """The default program for these images, and how it is measured."""
    began = time.perf_counter()
    program = avit_jax.compile(model, len(images), plan=plan)
    took = time.perf_counter() - began
    placed = jax.device_put(images, program.abstract_arguments[1].sharding)
    return Variant(name, len(images), lambda: jax.block_until_ready(program(placed)), took), program


def benchmark(name: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of one model, printed."""
    preset, fraction = MODELS[name]
    config = dataclasses.replace(PRESETS[preset], gate_scale=40.0, gate_center=20.0)
    profile = Profile("published", fraction)
    model = drawn_model(config, profile.class_depth(config))
    images = drawn_images(config, profile.depths(config)[: max(options.batches)])
    variants = [variant("dense", dense_parts(model), images[:batch])[0] for batch in options.batches]
    for batch in options.batches:
        measured, program = variant("packed", model, images[:batch])
        variants.append(measured)
    print(f"{name}, batch {batch}: {program.plan}")
    for group_size in options.group_sizes:
        plan = dataclasses.replace(program.plan, group_size=group_size)
        variants.append(variant(f"packed, groups of {group_size}", model, images, plan)[0])
    measure(variants, options.rounds)
    dense = max(v.images_per_second for v in variants if v.name == "dense")
    rows = []
    for v in variants:
        row = {"model": name, "variant": v.name, "batch": v.batch, "images_per_second": v.images_per_second}
        rows.append(row | {"ratio_to_dense": v.images_per_second / dense, "compile_seconds": v.compile_seconds})
        print(
            f"{name:6}{v.name:22}{v.batch:6}{v.images_per_second:9.1f}{v.images_per_second / dense:9.2f}"
            f"{v.compile_seconds:9.1f}",
            flush=True,
        )
    return rows


def main() -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="tiny,small", type=lambda text: text.split(","))
    parser.add_argument("--batches", default="1,16,64", type=lambda text: [int(b) for b in text.split(",")])
    parser.add_argument("--group_sizes", default=[], type=lambda text: [int(size) for size in text.split(",")])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--all_cores", action="store_true", help="call avit_jax.use_all_cores() first")
    options = parser.parse_args()
    if options.all_cores:
        avit_jax.use_all_cores()
    print(f"{machine()}, {jax.local_device_count()} JAX devices")
    print(f"{'model':6}{'variant':22}{'batch':>6}{'img/s':>9}{'/dense':>9}{'comp. s':>9}")
    rows = [row for name in options.models for row in benchmark(name, options)]
    out = Path(f"runs/benchmarks/plain_process{'_all_cores' if options.all_cores else ''}.json")
    save_results(out, {"machine": machine(), "devices": jax.local_device_count(), "rows": rows})


if __name__ == "__main__":
    main()
