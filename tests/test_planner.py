"""Training by planned execution: the same steps as masked training, plans from recent batches, exact resumption."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from avit_jax import Gates, PlannedPlan
from avit_jax.commands.dry_run import dry_run
from avit_jax.commands.run import run
from avit_jax.commands.typed_config import parse
from avit_jax.execution.plan import layer_loads
from avit_jax.execution.stages import Stage, sorted_loads
from avit_jax.halting.act import ACT
from avit_jax.halting.pondernet import PonderNet
from avit_jax.model.config import NO_RULE
from avit_jax.reduction.dynamicvit import DynamicViT
from avit_jax.reduction.tome import ToMe
from avit_jax.runtime.mesh import data_mesh
from avit_jax.train import loop as training
from avit_jax.train import planner as planning
from avit_jax.train.planner import Planner, plans
from avit_jax.train.progress import Progress
from tests.harness.builders import small_config, tiny_experiment
from tests.harness.devices import run_on_devices
from tests.test_stopping import train
from tests.test_training import kill_in_step, leaves, lines_without_times

CONFIG = small_config(image_size=32)  # 65 tokens, 4 layers
MESH = data_mesh(1)


@pytest.mark.slow
@pytest.mark.parametrize("devices", [2, 8])
def test_steps_are_those_of_masked_training(devices: int) -> None:
    """Gradients, metrics and the moving average, with every kind of noise, on one device and more; also overflow."""
    assert f"{devices} devices agree" in run_on_devices("planned_step_on_devices.py", devices)


# Runs


def plan_often(patch: pytest.MonkeyPatch) -> None:
    """Plans after every two steps, if the rest of the run saves more than a tenth of a step."""
    patch.setattr(training, "WINDOW", 2)
    patch.setattr(planning, "WINDOW", 2)
    patch.setattr(planning, "_COMPILATION", 0.1)


def experiment(folder: Path, execution: str) -> ConfigDict:
    """16 patches, most of which stop before the last of three layers."""
    config = tiny_experiment(folder / "toy.npz")
    config.model.update({"patch_size": 2, "gate_center": -4.0, "drop_path_rate": 0.3})
    config.log_every = 1
    config.execution = execution
    return config


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A planned run that nobody stopped, beside a masked one."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        plan_often(patch)
        for execution in ("masked", "planned"):
            train(experiment(folder, execution), folder / execution)
    return folder


@pytest.mark.slow
def test_a_planned_run_is_the_masked_run(whole: Path) -> None:
    masked, found = (lines_without_times(whole / name) for name in ("masked", "planned"))
    assert len(masked) == len(found)
    for a, b in zip(masked, found, strict=True):
        assert a.keys() == b.keys()
        for name, value in a.items():
            if name != "split":
                np.testing.assert_allclose(b[name], value, atol=1e-5, rtol=1e-5, err_msg=f"{name}, step {a['step']}")
    for a, b in zip(leaves(whole / "masked"), leaves(whole / "planned"), strict=True):
        np.testing.assert_allclose(b, a, atol=1e-4)


@pytest.mark.slow
def test_shapes_are_planned_and_kept_with_the_checkpoint(whole: Path) -> None:
    files = (whole / name / "checkpoints" / "8" / "step" / "metadata" for name in ("masked", "planned"))
    kept = [json.loads(file.read_text()) for file in files]
    assert "planning" not in kept[0], "as older versions wrote it"
    assert kept[1]["planning"]["plans"] >= 1
    plan = PlannedPlan.from_json(kept[1]["planning"]["plan"])
    assert plan.num_tokens == 17 and plan.share() < 1
    assert plan.groups == 2 and len(plan.stages) <= 4, "a small model's plan compiles in half the time"


@pytest.mark.slow
def test_a_stopped_run_goes_on_bit_for_bit(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed between a checkpoint and the end of a window, and with a plan in force."""
    plan_often(monkeypatch)
    config = experiment(whole, "planned")
    for step in (4, 7):
        kill_in_step(step, lambda: train(config, tmp_path / "stopped"), monkeypatch)
    train(config, tmp_path / "stopped")
    for options in ({}, {"ema": True}):
        pairs = (leaves(folder / "checkpoints", **options) for folder in (whole / "planned", tmp_path / "stopped"))
        for a, b in zip(*pairs, strict=True):
            np.testing.assert_array_equal(a, b)
    assert lines_without_times(whole / "planned") == lines_without_times(tmp_path / "stopped")


