"""Run by test_packed.py with eight devices: packed execution over a mesh against masked, without communication."""

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import jax
import numpy as np

import avit_jax
from avit_jax import AViTOutput, compile_packed, plan_packed
from avit_jax.runtime.mesh import data_mesh
from tests.harness.builders import answers, small_config, spread_gate
from tests.harness.halting_patterns import assert_exited, assert_same

model = spread_gate(small_config())
images = np.random.default_rng(0).normal(size=(24, 12, 8, 2)).astype(np.float32)
mesh = data_mesh(24)
assert mesh.shape["data"] == len(jax.devices()) == 8
masked = answers(model, images)


def first(count: int) -> AViTOutput:
    """The masked model's output for the first images."""
    of_image = (masked.token_depth[:count], masked.ponder_cost[:count], masked.halting_scores[:, :count])
    return AViTOutput(masked.logits[:count], masked.head_logits[:, :count], *of_image)


for image_exit in (False, True):
    eight = compile_packed(model, 24, image_exit=image_exit)  # without a mesh: all CPU devices
    assert eight.params["norm"]["scale"].sharding.num_devices == 8
    for count in (24, 13, 1):
        if image_exit:
            assert_exited(first(count), eight(images[:count]), 1)
        else:
            assert_same(first(count), eight(images[:count]))
    collectives = re.findall(r"all-reduce|all-gather|all-to-all|collective-permute", eight.compiled.as_text())
    assert not collectives, collectives
plan = plan_packed(model, images, 24, mesh=mesh)
assert plan.group_size <= 24 // 8, plan  # a device has no more to put together
assert_exited(masked, compile_packed(model, 24, plan, mesh=mesh)(images), 1)
few = avit_jax.compile(model, 3)  # no device without an image
assert few.params["norm"]["scale"].sharding.num_devices == 3
inside = jax.jit(lambda images: few(images).logits)(images[:3])
np.testing.assert_allclose(inside, masked.logits[:3], atol=1e-5 * float(np.abs(inside).max()))
for batch in (6, 11):  # 11: the eighth device has one image of its two
    made = avit_jax.plan(model, images, batch)
    planned = avit_jax.compile(model, batch, execution="planned", plan=made)
    own = {6: 1, 11: 2}[batch]
    assert made.batch_size == own, made
    logits = planned(images[:batch]).logits
    np.testing.assert_allclose(logits, masked.logits[:batch], atol=1e-5 * float(np.abs(logits).max()))
print("8 devices agree")
