"""Images per second of inference: dense, masked, packed, and a CPU user's alternatives (benchmarks/peers.py).

    python benchmarks/throughput.py                               everything, about 25 minutes on 2 cores
    python benchmarks/throughput.py --models=tiny --profiles=published --batches=16,64 --rounds=3

Weights are random, and the images determine the depths (benchmarks/drawn.py). There are three groups of profiles: the
published budgets (mean depth 0.60 of 12 for Tiny, 0.78 for Small, token spread 2 layers, image spread 0.8, class token
two layers deeper than the mean), the same with image spreads 0 and 2, and a sweep of the mean depth up to no halting.
The variants of a group run in turn in one process, with arrays on the devices, until outputs are ready; medians are
reported. Peers (eager PyTorch, torch.compile in bfloat16, ONNX Runtime, all dense) run if they are installed. Writes
runs/benchmarks/throughput.json.
"""

import argparse
import dataclasses
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from avit_jax import PRESETS, AViT, AViTConfig, compile_packed
from avit_jax.execution.plan import plan_packed
from avit_jax.execution.work import image_gmacs, whole_gmacs
from avit_jax.model.layers import Block
from avit_jax.runtime.mesh import batch_sharding, data_mesh, replicated, use_all_cores
from benchmarks.drawn import dense_parts, drawn_depths, drawn_images, drawn_model, in_bfloat16
from benchmarks.peers import peers
from benchmarks.results import machine, save_results

MODELS = {"tiny": ("avit_tiny_patch16_224", 0.60), "small": ("avit_small_patch16_224", 0.78)}
TOKEN_SPREAD = 2.0


@dataclasses.dataclass(frozen=True)
class Profile:
    """The depths of a model's tokens: the mean as a fraction of the layers, the spread between images in layers."""

    name: str
    fraction: float
    image_spread: float = 0.8

    def class_depth(self, model_config: AViTConfig) -> int:
        """The class token's depth in layers: two more than the mean."""
        return min(model_config.depth, round(self.fraction * model_config.depth) + 2)

    def depths(self, model_config: AViTConfig) -> np.ndarray:
        """The depth in layers of every patch: [512, patches]."""
        if self.fraction == 1:
            return np.full((512, model_config.num_tokens - 1), model_config.depth)
        mean = self.fraction * model_config.depth
        return drawn_depths(model_config, 512, mean, TOKEN_SPREAD, self.image_spread, self.class_depth(model_config))


NOTHING_HALTS = Profile("nothing halts", 1.0, 0.0)


def profiles(fraction: float) -> dict[str, list[Profile]]:
    """The profiles by their group's name; fraction: the model's published mean depth, as a fraction of its layers."""
    return {
        "published": [Profile("published", fraction)],
        "spreads": [Profile("spread 0", fraction, 0.0), Profile("spread 2", fraction, 2.0)],
        "sweep": [*(Profile(f"depth {share}", share) for share in (0.25, 0.5, 0.75)), NOTHING_HALTS],
    }


@dataclasses.dataclass
class Variant:
    """A program for one batch size; `run` returns when the outputs are ready."""

    name: str
    batch: int
    run: Callable[[], Any]
    compile_seconds: float = 0.0
    memory: int = 0  # bytes: arguments, outputs and temporaries
    seconds: list[float] = dataclasses.field(default_factory=list)

    @property
    def images_per_second(self) -> float:
        """The images per second of the median run."""
        return self.batch / statistics.median(self.seconds)


def compiled_variant(name: str, model: AViT, images: np.ndarray, mesh: Mesh, last_layer: bool) -> Variant:
    """Masked execution (dense without a gate); with last_layer, that layer computes only what the logits read."""
    graphdef, params = nnx.split(model)

    def forward(params: Any, images: jax.Array) -> jax.Array:
        model = nnx.merge(graphdef, params)
        if not last_layer:
            return model(images).logits
        blocks, stacked = nnx.split(model.blocks)

        def block_at(layer: Any) -> Block:
            return nnx.merge(blocks, jax.tree.map(lambda p: p[layer], stacked))

        layers = jnp.arange(model.config.depth - 1)
        x, _ = jax.lax.scan(lambda x, layer: (block_at(layer)(x), None), model.embed(images), layers)
        last = block_at(model.config.depth - 1)
        special = last.read(x, jnp.ones(x.shape[:2], bool), 1)
        return model.head_logits(special).mean(0)

    placed = jax.device_put(params, replicated(mesh)), jax.device_put(images, batch_sharding(mesh))
    began = time.perf_counter()
    program = jax.jit(forward).lower(*placed).compile()
    took = time.perf_counter() - began
    return Variant(name, len(images), lambda: jax.block_until_ready(program(*placed)), took, _memory(program))