def test_a_dry_run_of_planned_training(tmp_path: Path) -> None:
    lines = "\n".join(dry_run(experiment(tmp_path, "planned")))
    assert "step 2    loss" in lines


def test_a_rule_that_masks_nothing_in_training_is_refused(tmp_path: Path) -> None:
    config = experiment(tmp_path, "planned")
    config.model.rule = "pondernet"
    config.model.gate_scale = config.model.gate_center = None
    with pytest.raises(ValueError, match="config.execution is planned and the rule is pondernet: .*=masked"):
        run(config, tmp_path / "run")


# Plans


@pytest.mark.parametrize(
    ("fields", "fits"),
    [
        ({}, True),
        (NO_RULE | {"rule": ACT()}, True),
        (NO_RULE | {"rule": PonderNet(0.3)}, False),
        (NO_RULE | {"rule": ToMe(1)}, False),
        (NO_RULE | {"rule": DynamicViT(0.7, (1,))}, False),
        (NO_RULE, False),
    ],
)
def test_who_plans(fields: dict[str, Any], fits: bool) -> None:
    config = small_config(**fields)
    assert not plans("masked", config, 10**6, MESH)
    assert not plans("auto", config, 999, MESH), "compiling takes longer than a short run saves"
    assert plans("auto", config, 1000, MESH) == fits
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "process_count", lambda: 2)
        assert not plans("auto", config, 1000, MESH), "not measured with several processes"
    if fits:
        assert plans("planned", config, 8, MESH)
    else:
        with pytest.raises(ValueError, match="training with it masks no token that could be removed; give config"):
            plans("planned", config, 8, MESH)


def test_gates_have_no_plan() -> None:
    config = small_config(**NO_RULE | {"rule": Gates()})
    assert not plans("auto", config, 1000, MESH)
    with pytest.raises(ValueError, match="the rule is gates: gates let tokens come back; give config.execution=masked"):
        plans("planned", config, 8, MESH)


def test_the_loads_of_a_step_are_those_of_layer_loads() -> None:
    """The largest of two devices, image by image in sorted order."""
    rng = np.random.default_rng(0)
    for fields in ({}, {"distilled": True}, {"pool": "norm_mean"}):
        config = small_config(**fields)
        depths = rng.integers(0, 5, (6, config.num_tokens))
        found = sorted_loads(jnp.asarray(depths), config, 2)
        halves = np.split(layer_loads(depths, config, image_exit=False), 2, axis=1)
        np.testing.assert_array_equal(found, np.maximum(*(np.sort(half, axis=1) for half in halves)))


def counts(*loads: int, overflow: bool = False) -> dict[str, Any]:
    """Of a step in which all images of a device have these loads in the four layers."""
    return {"loads": np.tile(np.array(loads)[:, None], (1, 8)), "overflow": overflow}


def planner(steps: int = 10_000) -> Planner:
    return Planner(CONFIG, 8, steps)


