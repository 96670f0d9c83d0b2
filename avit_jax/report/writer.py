"""The report: numbers measured, pictures drawn, report.html and report.json written."""

import dataclasses
import datetime
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from avit_jax.data.sources import Images
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


@dataclasses.dataclass(frozen=True)
class _Setting:
    """One gate setting: the model under it, and its figures."""

    value: float
    model: AViT
    figures: dict[str, float]


def write_report(
    folder: Path,
    subject: Subject,
    split: Images,
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
    speeds = measure_speeds(_variants(subject, baseline, settings), split, result.per_image.index, batch_size)
    report: dict[str, Any] = {
        "created": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "environment": environment(),
        "data": {"name": data, "images": result.images, "labelled": result.labelled},
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
    chosen = _chosen(subject, baseline)
    report["galleries"] = {name: [_image(i, subject, baseline) for i in indices] for name, indices in chosen.items()}
    shown = {image["image"] for images in report["galleries"].values() for image in images}
    pictures: dict[str, Any] = {}
    if model.config.halts:
        widest = int(np.argmax(result.per_image.depth_std))
        report["strip"] = _image(widest, subject)
        (depth,) = gallery.token_depths(model, split, [report["strip"]["image"]])
        report["strip"]["alive"] = gallery.alive(depth, model.config)
        pictures["covers"] = gallery.covers(depth, model.config)
        shown.add(report["strip"]["image"])
    if sweep:
        fixed = result.per_image.index[gallery.spread(result, _FIXED)].tolist()
        maps = [gallery.token_depths(setting.model, split, fixed) for setting in settings]
        report["sweep"] = _sweep_numbers(sweep, settings, model, speeds["images_per_second"], fixed, maps)
        pictures["sweep"] = [[gallery.map_uri(depth, model.config) for depth in depths] for depths in maps]
        shown.update(fixed)
    report = as_json(report)
    pictures |= {"frames": gallery.frames(model, split, sorted(shown)), "charts": _charts(report)}
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


def _variants(subject: Subject, baseline: Subject | None, settings: Sequence[_Setting]) -> dict[str, tuple[AViT, str]]:
    """What is timed: dense is the model itself with the gate taken out."""
    model = subject.model
    variants = {"dense": (with_gate(model, gate_scale=None, gate_center=None), "masked")}
    if model.config.halts:
        variants |= {"masked": (model, "masked"), "packed": (model, "packed")}
    if baseline:
        variants["baseline"] = (baseline.model, "packed" if baseline.model.config.halts else "masked")
    return variants | {_key(setting): (setting.model, "packed") for setting in settings}


def _key(setting: _Setting) -> str:
    return f"setting {setting.value:g}"


def _settings(model: AViT, split: Images, batch_size: int, sweep: Sweep) -> list[_Setting]:
    mesh = data_mesh(batch_size)
    found = []
    for value in sweep.values:
        other = with_gate(model, **{sweep.field: value})
        result = evaluate(other, split, batch_size, "packed", mesh)
        names = ("top1", "mean_depth", "class_token_depth", "gmacs", "executed_gmacs")
        found.append(_Setting(value, other, {name: getattr(result, name) for name in names}))
    return found


def _sweep_numbers(
    sweep: Sweep,
    settings: Sequence[_Setting],
    model: AViT,
    rates: dict[str, float],
    fixed: Sequence[int],
    maps: Sequence[np.ndarray],
) -> dict[str, Any]:
    """The settings with their speeds, the depths of the fixed images, and whether nothing beats them."""
    own = getattr(model.config, sweep.field)
    speeds = [rates[_key(setting)] for setting in settings]
    top1 = [setting.figures["top1"] for setting in settings]
    costs = {"gmacs": [setting.figures["gmacs"] for setting in settings], "images_per_second": [-s for s in speeds]}
    marks = {name: unbeaten(top1, cost) for name, cost in costs.items()}
    rows = [
        {
            "value": setting.value,
            **setting.figures,
            "images_per_second": speeds[i],
            "unbeaten": {name: bool(mark[i]) for name, mark in marks.items()},
            "images": [
                {"image": index, "mean_depth": float(depth.mean())} for index, depth in zip(fixed, maps[i], strict=True)
            ],
        }
        for i, setting in enumerate(settings)
    ]
    nearest = int(np.argmin([abs(setting.value - own) for setting in settings]))
    return {"field": sweep.field, "nearest": nearest, "settings": rows}


def _chosen(subject: Subject, baseline: Subject | None) -> dict[str, list[int]]:
    """The images that the page shows, by their place in the evaluation: found from the few numbers kept of each."""
    result = subject.result
    chosen = {}
    if subject.model.config.halts:
        chosen = {"easiest": gallery.easiest(result), "hardest": gallery.hardest(result)}
    if result.labelled:
        chosen["confidently_wrong"] = gallery.confidently_wrong(result)
    if baseline:
        chosen["disagreeing"] = gallery.disagreeing(result, baseline.result)
    return {name: indices.tolist() for name, indices in chosen.items()}


def _image(place: int, subject: Subject, baseline: Subject | None = None) -> dict[str, Any]:
    """What is said under a picture."""
    images, names = subject.result.per_image, class_names(subject.model.config)
    label = int(images.label[place])
    found = {
        "image": int(images.index[place]),
        "label": names[label] if label >= 0 else None,
        "prediction": names[int(images.prediction[place])],
        "right": bool(images.rank[place] <= 1) if label >= 0 else None,
        "confidence": float(images.confidence[place]),
        "mean_depth": float(images.mean_depth[place]),
    }
    if baseline:
        found["baseline"] = names[int(baseline.result.per_image.prediction[place])]
        found["baseline_confidence"] = float(baseline.result.per_image.confidence[place])
    return as_json(found)


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
