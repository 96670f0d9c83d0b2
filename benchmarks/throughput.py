"""Images per second of inference: dense, masked, packed, planned, and a user's alternatives (benchmarks/peers.py).

    python benchmarks/throughput.py                               everything, about 30 minutes on 2 cores
    python benchmarks/throughput.py --models=tiny --profiles=published --batches=16,64 --rounds=3
    python benchmarks/throughput.py --platform=gpu                what benchmarks/matrix.py measures, some hours

Weights are random, and the images determine the depths (benchmarks/drawn.py). There are three groups of profiles: the
published budgets (mean depth 0.60 of 12 for Tiny, 0.78 for Small, token spread 2 layers, image spread 0.8, class token
two layers deeper than the mean), the same with image spreads 0 and 2, and a sweep of the mean depth up to no halting.
The variants of a group run in turn in one process, with arrays on the devices, until outputs are ready; medians are
reported. Peers (eager PyTorch, torch.compile in bfloat16, ONNX Runtime, all dense) run if they are installed. Writes
runs/benchmarks/throughput.json.
"""

import argparse
import dataclasses
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import jax.numpy as jnp
import numpy as np

from avit_jax import PRESETS, AViTConfig
from avit_jax.execution.work import image_gmacs, whole_gmacs
from avit_jax.runtime.machine import machine
from avit_jax.runtime.mesh import data_mesh, use_all_cores
from benchmarks import matrix
from benchmarks.drawn import dense_parts, drawn_images, drawn_model, in_bfloat16
from benchmarks.peers import peers
from benchmarks.profiles import MODELS, Profile, profiles
from benchmarks.results import save_results
from benchmarks.variants import Variant, compiled_variant, measure, packed_variant, planned_variant

VARIANTS = (
    "dense",
    "packed",
    "planned",
    "dense, last layer short",
    "masked",
    "dense, bfloat16",
    "packed, bfloat16",
    "packed, measured plan",
)


def variants_of(
    model_config: AViTConfig, profile: Profile, depths: np.ndarray, batches: list[int], names: list[str]
) -> list[Variant]:
    """What is measured on a profile, for each batch size. names: of VARIANTS."""
    model = drawn_model(model_config, profile.class_depth(model_config))
    dense, half, dense_half = dense_parts(model), in_bfloat16(model), in_bfloat16(dense_parts(model))

    def built(name: str, batch: int) -> Variant:
        images, mesh = drawn_images(model_config, depths[:batch]), data_mesh(batch)
        if "plan" in name:
            # Plans are made from other images than those that are timed, up to batch 256.
            sample = drawn_images(model_config, depths[-max(256, batch) :])
            return (planned_variant if name == "planned" else packed_variant)(name, model, images, mesh, sample)
        own = half if "bfloat16" in name else model
        if name.startswith("packed"):
            return packed_variant(name, own, images, mesh)
        if name != "masked":
            own = dense_half if own is half else dense
        return compiled_variant(name, own, images, mesh, "last layer" in name)

    return [built(name, batch) for batch in batches for name in names]


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
            names = [name for name in options.variants if published or name in ("dense", "packed")]
            measured.append((profile, depths, variants_of(config, profile, depths, batches, names)))
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
        work = gmacs / whole if variant.name.startswith(("packed", "planned")) else 1.0
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
    parser.add_argument(
        "--platform", help="gpu: the matrix of benchmarks/matrix.py; cpu: the same, to try it; not given: as above"
    )
    parser.add_argument("--models", type=matrix.words, help="default: tiny,small; with --platform: base too")
    parser.add_argument("--profiles", default="published,spreads,sweep", type=matrix.words, help="without --platform")
    parser.add_argument("--batches", type=matrix.numbers, help="default: 1,8,16,32,64,128; with --platform: 1 to 1024")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument(
        "--variants", type=lambda text: text.split(";"), help="default: all; such as 'dense;packed;planned'"
    )
    matrix.add_options(parser)
    options = parser.parse_args()
    if options.platform is not None:
        matrix.run(options)
        return
    options.models = options.models or ["tiny", "small"]
    options.batches = options.batches or [1, 8, 16, 32, 64, 128]
    options.variants = options.variants or list(VARIANTS[:-1])
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
