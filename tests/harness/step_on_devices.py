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

from avit_jax import MCTF, AViT, Preprocessing
from avit_jax.checkpoints.digests import tree_digests
from avit_jax.commands.typed_config import parse
from avit_jax.model.config import NO_RULE
from avit_jax.runtime.mesh import global_batch
from avit_jax.train.state import initial_state
from avit_jax.train.step import make_train_step
from configs import npz_avit
from tests.harness.builders import small_config, spread_gate

assert len(jax.devices()) == 8
# As in an experiment: drop-path, an image that counts for nothing, the prior and the ponder cost.
# Weights of twice the usual size: with four times, rounding alone comes to 1.0e-6 of the gradient's norm.
fields = {"drop_path_rate": 0.1, "preprocessing": Preprocessing((0.5, 0.4), (0.2, 0.3))}
halting = spread_gate(small_config(**fields), factor=2.0)
# Every batch draws its second pass, and only images that it is sure of have to agree.
merging = spread_gate(small_config(image_size=20, **NO_RULE, **fields)).with_config(rule=MCTF((6,), (2,)))
merging.head.kernel[...] *= 4
rng = np.random.default_rng(0)


def batch(*shape: int) -> dict[str, np.ndarray]:
    """16 images. Each device has its own brightness."""
    images = rng.integers(0, 256, (16, *shape, 2)) * (0.2 + np.arange(16) / 16)[:, None, None, None]
    return {
        "image": images.clip(0, 255).astype(np.uint8),
        "label": (np.arange(16) % 5).astype(np.int32),
        "weight": np.where(np.arange(16) == 5, 0, 1).astype(np.float32),
    }


# Adam turns rounding into updates: this one leaves the weights and keeps the gradient, laid out as Adam's state.
keep = optax.GradientTransformation(
    optax.tree.zeros_like, lambda grads, _, params: (optax.tree.zeros_like(params), grads)
)


def step(
    model: AViT, batch: dict[str, np.ndarray], data: int, fsdp: int, parts: int
) -> tuple[np.ndarray, dict[str, Any], Any]:
    """The gradient as one vector, the metrics, the kept gradient."""
    config = npz_avit.get_config("")
    config.accumulation = parts
    config.teacher = ""
    config.loss.update({"distillation": "none", "ponder_weight": 0.1, "prior_weight": 0.1, "prior_target_depth": 2.0})
    axes, types = ("data", "fsdp"), (AxisType.Auto, AxisType.Auto)
    mesh = jax.make_mesh((data, fsdp), axes, axis_types=types, devices=jax.devices()[: data * fsdp])
    state = initial_state(model, keep, 0.0, mesh)
    run = make_train_step(nnx.graphdef(model), keep, parse(config).step, mesh, state)
    state, metrics = run(state, global_batch(batch, mesh), None)
    gradient = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(state.optimizer)])
    return gradient, jax.device_get(metrics), state.optimizer


def agree(model: AViT, batch: dict[str, np.ndarray], data: int, fsdp: int, parts: int) -> dict[str, Any]:
    """The metrics of one device, which those of eight must equal, as must the gradient."""
    expected, one, _ = step(model, batch, 1, 1, parts)
    assert np.linalg.norm(expected) > 0.1
    gradient, eight, layout = step(model, batch, data, fsdp, parts)
    where = f"{model.config.rule}, data={data}, fsdp={fsdp}, {parts} parts"
    kernel = layout["blocks"]["mlp"]["fc1"]["kernel"][...]
    assert len(kernel.sharding.device_set) == 8 and kernel.sharding.is_fully_replicated == (fsdp == 1), where
    assert tree_digests(layout) == tree_digests(jax.device_get(layout)), f"digests depend on the mesh, {where}"
    difference = np.linalg.norm(gradient - expected) / np.linalg.norm(expected)
    print(f"{where}: {difference:.1e}")
    assert difference <= 1e-6, f"{where}: gradients differ by {difference:.1e} of their norm"
    for name, value in one.items():
        np.testing.assert_allclose(eight[name], value, rtol=1e-6, atol=1e-7, err_msg=f"{name}, {where}")
    return one


images = batch(12, 8)
for parts, data, fsdp in ((1, 8, 1), (2, 4, 2)):
    one = agree(halting, images, data, fsdp, parts)
    assert one["prior"] > 1e-3 and one["ponder"] > 1e-3
    assert len(set(one["halting_by_layer"].round(3))) == 4, "every layer should have its own share of halting"
one = agree(merging, batch(20, 20), 4, 2, 1)
assert one["agreement"] > 1e-3 and one["second_pass"] != one["classification"]
print("8 devices agree")
