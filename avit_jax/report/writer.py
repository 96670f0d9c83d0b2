"""The report: numbers measured, pictures drawn, report.html and report.json written."""

import dataclasses
import datetime
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from avit_jax.data.sources import Split
from avit_jax.evaluation import Evaluation, evaluate
from avit_jax.files import write_json
from avit_jax.mesh import data_mesh
from avit_jax.model import AViT
from avit_jax.report import charts, gallery
from avit_jax.report.numbers import as_json, class_names, disagreements, evaluation_numbers
from avit_jax.report.page import render, write_page
from avit_jax.report.speed import environment, measure_speeds
from avit_jax.sweep import Sweep, unbeaten, with_gate

_FIXED = 6  # images that the sweep shows at every setting


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model and what it did on the data."""

    name: str  # of its checkpoint
    model: AViT
    result: Evaluation


def write_report(
    folder: Path,
    subject: Subject,
    split: Split,
    *,
    data: str,
    batch_size: int,
    baseline: Subject | None = None,
    sweep: Sweep | None = None,
) -> Path:
    """Write report.json and the page that shows it; returns the page's path.

    split: what both were evaluated on; data: its name. Runs a few images again for their pictures, measures images/s
    of all executions in turn, and evaluates every setting of the sweep.
    """
    model, result = subject.model, subject.result
    settings = _settings(model, split, batch_size, sweep) if sweep else []
    speeds = measure_speeds(_variants(subject, baseline, settings), split, batch_size)
    report: dict[str, Any] = {
        "created": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "environment": environment(),
        "data": {"name": data, "images": len(split), "labelled": result.labelled},
        "model": _describe(subject),
        **evaluation_numbers(result, model.config),
        "speed": speeds,
    }
    if baseline:
        report["baseline"] = {
            "model": _describe(baseline),
            **evaluation_numbers(baseline.result, baseline.model.config),
            "disagreements": disagreements(result, baseline.result),
        }
    if sweep:
        rates = speeds["images_per_second"]
        own = getattr(model.config, sweep.field)
        nearest = int(np.argmin([abs(value - own) for value in sweep.values]))
        report["sweep"] = {"field": sweep.field, "nearest": nearest, "settings": _judged(settings, rates)}
    report, frames = _galleries(as_json(report), subject, split, baseline)
    fixed = gallery.spread(result, _FIXED)
    pictures = {
        "frames": frames,
        "charts": _charts(report),
        "strip": gallery.strip(gallery.token_depths(model, split, [report["strip"]["image"]])[0], model.config)
        if model.config.halts
        else [],
        "sweep": [_sweep_frames(s["model"], split, fixed) for s in settings],
        "sweep_photos": gallery.frames(model, split, fixed.tolist()) if settings else {},
    }
    write_json(folder / "report.json", report)
    return write_page(folder, render(report, pictures))


def _describe(subject: Subject) -> dict[str, Any]:
    config = subject.model.config
    parameters = jax.tree.leaves(nnx.state(subject.model, nnx.Param))
    return {
        "name": subject.name,
        "halts": config.halts,
        "gate_scale": config.gate_scale,
        "gate_center": config.gate_center,
        "depth": config.depth,
        "embed_dim": config.embed_dim,
        "num_heads": config.num_heads,
        "num_classes": config.num_classes,
        "image_shape": config.image_shape,
        "patch_size": config.patch_size,
        "patch_grid": config.patch_grid,
        "num_tokens": config.num_tokens,
        "num_special": config.num_special,
        "parameters": sum(p.size for p in parameters),
        "dtype": config.dtype,
    }


def _variants(subject: Subject, baseline: Subject | None, settings: list[dict[str, Any]]) -> dict[str, Any]:
    """What is timed: dense is the model itself with the gate taken out."""
    model = subject.model
    variants = {"dense": (with_gate(model, gate_scale=None, gate_center=None), "masked")}
    if model.config.halts:
        variants |= {"masked": (model, "masked"), "packed": (model, "packed")}
    if baseline:
        variants["baseline"] = (baseline.model, "packed" if baseline.model.config.halts else "masked")
    return variants | {_key(s["value"]): (s["model"], "packed") for s in settings}


def _key(value: float) -> str:
    return f"setting {value:g}"


def _settings(model: AViT, split: Split, batch_size: int, sweep: Sweep) -> list[dict[str, Any]]:
    """Each setting with its model and figures."""
    mesh = data_mesh(batch_size)
    found = []
    for value in sweep.values:
        other = with_gate(model, **{sweep.field: value})
        result = evaluate(other, split, batch_size, "packed", mesh)
        names = ("top1", "mean_depth", "class_token_depth", "gmacs", "executed_gmacs")
        found.append({"value": value, "model": other} | {name: getattr(result, name) for name in names})
    return found


def _judged(settings: list[dict[str, Any]], rates: dict[str, float]) -> list[dict[str, Any]]:
    """The settings with their speeds, and whether another one is at least as good for at most the cost."""
    rows = [
        {name: value for name, value in s.items() if name != "model"} | {"images_per_second": rates[_key(s["value"])]}
        for s in settings
    ]
    top1 = [row["top1"] for row in rows]
    costs = {"gmacs": [row["gmacs"] for row in rows], "images_per_second": [-row["images_per_second"] for row in rows]}
    marks = {name: unbeaten(top1, cost) for name, cost in costs.items()}
    return [row | {"unbeaten": {name: bool(mark[i]) for name, mark in marks.items()}} for i, row in enumerate(rows)]


def _galleries(
    report: dict[str, Any], subject: Subject, split: Split, baseline: Subject | None
) -> tuple[dict[str, Any], dict[int, gallery.Frame]]:
    """The report with the images that the page shows, and their frames."""
    result, config = subject.result, subject.model.config
    chosen: dict[str, np.ndarray] = {}
    if config.halts:
        chosen = {"easiest": gallery.easiest(result), "hardest": gallery.hardest(result)}
        strip = int(np.argmax(result.per_image.depth_std))
        report["strip"] = _image(strip, subject)
    if result.labelled:
        chosen["confidently_wrong"] = gallery.confidently_wrong(result)
    if baseline:
        chosen["disagreeing"] = gallery.disagreeing(result, baseline.result)
    report["galleries"] = {
        name: [_image(int(index), subject, baseline) for index in indices] for name, indices in chosen.items()
    }
    shown = [int(index) for indices in chosen.values() for index in indices]
    if config.halts:
        shown.append(strip)
    return report, gallery.frames(subject.model, split, shown)


def _image(index: int, subject: Subject, baseline: Subject | None = None) -> dict[str, Any]:
    """What is said under a picture."""
    images, names = subject.result.per_image, class_names(subject.model.config)
    label = int(images.label[index])
    found = {
        "image": index,
        "label": names[label] if label >= 0 else None,
        "prediction": names[int(images.prediction[index])],
        "right": bool(images.rank[index] <= 1) if label >= 0 else None,
        "confidence": float(images.confidence[index]),
        "mean_depth": float(images.mean_depth[index]),
    }
    if baseline:
        found["baseline"] = names[int(baseline.result.per_image.prediction[index])]
        found["baseline_confidence"] = float(baseline.result.per_image.confidence[index])
    return as_json(found)


def _sweep_frames(model: AViT, split: Split, fixed: np.ndarray) -> list[tuple[int, str, float]]:
    """(image, map, mean depth) of the fixed images at one setting."""
    depths = gallery.token_depths(model, split, fixed.tolist())
    return [
        (int(index), gallery.map_uri(depth, model.config), float(depth.mean()))
        for index, depth in zip(fixed, depths, strict=True)
    ]


def _charts(report: dict[str, Any]) -> dict[str, Any]:
    """The charts that this report has numbers for."""
    found = {}
    if report["model"]["halts"]:
        means = {name: report["summary"][name]["value"] for name in ("mean_depth", "class_token_depth")}
        found["by_layer"] = charts.by_layer(report["by_layer"], means["mean_depth"])
        found["class_token"] = charts.class_token(report["class_token"], means["class_token_depth"])
        found["position_map"] = charts.position_map(report["by_position"])
        if "by_depth" in report:
            found["accuracy_by_depth"] = charts.accuracy_by_depth(report["by_depth"])
    if "calibration" in report:
        found["reliability"] = charts.reliability(report["calibration"]["bins"])
    if "sweep" in report and report["data"]["labelled"]:
        found |= _sweep_charts(report)
    return found


def _sweep_charts(report: dict[str, Any]) -> dict[str, Any]:
    settings, reference = report["sweep"]["settings"], None
    if "baseline" in report:
        figures = report["baseline"]["summary"]
        reference = {
            "name": "baseline",
            "top1": figures["top1"]["value"],
            "gmacs": figures["gmacs"]["value"],
            "images_per_second": report["speed"]["images_per_second"]["baseline"],
        }
    return {
        "sweep_speed": charts.trade_off(settings, "images_per_second", "images/s, packed, measured", reference),
        "sweep_gmacs": charts.trade_off(settings, "gmacs", "GMACs per image", reference),
    }
