"""Images per second on an accelerator: every execution and torch.compile, in bfloat16, by model, image size and batch.

    python benchmarks/throughput.py --platform=gpu
    python benchmarks/throughput.py --platform=gpu --models=tiny --resolutions=224 --batches=64,256 --parts=inference
    python benchmarks/throughput.py --platform=cpu --models=tiny --resolutions=64 --batches=1,8 --rounds=1   to try it

The depths are those of the published budgets (benchmarks/profiles.py), in training those of benchmarks/train_step.py. A
case is a model, an image size, a batch and a part. Its variants run in turn in one process, on one device, with the
images there; medians are reported. A variant that does not fit in memory, or fails in another way, is reported and
skipped. torch.compile has the dense model in bfloat16, on a GPU with mode="max-autotune", which records CUDA graphs.
Every finished case is written to runs/benchmarks/throughput_PLATFORM.json, and the next run goes on after it.
"""

import argparse
import dataclasses
import gc
import importlib.util
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

import avit_jax
from avit_jax import AViTConfig, PlannedModel
from avit_jax.model.config import NO_RULE
from avit_jax.model.presets import config_from
from avit_jax.runtime.files import read_json
from avit_jax.runtime.hints import nearest
from avit_jax.runtime.machine import machine
from benchmarks.drawn import drawn_images, drawn_model
from benchmarks.peers import compiled_peer
from benchmarks.profiles import MODELS, Profile
from benchmarks.results import save_results
from benchmarks.train_step import jax_step
from benchmarks.variants import Variant, measure, program_memory

# The mean depth as a fraction of the layers. Base has no published budget, and takes Small's.
DEPTHS = {name: fraction for name, (_, fraction) in MODELS.items()} | {"base": MODELS["small"][1]}
PARTS = {
    "inference": ("dense", "dense, plain attention", "masked", "packed", "planned", "planned, plain attention"),
    "training": ("dense", "masked", "planned"),
}
PEER = "torch.compile, dense"
BATCHES = [1, 4, 16, 64, 128, 256, 512, 1024]
TRAINED = (16, 256)  # the smallest and largest batch of training steps: 8 batches of images are on the device
SAMPLE = 256  # images that a plan is made from


@dataclasses.dataclass(frozen=True)
class Case:
    """What one run measures."""

    part: str
    model: str
    pixels: int
    batch: int

    @property
    def config(self) -> AViTConfig:
        """The architecture, with the gate that drawn depths need."""
        preset = f"avit_{self.model}_patch16_224"
        gate = {"gate_scale": 40.0, "gate_center": 20.0}
        return config_from(preset, image_size=self.pixels, dtype="bfloat16", **gate)


def words(text: str) -> list[str]:
    """The parts of a comma-separated option."""
    return text.split(",")