def packed_variant(name: str, model: AViT, images: np.ndarray, mesh: Mesh, sample: np.ndarray | None = None) -> Variant:
    """Packed execution with image exit and the default plan, or the one that plan_packed makes from a sample."""
    plan = None if sample is None else plan_packed(model, sample, len(images), mesh=mesh)
    began = time.perf_counter()
    packed = compile_packed(model, len(images), plan, mesh=mesh)
    took = time.perf_counter() - began
    placed = jax.device_put(images, batch_sharding(mesh))
    return Variant(name, len(images), lambda: jax.block_until_ready(packed(placed)), took, _memory(packed.compiled))


def _memory(program: Any) -> int:
    found = program.memory_analysis()
    return int(found.argument_size_in_bytes + found.output_size_in_bytes + found.temp_size_in_bytes)


def measure(variants: list[Variant], rounds: int) -> None:
    """Warm up every variant, then time them in turn. Short runs are repeated, and their mean is taken."""
    for timed in [False] + [True] * rounds:
        for variant in variants:
            took = _seconds(variant, 1)
            if took < 0.2:  # threads of the previous variant may still run, and one short run says little
                took = _seconds(variant, math.ceil(0.4 / took))
            if timed:
                variant.seconds.append(took)


def _seconds(variant: Variant, runs: int) -> float:
    began = time.perf_counter()
    for _ in range(runs):
        variant.run()
    return (time.perf_counter() - began) / runs


def variants_of(
    model_config: AViTConfig, profile: Profile, depths: np.ndarray, batches: list[int], all_of_them: bool, planned: bool
) -> list[Variant]:
    """What is measured on a profile, for each batch size."""
    model = drawn_model(model_config, profile.class_depth(model_config))
    dense, half, dense_half = dense_parts(model), in_bfloat16(model), in_bfloat16(dense_parts(model))
    variants = []
    for batch in batches:
        images = drawn_images(model_config, depths[:batch])
        mesh = data_mesh(batch)
        variants.append(compiled_variant("dense", dense, images, mesh, False))
        variants.append(packed_variant("packed", model, images, mesh))
        if all_of_them:
            variants.append(compiled_variant("dense, last layer short", dense, images, mesh, True))
            variants.append(compiled_variant("masked", model, images, mesh, False))
            variants.append(compiled_variant("dense, bfloat16", dense_half, images, mesh, False))
            variants.append(packed_variant("packed, bfloat16", half, images, mesh))
        if planned:
            sample = drawn_images(
                model_config, depths[-max(64, batch) :]
            )  # not the images that are timed, up to batch 448
            variants.append(packed_variant("packed, planned", model, images, mesh, sample))
    return variants


