"""Writing the report: numbers are measured, pictures drawn, report.html and report.json written."""

import contextlib
import dataclasses
import datetime
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from avit_jax.data.sources import Images
from avit_jax.evaluate.figures import Evaluation
from avit_jax.evaluate.sweep import Sweep
from avit_jax.execution.program import AUTO, choose, fitting_executions
from avit_jax.execution.work import whole_gmacs
from avit_jax.model.config import NO_RULE, AViTConfig
from avit_jax.model.vit import AViT
from avit_jax.report import charts, gallery
from avit_jax.report.depth_colours import legend
from avit_jax.report.names import class_names, verdict
from avit_jax.report.numbers import as_json, disagreements, evaluation_numbers, only_layer
from avit_jax.report.page import render, write_page
from avit_jax.report.sweep_part import Setting, evaluate_settings, setting_name, sweep_charts, sweep_numbers
from avit_jax.report.throughput import ROUNDS, Variants, batch_sizes, environment, measure_at, measure_speeds
from avit_jax.runtime.bars import Steps
from avit_jax.runtime.files import writable_folder, write_json

# Seconds of each kind of step for a small model on two CPU cores, used until one has been timed.
_GUESSES = {"evaluation": 10.0, "batch": 10.0, "setting": 5.0, "round": 5.0, "page": 5.0}
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
    split: Images,
    *,
    data: str,
    batch_size: int,
    baseline: Subject | None = None,
    sweep: Sweep | None = None,
) -> Path:
    """Write report.json and the page that shows it; returns the page's path.

    split: what both models were evaluated on. data: its name. batch_size: of the evaluation. baseline: a model to
    compare with. sweep: settings to try. Runs a few images again for their pictures, measures images/s of all
    executions in turn, and evaluates every setting of the sweep. Shows its progress on stderr. Raises ValueError if the
    folder is not writable.
    """
    folder = writable_folder(folder)  # fails before the minutes of work
    model, result = subject.model, subject.result
    index = result.per_image.index
    count = len(sweep.values) if sweep else 0
    timed_settings = count + 1 if sweep and baseline else count
    kinds = {
        "evaluation": count,
        "setting": timed_settings,
        "batch": len(batch_sizes(batch_size, len(index))),
        "page": 1,
    }
    kinds["round"] = 2 * ROUNDS if sweep else ROUNDS
    with contextlib.closing(Steps("report", kinds, _GUESSES)) as steps:
        settings = evaluate_settings(model, split, batch_size, sweep, steps) if sweep else []
        speeds = measure_speeds(_variants(subject, baseline), split, index, batch_size, steps)
        if model.config.rule_in_force is not None:
            speeds["saved_work"] = _saved_work(result, model.config, batch_size)
        rates: dict[str, float] = {}
        if settings:
            # All settings run at one batch size, the best of the checkpoint's own, so that only the setting differs.
            # The baseline is in the same chart, so it is timed again in turn with them.
            timed: dict[str, tuple[AViT, str]] = {setting_name(s): (s.model, AUTO) for s in settings}
            batches = dict.fromkeys(timed, speeds["best_batch"][_own_execution(model.config)])
            if baseline:
                timed["baseline"] = _variants(subject, baseline)["baseline"]
                batches["baseline"] = speeds["best_batch"]["baseline"]
            rates = measure_at(batches, timed, split, index, steps)
        with steps.step("page", "pictures and charts"):
            return _write_page(folder, subject, split, data, baseline, sweep, settings, speeds, rates)


def _write_page(
    folder: Path,
    subject: Subject,
    split: Images,
    data: str,
    baseline: Subject | None,
    sweep: Sweep | None,
    settings: Sequence[Setting],
    speeds: dict[str, Any],
    rates: dict[str, float],
) -> Path:
    model, result = subject.model, subject.result
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
    stops = model.config.rule_in_force is not None and model.config.gates is None  # gates let tokens come back
    if stops and only_layer(result.depth_histogram) is None:
        widest = int(np.argmax(result.per_image.depth_std))
        report["strip"] = _image(widest, subject)
        (depth,) = gallery.token_depths(model, split, [report["strip"]["image"]])
        report["strip"]["alive"] = gallery.alive(depth, model.config)
        pictures["covers"] = gallery.covers(depth, model.config)
        shown.add(report["strip"]["image"])
    if sweep:
        fixed = result.per_image.index[gallery.spread(result, _FIXED)].tolist()
        maps = [gallery.token_depths(setting.model, split, fixed) for setting in settings]
        report["sweep"] = sweep_numbers(sweep, settings, model, rates, fixed, maps)
        report["sweep"]["batch"] = speeds["best_batch"][_own_execution(model.config)]
        if baseline:
            report["sweep"]["baseline_images_per_second"] = rates["baseline"]
        pictures["sweep"] = [[gallery.map_uri(depth, model.config) for depth in depths] for depths in maps]
        shown.update(fixed)
    report = as_json(report)
    pictures |= {"frames": gallery.frames(model, split, sorted(shown)), "charts": _charts(report)}
    pictures["legend"] = legend(model.config.depth)
    write_json(folder / "report.json", report)
    return write_page(folder, render(report, pictures))