def numbers(text: str) -> list[int]:
    """The numbers of a comma-separated option."""
    return [int(part) for part in text.split(",")]


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that only this benchmark has."""
    parser.add_argument("--parts", default=list(PARTS), type=words, help="with --platform: inference,training")
    parser.add_argument("--resolutions", default=[224, 384], type=numbers, help="with --platform; default: 224,384")


def run(options: argparse.Namespace) -> None:
    """Measure the cases that have not been measured, print their tables, write the JSON."""
    start(options.platform)
    for given, known in ((options.parts, PARTS), (options.models or [], DEPTHS)):
        for name in given:
            if name not in known:
                sys.exit(f"there is no {name!r}: {nearest(name, known)}")
    out, where = Path(f"runs/benchmarks/throughput_{options.platform}.json"), machine()
    rows: list[dict[str, Any]] = []
    if out.exists():
        found = read_json(out)
        if found["machine"] != where:
            sys.exit(f"{out} is of another machine ({found['machine']}; this is {where}): move it away")
        rows = found["rows"]
    print(f"{where}; /dense and /torch: relative to the same batch\n{HEADER}", flush=True)
    for case in cases(options):
        names = [name for name in names_of(case, options) if options.variants is None or name in options.variants]
        own = [row for row in rows if is_of(row, case)]
        if not {row["variant"] for row in own} >= set(names):
            rows = [row for row in rows if not is_of(row, case)]
            own = measured(case, names, options.rounds, options.platform)
            rows += own
            save_results(out, {"machine": where, "rows": rows})
        for row in own:
            print(format_row(row), flush=True)
    print("\n".join(best_lines(rows)))


def start(platform: str) -> None:
    """Make JAX compute on one device of the platform, and leave the rest of its memory to PyTorch.

    Exits with one sentence if there is none.
    """
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    try:
        found = jax.default_backend()
    except RuntimeError as error:
        found = f"none ({str(error).splitlines()[0]})"
    if found != platform:
        sys.exit(
            f"--platform={platform}, and JAX computes on {found} here: run it where JAX has that platform "
            "(for an NVIDIA GPU: pip install 'jax[cuda12]', and no JAX_PLATFORMS), or try it with --platform=cpu"
        )


def cases(options: argparse.Namespace) -> Iterator[Case]:
    """Every case that the options ask for, small models first."""
    for model in options.models or DEPTHS:
        for pixels in options.resolutions:
            for part in options.parts:
                for batch in options.batches or BATCHES:
                    if part == "inference" or options.batches or TRAINED[0] <= batch <= TRAINED[1]:
                        yield Case(part, model, pixels, batch)


def is_of(row: dict[str, Any], case: Case) -> bool:
    """Whether a row belongs to the case."""
    return all(row[name] == value for name, value in dataclasses.asdict(case).items())


def names_of(case: Case, options: argparse.Namespace) -> list[str]:
    """The variants of a case."""
    peer = case.part == "inference" and not options.no_peers and importlib.util.find_spec("torch") is not None
    return [*PARTS[case.part], *([PEER] if peer else [])]


def measured(case: Case, names: list[str], rounds: int, platform: str) -> list[dict[str, Any]]:
    """A row for each variant of a case."""
    builders = inference(case, platform) if case.part == "inference" else training(case)
    variants, rows, programs = [], [], {}
    for name in names:
        try:
            variant, programs[name] = builders(name)
            variant.run()
            variants.append(variant)
        except Exception as error:  # whatever happens to one variant, the others are measured
            rows.append(dataclasses.asdict(case) | {"variant": name, "failed": reason(error)})
    measure(variants, rounds)
    speeds = {variant.name: variant.images_per_second for variant in variants}
    for variant in variants:
        speed, program = speeds[variant.name], programs[variant.name]
        rows.append(
            dataclasses.asdict(case)
            | {
                "variant": variant.name,
                "images_per_second": speed,
                "to_dense": speed / speeds["dense"] if "dense" in speeds else None,
                "to_torch": speed / speeds[PEER] if PEER in speeds else None,
                "megabytes": variant.memory / 1e6,
                "compile_seconds": variant.compile_seconds,
                "overflows": program.overflows if isinstance(program, PlannedModel) else None,
            }
        )
    del variants, programs, builders
    gc.collect()  # the next case needs the memory
    return sorted(rows, key=lambda row: names.index(row["variant"]))


# A function that builds a variant by its name, and what it runs.
Builders = Callable[[str], tuple[Variant, Any]]


def inference(case: Case, platform: str) -> Builders:
    """The variants of inference: one program for each, and the images of all on the device once."""
    config, profile = case.config, Profile("published", DEPTHS[case.model])
    model = drawn_model(config, profile.class_depth(config))
    depths = profile.depths(config)
    repeated = np.resize(np.arange(len(depths)), case.batch)
    images = drawn_images(config, depths[repeated])
    placed = jax.device_put(images)

    def build(name: str) -> tuple[Variant, Any]:
        if name == PEER:
            import torch

            torch._dynamo.reset()  # it keeps few programs, and those of earlier cases are not needed
            run, seconds = compiled_peer(config, images, "cuda" if platform == "gpu" else "cpu")
            return Variant(name, case.batch, run, seconds), None
        execution, _, attention = name.partition(", ")
        own = model.with_config(attention="plain") if attention else model
        plan = None
        if execution == "planned":
            plan = avit_jax.plan(own, drawn_images(config, depths[-SAMPLE:], seed=1), case.batch)
        elif execution == "dense":
            own, execution = own.with_config(**NO_RULE), "masked"
        began = time.perf_counter()
        program: Any = avit_jax.compile(own, case.batch, execution=execution, plan=plan)
        seconds = time.perf_counter() - began
        memory = program_memory(program.compiled)
        return Variant(name, case.batch, lambda: jax.block_until_ready(program(placed)), seconds, memory), program

    return build


def training(case: Case) -> Builders:
    """The variants of a training step (benchmarks/train_step.py)."""

    def build(name: str) -> tuple[Variant, Any]:
        step = jax_step(case.config, case.batch, name)
        return Variant(name, case.batch, step.run, step.compile_seconds, step.memory), step

    return build


def reason(error: Exception) -> str:
    """Why a variant was skipped, in a line."""
    text = str(error)
    if "RESOURCE_EXHAUSTED" in text or "out of memory" in text.lower():
        return "out of memory"
    return f"{type(error).__name__}: {(text.splitlines() or [''])[0][:160]}"


HEADER = f"{'part':10}{'model':6}{'pixels':>6}{'batch':>6} {'variant':26}{'img/s':>9}{'/dense':>8}{'/torch':>8}{'MB':>8}{'comp.s':>8}"  # noqa: E501


def format_row(row: dict[str, Any]) -> str:
    """One line of the table."""
    start = f"{row['part']:10}{row['model']:6}{row['pixels']:>6}{row['batch']:>6} {row['variant']:26}"
    if "failed" in row:
        return f"{start}  skipped: {row['failed']}"
    ratios = "".join(f"{row[name]:8.2f}" if row[name] else f"{'':8}" for name in ("to_dense", "to_torch"))
    end = f"{row['megabytes']:8.0f}{row['compile_seconds']:8.1f}"
    overflows = f"  {row['overflows']} batches did not fit" if row["overflows"] else ""
    return f"{start}{row['images_per_second']:9.1f}{ratios}{end}{overflows}"


def best_lines(rows: list[dict[str, Any]]) -> list[str]:
    """For each part, model and image size: every variant at its best batch."""
    best: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    for row in rows:
        if "failed" not in row:
            group = best.setdefault((row["part"], row["model"], row["pixels"]), {})
            known = group.get(row["variant"])
            if known is None or row["images_per_second"] > known["images_per_second"]:
                group[row["variant"]] = row
    lines = ["", "each at its best batch"]
    for (part, model, pixels), group in best.items():
        shown = (f"{name} {row['images_per_second']:.0f} (batch {row['batch']})" for name, row in group.items())
        lines.append(f"{part}, {model}, {pixels}: {', '.join(shown)} images/s")
    return lines
