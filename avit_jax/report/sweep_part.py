"""The sweep's part of the page: the evaluation of every setting, its figures, its charts."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from avit_jax.data.sources import Images
from avit_jax.evaluate.figures import evaluate
from avit_jax.evaluate.sweep import Sweep, unbeaten, with_setting
from avit_jax.execution.program import AUTO
from avit_jax.model.vit import AViT
from avit_jax.report import charts
from avit_jax.runtime.bars import Steps
from avit_jax.runtime.mesh import data_mesh


@dataclasses.dataclass(frozen=True)
class Setting:
    """One setting: the model under it, and its figures."""

    value: float
    model: AViT
    figures: dict[str, float]


def setting_name(setting: Setting) -> str:
    """The name of the setting among the timed ones."""
    return f"setting {setting.value!r}"


def evaluate_settings(model: AViT, split: Images, batch_size: int, sweep: Sweep, steps: Steps) -> list[Setting]:
    """Evaluate every setting on the whole data set; steps has a kind "evaluation", one for each."""
    mesh = data_mesh(batch_size)
    found = []
    for value in sweep.values:
        other = with_setting(model, sweep.field, value)
        with steps.step("evaluation", f"evaluating {sweep.field} {value:g}"):
            result = evaluate(other, split, batch_size, AUTO, mesh)
        names = ("top1", "mean_depth", "class_token_depth", "gmacs", "executed_gmacs")
        found.append(Setting(value, other, {name: getattr(result, name) for name in names}))
    return found


def sweep_numbers(
    sweep: Sweep,
    settings: Sequence[Setting],
    model: AViT,
    rates: dict[str, float],
    fixed: Sequence[int],
    maps: Sequence[np.ndarray],
) -> dict[str, Any]:
    """The settings with their speeds, the depths of the fixed images, and whether each is Pareto-optimal.

    rates: images/s by setting_name. fixed: indices of the images shown at every setting. maps: their token depths, by
    setting.
    """
    own = getattr(model.config.rule_in_force, sweep.field)
    speeds = [rates[setting_name(setting)] for setting in settings]
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
    if own is None:  # ATS then takes as many samples as there are patches
        own = model.config.num_tokens - model.config.num_special
    nearest = int(np.argmin([abs(setting.value - np.mean(own)) for setting in settings]))
    said = ", ".join(f"{value:g}" for value in np.atleast_1d(own))  # ToMe may have a number for each layer
    return {"field": sweep.field, "own": said, "nearest": nearest, "settings": rows}


def sweep_charts(report: dict[str, Any]) -> dict[str, Any]:
    """Accuracy against speed and against work, with the baseline if the report has one."""
    settings, reference = report["sweep"]["settings"], None
    if "baseline" in report:
        figures = report["baseline"]["summary"]
        reference = {
            "name": "baseline",
            "top1": figures["top1"]["value"],
            "gmacs": figures["gmacs"]["value"],
            "images_per_second": report["sweep"]["baseline_images_per_second"],
        }
    measured = f"images/s, {report['model']['execution']}, measured"
    return {
        "sweep_speed": charts.trade_off(settings, "images_per_second", measured, reference),
        "sweep_gmacs": charts.trade_off(settings, "gmacs", "GMACs per image", reference),
    }
