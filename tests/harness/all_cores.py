"""Run by test_cores.py, on a machine that seems to have three cores: a device for each, and programs on all of them."""

import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import jax
import numpy as np

import avit_jax
from avit_jax import Gates, PackedPlan, PlannedPlan, Preprocessing
from avit_jax.data.sources import Split
from avit_jax.evaluate.figures import evaluate
from avit_jax.execution.stages import Stage
from avit_jax.execution.work import embedding_macs, head_macs
from avit_jax.model.config import NO_RULE
from avit_jax.runtime import mesh
from tests.harness.builders import small_config, spread_gate

warnings.simplefilter("error")
mesh.available_cores = lambda: 3
avit_jax.use_all_cores()
assert jax.local_device_count() == 3
avit_jax.use_all_cores()  # again, as where a notebook's cell runs twice: nothing to warn of
channels = {"preprocessing": Preprocessing((0.5, 0.4), (0.2, 0.3))}
model = spread_gate(small_config(**channels))
images = np.random.default_rng(0).normal(size=(4, 12, 8, 2)).astype(np.float32)
program = avit_jax.compile(model, 4)
assert program.params["norm"]["scale"].sharding.num_devices == 3
np.testing.assert_allclose(program(images).logits, model(images).logits, atol=2e-5)

# The work of four images on three devices, two places on each: with groups of one image it is that of one device.
gated = spread_gate(small_config(**NO_RULE | {"rule": Gates(token_bias=0.0, bias=0.0)}))
every = PackedPlan(7, 1, tuple(range(1, 8)))
for own in (model, gated):
    three, one = (avit_jax.compile_packed(own, 4, every, mesh=m) for m in (None, mesh.data_mesh(1)))
    output = three(images)
    np.testing.assert_allclose(output.logits, own(images).logits, atol=2e-5)
    depth = np.asarray(own(images).token_depth)
    found, expected = (program.executed(depth, 4, output) for program in (three, one))
    assert found.slots == expected.slots
    np.testing.assert_allclose(found.gmacs, expected.gmacs, rtol=1e-6)
plans = [PlannedPlan(7, 4, count, 1, (Stage(0, (7,) * count),)) for count in (2, 4)]
meshes = (None, mesh.data_mesh(1))
three, one = (avit_jax.compile_planned(model, 4, plan, mesh=m) for plan, m in zip(plans, meshes, strict=True))
found, expected = (program.executed(np.asarray(model(images).token_depth), 4) for program in (three, one))
assert found.slots == expected.slots
once = (embedding_macs(model.config) + head_macs(model.config)) / 1e9
np.testing.assert_allclose(found.gmacs - once, 6 / 4 * (expected.gmacs - once), rtol=1e-6)

# As train.py evaluates: the last batch of seven images has three.
split = Split(np.random.default_rng(0).integers(0, 256, (7, 12, 8, 2)).astype(np.uint8), np.arange(7) % 5)
three, one = (evaluate(model, split, 4, "packed", m) for m in meshes)
assert (three.top1, three.executed_depth) == (one.top1, one.executed_depth)
print("3 cores, 3 devices")
