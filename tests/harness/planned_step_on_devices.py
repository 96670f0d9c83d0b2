"""Run by test_planner.py with 2 or 8 devices: planned steps against masked ones, with every kind of noise."""

import dataclasses
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import jax
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType

from avit_jax import PlannedPlan, Preprocessing
from avit_jax.commands.typed_config import parse
from avit_jax.execution.stages import Stage
from avit_jax.runtime.mesh import global_batch
from avit_jax.train.state import initial_state, teacher_weights
from avit_jax.train.step import make_train_step
from configs import npz_avit
from tests.harness.builders import small_config, spread_gate

DEVICES = len(jax.devices())
IMAGES = {2: 12, 8: 16}[DEVICES]  # 3 for each device in each of two parts, or 1
noise = {"drop_path_rate": 0.2, "drop_rate": 0.2}
fields = {"preprocessing": Preprocessing((0.5, 0.4), (0.2, 0.3)), "distilled": True}
model = spread_gate(small_config(**noise, **fields), factor=2.0)
teacher = spread_gate(small_config(**fields), seed=1)
rng = np.random.default_rng(0)
images = rng.integers(0, 256, (IMAGES, 12, 8, 2)) * (0.2 + np.arange(IMAGES) / IMAGES)[:, None, None, None]
batch = {
    "image": images.clip(0, 255).astype(np.uint8),
    "label": (np.arange(IMAGES) % 5).astype(np.int32),
    "weight": np.where(np.arange(IMAGES) == 5, 0, 1).astype(np.float32),
}
# The gradient is kept as the optimizer's state; the weights move along it, so that the moving average has moved too.
keep = optax.GradientTransformation(
    optax.tree.zeros_like, lambda grads, _, params: (optax.tree.scale(-0.1, grads), grads)
)
config = npz_avit.get_config("")
config.accumulation, config.teacher = 2, "given to the step"
config.optim.ema_decay = 0.5
config.augment.update({"mixup": 0.8})
config.loss.update({"distillation": "hard", "ponder_weight": 0.1, "prior_weight": 0.1, "prior_target_depth": 2.0})


def step(devices: int, plan: PlannedPlan | None) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """The gradient and the moving average as vectors, and the metrics."""
    axes, types = ("data", "fsdp"), (AxisType.Auto, AxisType.Auto)
    mesh = jax.make_mesh((devices, 1), axes, axis_types=types, devices=jax.devices()[:devices])
    state = initial_state(model, keep, 0.5, mesh)
    settings = dataclasses.replace(parse(config).step, counts=True)
    run = make_train_step(nnx.graphdef(model), keep, settings, mesh, state, nnx.graphdef(teacher), plan)
    state, metrics = run(state, global_batch(batch, mesh), teacher_weights(teacher, mesh))

    def vector(tree: Any) -> np.ndarray:
        return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])

    return vector(state.optimizer), vector(state.ema), jax.device_get(metrics)


def fitted(loads: np.ndarray, missing: int = 0) -> PlannedPlan:
    """Two stages without a place to spare in any group; places are missing in the second's fullest. loads: sorted."""
    most = np.pad(loads, ((0, 0), (loads.shape[1] % 2, 0))).reshape(4, -1, 2).max(-1)
    most[2, -1] -= missing
    stages = tuple(Stage(first, tuple(map(int, most[first]))) for first in (0, 2))
    return PlannedPlan(8, 4, loads.shape[1], 2, stages)


gradient, average, metrics = step(1, None)
loads = metrics["counts"]["loads"]
assert loads.shape == (4, IMAGES // 2) and loads[3].sum() < 0.8 * loads[0].sum(), loads
assert not metrics["counts"]["overflow"] and len(set(metrics["halting_by_layer"].round(3))) == 4
fullest = loads[:, -(IMAGES // 2 // DEVICES) :]  # the images of a device in a part are never fuller
plans = ((1, fitted(loads), 0), (DEVICES, fitted(fullest), 0), (DEVICES, fitted(fullest, missing=1), 1))
for devices, plan, overflow in plans:
    where = f"{devices} devices, {plan}"
    found, found_average, seen = step(devices, plan)
    difference = np.linalg.norm(found - gradient) / np.linalg.norm(gradient)
    print(f"{where}: {difference:.1e}")
    assert difference <= 1e-6, where
    np.testing.assert_allclose(found_average, average, rtol=1e-5, atol=1e-7)
    assert seen["counts"]["overflow"] == overflow, where
    assert (seen["counts"]["loads"][:, -1] == loads[:, -1]).all(), where
    for name, value in metrics.items():
        if name != "counts":
            np.testing.assert_allclose(seen[name], value, rtol=2e-6, atol=1e-6, err_msg=f"{name}, {where}")
print(f"{DEVICES} devices agree")