def benchmark(name: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of one model: every profile, every batch size."""
    preset, fraction = MODELS[name]
    config = dataclasses.replace(PRESETS[preset], gate_scale=40.0, gate_center=20.0)
    rows: list[dict[str, Any]] = []
    for group, members in profiles(fraction).items():
        if group not in options.profiles:
            continue
        published = group == "published"
        batches = options.batches if published else options.batches[-1:]
        measured = []
        for profile in members:
            depths = profile.depths(config)
            planned = published and options.planned
            measured.append((profile, depths, variants_of(config, profile, depths, batches, published, planned)))
        if published and not options.no_peers:
            _, depths, variants = measured[0]
            for batch in batches:
                for peer, run, seconds in peers(config, drawn_images(config, depths[:batch])):
                    variants.append(Variant(peer, batch, run, seconds))
        measure([variant for *_, variants in measured for variant in variants], options.rounds)
        for profile, depths, variants in measured:
            rows += profile_rows(name, config, profile, depths, variants)
        if group == "sweep":
            print("\n".join(work_lines(rows[-2 * len(members) :])), flush=True)
    return rows


def profile_rows(
    name: str, model_config: AViTConfig, profile: Profile, depths: np.ndarray, variants: list[Variant]
) -> list[dict[str, Any]]:
    """A row for each variant, printed."""
    whole = whole_gmacs(model_config)
    class_depths = np.full((len(depths), 1), profile.class_depth(model_config))
    all_depths = np.concatenate([class_depths, depths], axis=1).astype(int)
    at_batch = {v.batch: v.images_per_second for v in variants if v.name == "dense"}
    rows = []
    for variant in variants:
        shown = all_depths[: variant.batch]
        gmacs = float(np.mean(image_gmacs(model_config, jnp.asarray(shown))))
        work = gmacs / whole if variant.name.startswith("packed") else 1.0
        ratio = variant.images_per_second / max(at_batch.values())
        rows.append(
            {
                "model": name,
                "profile": profile.name,
                "variant": variant.name,
                "batch": variant.batch,
                "images_per_second": variant.images_per_second,
                "ratio_to_dense": ratio,
                "ratio_to_batch": variant.images_per_second / at_batch[variant.batch],
                "work_ratio": work,
                "efficiency": ratio * work,
                "mean_depth": float(shown.mean()),
                "megabytes": variant.memory / 1e6,
                "compile_seconds": variant.compile_seconds,
            }
        )
        print(format_row(rows[-1]), flush=True)
    return rows


def work_lines(rows: list[dict[str, Any]]) -> list[str]:
    """Lines that compare packed execution's time with the work, over a sweep whose last profile halts nothing."""
    packed = [row for row in rows if row["variant"] == "packed"]
    whole = packed[-1]["images_per_second"]
    return [
        f"{row['model']:6}{row['profile']:15}time / time without halting {whole / row['images_per_second']:.3f}, "
        f"work ratio {row['work_ratio']:.3f}, 1.15 x that + 0.03: {1.15 * row['work_ratio'] + 0.03:.3f}"
        for row in packed[:-1]
    ]


HEADER = f"{'model':6}{'profile':15}{'variant':25}{'batch':>5}{'img/s':>8}{'/dense':>8}{'/same b.':>9}{'work':>7}{'effic.':>7}{'MB':>7}{'comp.s':>8}"  # noqa: E501


def format_row(row: dict[str, Any]) -> str:
    """One line of the table."""
    return (
        f"{row['model']:6}{row['profile']:15}{row['variant']:25}{row['batch']:5}{row['images_per_second']:8.1f}"
        f"{row['ratio_to_dense']:8.2f}{row['ratio_to_batch']:9.2f}{row['work_ratio']:7.2f}{row['efficiency']:7.2f}{row['megabytes']:7.0f}"
        f"{row['compile_seconds']:8.1f}"
    )


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw images per second by mean depth, relative to each model's dense execution."""
    os.environ.setdefault("MPLCONFIGDIR", str(Path("runs/.matplotlib").absolute()))
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for name in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == name and row["variant"] == "packed" and row["batch"] > 1]
        batch = max(row["batch"] for row in own)
        points = sorted((row["mean_depth"], row["ratio_to_batch"]) for row in own if row["batch"] == batch)
        axes.plot(*zip(*points, strict=True), "o-", label=f"A-ViT-{name.capitalize()}, packed, batch {batch}")
    axes.axhline(1, color="grey", linewidth=1, label="dense, same batch")
    axes.set(xlabel="mean token depth (of 12 layers)", ylabel="images/s, relative to dense", ylim=(0, None))
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    """Print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="tiny,small", type=lambda text: text.split(","))
    parser.add_argument("--profiles", default="published,spreads,sweep", type=lambda text: text.split(","))
    parser.add_argument("--batches", default="1,8,16,32,64,128", type=lambda text: [int(b) for b in text.split(",")])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--planned", action="store_true", help="also packed with the plan that plan_packed makes")
    options = parser.parse_args()
    use_all_cores()
    where = machine()
    print(f"{where}; /dense: relative to dense at its best batch, /same b.: at the same batch\n{HEADER}")
    rows = [row for name in options.models for row in benchmark(name, options)]
    out = Path("runs/benchmarks/throughput.json")
    save_results(out, {"machine": where, "rows": rows})
    if any(row["variant"] == "packed" and row["batch"] > 1 for row in rows):
        draw(rows, out.with_suffix(".png"))
        print(f"picture: {out.with_suffix('.png')}")


if __name__ == "__main__":
    main()
