"""The table that train.py ends with: the trained model beside the one it started from."""

from typing import Any

import numpy as np

from avit_jax.data.pipeline import evaluation_images
from avit_jax.data.preprocessing import normalize
from avit_jax.data.sources import Images
from avit_jax.evaluate.figures import Evaluation, evaluate
from avit_jax.evaluate.timing import images_per_second
from avit_jax.execution.program import AUTO, EXECUTIONS, compile
from avit_jax.model.vit import AViT
from avit_jax.rules import RULES
from avit_jax.runtime.mesh import data_mesh

SUMMARY_KEYS = ("top1", "top5", "gmacs")
DEPTH_KEYS = ("mean_depth", "depth_fraction", "depth_std_tokens", "depth_std_images")

HARDLY_HALTS = 0.98  # mean depth as a fraction of the layers, from which hardly any work is saved


def hardly_halts(depth: float) -> str:
    """Advice for an A-ViT whose tokens go through nearly all layers; depth: its number of layers."""
    return (
        "almost no token halts, so nothing is saved: start the gate where tokens halt, with "
        f"--config.gate_start.images=1000 --config.gate_start.target_depth={0.75 * depth:g} "
        "--config.gate_start.deviation=2 in another --workdir, or train for more epochs"
    )


def measure(test: Images, baseline: AViT | None, model: AViT, batch_size: int) -> tuple[dict[str, Any], Evaluation]:
    """The rows of the table, on the test images; the speeds of both models are timed in turn, on one batch.

    Returns the summary without `seconds`, and the evaluation of `model`. A row is named after its model's rule: "avit"
    is A-ViT's gate, "dense" a model without a rule. baseline: the other row, if it has another name. batch_size:
    images.
    """
    result = evaluate(model, test, batch_size, AUTO)
    rows = {_row_name(model): (model, result)}
    if baseline is not None and _row_name(baseline) not in rows:
        rows[_row_name(baseline)] = baseline, evaluate(baseline, test, batch_size, AUTO)
    count = min(batch_size, len(test))
    # Spread evenly over the set, because it may be sorted by class.
    timed = np.linspace(0, len(test) - 1, count).astype(int)
    batch = normalize(evaluation_images(test, timed, model.config), model.config)
    mesh = data_mesh(count)
    programs = [compile(row_model, count, mesh=mesh) for row_model, _ in rows.values()]
    speeds = images_per_second(programs, batch, mesh)
    summary: dict[str, Any] = {"images": len(test), "batch_size": count}
    for (name, (row_model, row)), program, speed in zip(rows.items(), programs, speeds, strict=True):
        summary[name] = {key: getattr(row, key) for key in SUMMARY_KEYS} | {"images_per_second": speed}
        if row_model.config.rule_in_force is not None:
            summary[name] |= {key: getattr(row, key) for key in DEPTH_KEYS}
            summary[name]["execution"] = program.execution
    return summary, result


def _row_name(model: AViT) -> str:
    rule = model.config.rule_in_force
    return "dense" if rule is None else rule.name


def _label(row: str) -> str:
    return RULES[row].label if row in RULES else row


def format_summary(summary: dict[str, Any]) -> str:
    """The table that train.py ends with."""
    rows = {name: row for name, row in summary.items() if isinstance(row, dict)}
    with_rule = [name for name in rows if name != "dense"]
    width = max([8, *(len(_label(name)) + 1 for name in rows)])
    lines = [f"{'':{width}}{'top-1':>8}{'top-5':>8}{'mean depth':>12}{'GMACs/image':>13}{'images/s':>10}"]
    for name in sorted(rows, key=lambda name: name != "dense"):
        row = rows[name]
        depth = f"{row['mean_depth']:.2f}" if "mean_depth" in row else "all"
        lines.append(
            f"{_label(name):{width}}{row['top1']:>8.2%}{row['top5']:>8.2%}{depth:>12}{row['gmacs']:>13.4f}"
            f"{row['images_per_second']:>10.0f}"
        )
    notes = ""
    for name in with_rule:
        row, label = rows[name], _label(name)
        lines.append(
            f"{label} uses {row['depth_fraction']:.0%} of its layers; depth deviates by {row['depth_std_tokens']:.2f} "
            f"layers between the tokens of an image, by {row['depth_std_images']:.2f} between images"
        )
        if name == "avit" and row["depth_fraction"] >= HARDLY_HALTS:
            lines.append(hardly_halts(row["mean_depth"] / row["depth_fraction"]))
        execution = row.get("execution", "packed")
        notes += f", {label} by {execution} execution ({EXECUTIONS[execution]})"
    lines.append(
        f"{summary['images']} test images; images/s at batch {summary['batch_size']}{notes}; "
        f"{summary['seconds']:.0f} s in all"
    )
    return "\n".join(lines)
