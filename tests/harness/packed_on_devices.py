"""Run by test_packed.py with eight devices: packed execution over a mesh against one device, without communication."""

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import jax
import numpy as np

import avit_jax
from avit_jax import compile_packed, plan_packed
from avit_jax.runtime.mesh import data_mesh
from tests.harness.builders import small_config, spread_gate

model = spread_gate(small_config())
images = np.random.default_rng(0).normal(size=(24, 12, 8, 2)).astype(np.float32)
mesh = data_mesh(24)
assert mesh.shape["data"] == len(jax.devices()) == 8
for image_exit in (False, True):
    one = compile_packed(model, 24, image_exit=image_exit, mesh=data_mesh(1))
    eight = compile_packed(model, 24, image_exit=image_exit)  # without a mesh: all CPU devices
    assert eight.params["norm"]["scale"].sharding.num_devices == 8
    for count in (24, 13, 1):
        a, b = one(images[:count]), eight(images[:count])
        np.testing.assert_allclose(a.logits, b.logits, atol=1e-5 * float(np.abs(a.logits).max()))
        np.testing.assert_array_equal(a.token_depth, b.token_depth)
        np.testing.assert_allclose(a.ponder_cost, b.ponder_cost, atol=1e-5)
        np.testing.assert_allclose(a.halting_scores, b.halting_scores, atol=1e-5)
    collectives = re.findall(r"all-reduce|all-gather|all-to-all|collective-permute", eight.compiled.as_text())
    assert not collectives, collectives
plan = plan_packed(model, images, 24, mesh=mesh)
assert plan.group_size <= 24 // 8, plan  # a device has no more to put together
planned = compile_packed(model, 24, plan, mesh=mesh)(images)
np.testing.assert_allclose(planned.logits, model(images).logits, atol=1e-5 * float(np.abs(planned.logits).max()))
few = avit_jax.compile(model, 3)  # no device without an image
assert few.params["norm"]["scale"].sharding.num_devices == 3
inside = jax.jit(lambda images: few(images).logits)(images[:3])
np.testing.assert_allclose(inside, model(images[:3]).logits, atol=1e-5 * float(np.abs(inside).max()))
for batch in (6, 11):  # 11: the eighth device has one image of its two
    made = avit_jax.plan(model, images, batch)
    planned = avit_jax.compile(model, batch, execution="planned", plan=made)
    own = {6: 1, 11: 2}[batch]
    assert made.batch_size == own, made
    logits = planned(images[:batch]).logits
    np.testing.assert_allclose(logits, model(images[:batch]).logits, atol=1e-5 * float(np.abs(logits).max()))
print("8 devices agree")