def test_a_plan_is_made_when_places_can_be_saved() -> None:
    found = planner()
    assert not found.renewed(50), "no step was seen"
    found.saw(counts(65, 65, 65, 65))
    assert not found.renewed(100) and found.plan is None, "nothing halts"
    found.saw(counts(65, 20, 10, 2))
    found.saw(counts(65, 10, 20, 1))
    assert found.renewed(150)
    assert found.plan is not None and found.plans == 1
    found.plan.check(CONFIG, 8)
    said = f"shapes are planned for {100 * found.plan.share():.0f}% of all tokens; groups of 1 image,"
    assert str(found).startswith(said)
    assert found.plan.fits(np.tile(np.array([65, 20, 20, 2])[:, None], (1, 8))), "the fullest of both steps"
    assert not found.plan.fits(np.tile(np.array([65, 40, 20, 2])[:, None], (1, 8)))
    found.saw(counts(65, 19, 19, 2))
    assert not found.renewed(9700), "a program is not compiled for so little"
    found.saw(counts(65, 40, 20, 2, overflow=True))
    assert not found.renewed(9700), "one step that did not fit, and few are left"
    for _ in range(8):
        found.saw(counts(65, 40, 20, 2, overflow=True))
    assert found.renewed(200) and found.plans == 2, "some steps did not fit, and many are left"
    assert found.plan.fits(np.tile(np.array([65, 40, 20, 2])[:, None], (1, 8)))


def test_plans_are_not_made_without_end() -> None:
    found = planner()
    for window in range(1, 40):
        for _ in range(10):
            found.saw(counts(65, 20 + window, 20, 2, overflow=found.plan is not None))
        found.renewed(50 * window)
    assert found.plans == planning.MOST_PLANS and found.plan is not None
    for steps, given_up in ((10, False), (40, True)):
        for _ in range(steps):
            found.saw(counts(65, 65, 65, 65, overflow=True))
        assert found.renewed(2000) == given_up, "a plan is given up when it costs more than masked steps"
    assert found.plan is None and str(found) == "every token is computed"
    found = planner(steps=1000)
    found.saw(counts(65, 10, 10, 2))
    assert found.renewed(50) and found.plan is not None
    for _ in range(45):
        found.saw(counts(65, 65, 65, 56, overflow=True))
    assert found.renewed(100) and found.plan is None, "a plan for nearly all places would not pay"
    late = planner(steps=100)
    late.saw(counts(65, 2, 2, 2))
    assert not late.renewed(50) and late.plan is None, "compiling takes longer than 50 steps save"


def test_what_a_checkpoint_keeps_of_planning() -> None:
    found = planner()
    found.saw(counts(65, 20, 10, 2))
    found.renewed(50)
    for _ in range(3):
        found.saw(counts(65, 21, 10, 2, overflow=True))
    kept = json.loads(json.dumps(found.to_json()))
    other = planner()
    other.take(kept)
    assert json.loads(json.dumps(other.to_json())) == kept and other.plan == found.plan
    assert other.renewed(100) and found.renewed(100) and other.plan == found.plan
    other.take(kept | {"images": 4})
    assert other == planner(), "other devices have other numbers of images: from the beginning"
    read = Progress.from_json(Progress(planning=kept).to_json(), 0)
    assert read.planning == kept


@pytest.mark.parametrize(
    "change",
    [
        {"plan": {}},
        {"plan": 3},
        {"plans": None},
        {"plans": -1},
        {"images": "8"},
        {"overflows": True},
        {"fullest": [[1]]},
        {"fullest": "many"},
        {"fullest": [[0.5] * 8] * 4},
        None,
    ],
)
def test_damaged_planning_is_refused(change: dict[str, Any] | None) -> None:
    found = planner()
    found.saw(counts(65, 20, 10, 2))
    kept = found.to_json()
    with pytest.raises(ValueError, match="planning: "):
        found.take(kept | change if change is not None else {})
    plan = PlannedPlan(65, 4, 4, 2, (Stage(0, (65, 65)),))
    with pytest.raises(ValueError, match="4 images on a device, and this is 65, 4 and 8"):
        found.take(kept | {"plan": dataclasses.asdict(plan)})


def test_settings_name_the_executions_of_training() -> None:
    with pytest.raises(ValueError, match="config.execution 'packed' is unknown: choose 'masked', 'planned' or 'auto'"):
        parse(ConfigDict({"execution": "packed"}))
