"""Run by test_training with eight devices: train_step's loss and gradient on several meshes against one device's."""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import jax
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType

from avit_jax import Preprocessing
from avit_jax.checkpoints.digests import tree_digests
from avit_jax.commands.typed_config import parse
from avit_jax.runtime.mesh import global_batch
from avit_jax.train.state import initial_state
from avit_jax.train.step import make_train_step
from configs import npz_avit
from tests.harness.builders import small_config, spread_gate

assert len(jax.devices()) == 8
# As in an experiment: drop-path, an image that counts for nothing, the prior and the ponder cost.
# Weights of twice the usual size: with four times, rounding alone comes to 1.0e-6 of the gradient's norm.
model = spread_gate(small_config(drop_path_rate=0.1, preprocessing=Preprocessing((0.5, 0.4), (0.2, 0.3))), factor=2.0)
graphdef = nnx.graphdef(model)
rng = np.random.default_rng(0)
images = rng.integers(0, 256, (16, 12, 8, 2)) * (0.2 + np.arange(16) / 16)[:, None, None, None]  # a device has its own
batch = {
    "image": images.clip(0, 255).astype(np.uint8),
    "label": (np.arange(16) % 5).astype(np.int32),
    "weight": np.where(np.arange(16) == 5, 0, 1).astype(np.float32),
}
# Adam turns rounding into updates: this one leaves the weights and keeps the gradient, laid out as Adam's state.
keep = optax.GradientTransformation(
    optax.tree.zeros_like, lambda grads, _, params: (optax.tree.zeros_like(params), grads)
)


def step(data: int, fsdp: int, parts: int) -> tuple[np.ndarray, dict[str, Any], Any]:
    """The gradient as one vector, the metrics, the kept gradient."""
    config = npz_avit.get_config("")
    config.accumulation = parts
    config.teacher = ""
    config.loss.update({"distillation": "none", "ponder_weight": 0.1, "prior_weight": 0.1, "prior_target_depth": 2.0})
    axes, types = ("data", "fsdp"), (AxisType.Auto, AxisType.Auto)
    mesh = jax.make_mesh((data, fsdp), axes, axis_types=types, devices=jax.devices()[: data * fsdp])
    state = initial_state(model, keep, 0.0, mesh)
    run = make_train_step(graphdef, keep, parse(config).step, mesh, state)
    state, metrics = run(state, global_batch(batch, mesh), None)
    gradient = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(state.optimizer)])
    return gradient, jax.device_get(metrics), state.optimizer


for parts, data, fsdp in ((1, 8, 1), (2, 4, 2)):
    expected, one, _ = step(1, 1, parts)
    assert np.linalg.norm(expected) > 0.1 and one["prior"] > 1e-3 and one["ponder"] > 1e-3
    assert len(set(one["halting_by_layer"].round(3))) == 4, "every layer should have its own share of halting"
    gradient, eight, layout = step(data, fsdp, parts)
    where = f"data={data}, fsdp={fsdp}, {parts} parts"
    kernel = layout["blocks"]["mlp"]["fc1"]["kernel"][...]
    assert len(kernel.sharding.device_set) == 8 and kernel.sharding.is_fully_replicated == (fsdp == 1), where
    assert tree_digests(layout) == tree_digests(jax.device_get(layout)), f"digests depend on the mesh, {where}"
    difference = np.linalg.norm(gradient - expected) / np.linalg.norm(expected)
    print(f"{where}: {difference:.1e}")
    assert difference <= 1e-6, f"{where}: gradients differ by {difference:.1e} of their norm"
    for name, value in one.items():
        np.testing.assert_allclose(eight[name], value, rtol=1e-6, atol=1e-7, err_msg=f"{name}, {where}")
print("8 devices agree")