def _describe(subject: Subject) -> dict[str, Any]:
    config = subject.model.config
    rule = config.rule_in_force
    parameters = jax.tree.leaves(nnx.state(subject.model, nnx.Param))
    return {
        "name": subject.name,
        "rule": None if rule is None else rule.name,
        "rule_text": None if rule is None else rule.describe(),
        "execution": _own_execution(config),
        "halts": config.halts,
        "gated": config.gates is not None,
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
        "distilled": config.distilled,
        # Without a class token, or with a head that reads all patches, the answer does not come from the class token.
        "class_token": config.class_token,
        "pool": config.pool,
        "parameters": sum(p.size for p in parameters),
        "dtype": config.dtype,
    }


def _own_execution(model_config: AViTConfig) -> str:
    """The execution that the page compares with dense."""
    return choose(model_config).execution


def _saved_work(result: Evaluation, model_config: AViTConfig, batch_size: int) -> dict[str, Any]:
    """How much faster the model's execution would be if only multiply-adds took time: dense's divided by its own.

    After a packed evaluation, its own are those executed, padding included. A masked evaluation executes all of them,
    so those of the rule are used.
    """
    whole = whole_gmacs(model_config)
    counted = result.executed_gmacs < whole
    gmacs = result.executed_gmacs if counted else result.gmacs
    return {"allows": whole / gmacs, "share": gmacs / whole, "padding_counted": counted, "batch": batch_size}


def _variants(subject: Subject, baseline: Subject | None) -> Variants:
    """What is timed: dense, which is the model itself without its rule; then each execution of the rule."""
    model = subject.model
    variants = {"dense": (model.with_config(**NO_RULE), AUTO)}
    if model.config.rule_in_force is not None:
        # Planned execution is left out: it needs a plan, and no images of the page's are there to make it from.
        executions = sorted(set(fitting_executions(model.config)) - {"planned"})
        variants |= {execution: (model, execution) for execution in executions}
    if baseline:
        variants["baseline"] = (baseline.model, _own_execution(baseline.model.config))
    return variants


def _chosen(subject: Subject, baseline: Subject | None) -> dict[str, list[int]]:
    """The images that the page shows, by their place in the evaluation; chosen from the numbers kept of each image."""
    result = subject.result
    chosen = {}
    if subject.model.config.rule_in_force is not None and np.ptp(result.image_depths) > 0:
        chosen = {"fewest_layers": gallery.shallowest(result), "most_layers": gallery.deepest(result)}
    if result.labelled:
        chosen["confidently_wrong"] = gallery.confidently_wrong(result)
    if baseline:
        chosen["disagreeing"] = gallery.disagreeing(result, baseline.result)
    return {name: indices.tolist() for name, indices in chosen.items()}


def _image(place: int, subject: Subject, baseline: Subject | None = None) -> dict[str, Any]:
    """The data of a picture's caption."""
    images, names = subject.result.per_image, class_names(subject.model.config)
    number = int(images.label[place])
    prediction, label = names[int(images.prediction[place])], names[number] if number >= 0 else None
    right = bool(images.rank[place] <= 1) if label is not None else None
    found = {
        "image": int(images.index[place]),
        "label": label,
        "prediction": prediction,
        "right": right,
        "said": verdict(prediction, label, right),
        "confidence": float(images.confidence[place]),
        "mean_depth": float(images.mean_depth[place]),
    }
    if baseline:
        found["baseline"] = names[int(baseline.result.per_image.prediction[place])]
        found["baseline_confidence"] = float(baseline.result.per_image.confidence[place])
    return as_json(found)


def _charts(report: dict[str, Any]) -> dict[str, Any]:
    """The charts that this report has numbers for. One bar or one point gets no chart, but a sentence."""
    found = {}
    model, summary = report["model"], report["summary"]
    if model["rule"]:
        if only_layer([row["stopped"] for row in report["by_layer"]]) is None:
            found["by_layer"] = charts.by_layer(report["by_layer"], summary["mean_depth"]["value"], not model["gated"])
            found["position_map"] = charts.position_map(report["by_position"], model["depth"])
        if model["class_token"] and not model["gated"] and only_layer(report["class_token"]) is None:
            found["class_token"] = charts.class_token(report["class_token"], summary["class_token_depth"]["value"])
        if "by_depth" in report and not summary["one_depth"]:
            found["accuracy_by_depth"] = charts.accuracy_by_depth(report["by_depth"])
    if "calibration" in report and len(report["calibration"]["bins"]) > 1:
        found["reliability"] = charts.reliability(report["calibration"]["bins"])
    if "sweep" in report and report["data"]["labelled"] and len(report["sweep"]["settings"]) > 1:
        found |= sweep_charts(report)
    return found
