"""The table that train.py ends with: the trained model beside the one it started from."""

from typing import Any

import numpy as np

from avit_jax.data.pipeline import evaluation_images
from avit_jax.data.preprocessing import normalize
from avit_jax.data.sources import Images
from avit_jax.evaluate.figures import Evaluation, evaluate
from avit_jax.evaluate.timing import images_per_second
from avit_jax.execution.program import AUTO, compile
from avit_jax.model.vit import AViT
from avit_jax.runtime.mesh import data_mesh

SUMMARY_KEYS = ("top1", "top5", "gmacs")
DEPTH_KEYS = ("mean_depth", "depth_fraction", "depth_std_tokens", "depth_std_images")

HARDLY_HALTS = 0.98  # of the layers: no work to speak of is saved


def hardly_halts(depth: float) -> str:
    """What to do about an A-ViT of so many layers whose tokens go through nearly all of them."""
    return (
        "its tokens halt almost nowhere, so nothing is saved: start the gate where tokens halt, with "
        f"--config.gate_start.images=1000 --config.gate_start.target_depth={0.75 * depth:g} "
        "--config.gate_start.deviation=2 in another --workdir, or train for more epochs"
    )


def measure(test: Images, baseline: AViT | None, model: AViT, batch_size: int) -> tuple[dict[str, Any], Evaluation]:
    """The rows of the table, on the test images; speeds of both models interleaved, on one batch.

    Returns the summary without `seconds`, and the evaluation of `model`. batch_size: images.
    """
    result = evaluate(model, test, batch_size, AUTO)
    rows = {"avit" if model.config.halts else "dense": (model, result)}
    if baseline is not None and baseline.config.halts != model.config.halts:
        rows["avit" if baseline.config.halts else "dense"] = (
            baseline,
            evaluate(baseline, test, batch_size, AUTO),
        )
    count = min(batch_size, len(test))
    # Evenly over the set, which may be sorted by class.
    timed = np.linspace(0, len(test) - 1, count).astype(int)
    batch = normalize(evaluation_images(test, timed, model.config), model.config)
    mesh = data_mesh(count)
    programs = [compile(row_model, count, mesh=mesh) for row_model, _ in rows.values()]
    speeds = images_per_second(programs, batch, mesh)
    summary: dict[str, Any] = {"images": len(test), "batch_size": count}
    for (name, (_, row)), speed in zip(rows.items(), speeds, strict=True):
        summary[name] = {key: getattr(row, key) for key in SUMMARY_KEYS} | {"images_per_second": speed}
        if name == "avit":
            summary[name] |= {key: getattr(row, key) for key in DEPTH_KEYS}
            summary[name]["execution"] = "packed"
    return summary, result


def format_summary(summary: dict[str, Any]) -> str:
    """The table that train.py ends with."""
    lines = [f"{'':8}{'top-1':>8}{'top-5':>8}{'mean depth':>12}{'GMACs/image':>13}{'images/s':>10}"]
    for name, label in (("dense", "dense"), ("avit", "A-ViT")):
        if name in summary:
            row = summary[name]
            depth = f"{row['mean_depth']:.2f}" if "mean_depth" in row else "all"
            lines.append(
                f"{label:8}{row['top1']:>8.2%}{row['top5']:>8.2%}{depth:>12}{row['gmacs']:>13.4f}"
                f"{row['images_per_second']:>10.0f}"
            )
    if "avit" in summary:
        row = summary["avit"]
        lines.append(
            f"A-ViT uses {row['depth_fraction']:.0%} of its layers; depth deviates by {row['depth_std_tokens']:.2f} "
            f"layers between the tokens of an image, by {row['depth_std_images']:.2f} between images"
        )
        if row["depth_fraction"] >= HARDLY_HALTS:
            lines.append(hardly_halts(row["mean_depth"] / row["depth_fraction"]))
    packed = ", A-ViT by packed execution (halted tokens are gone)" if "avit" in summary else ""
    lines.append(
        f"{summary['images']} test images; images/s at batch {summary['batch_size']}{packed}; "
        f"{summary['seconds']:.0f} s in all"
    )
    return "\n".join(lines)
