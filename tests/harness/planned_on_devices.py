"""Run by test_planned.py with four devices: planned execution over a mesh against one device, without communication."""

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import jax
import numpy as np

import avit_jax
from avit_jax import PlannedPlan
from avit_jax.execution.stages import Stage
from avit_jax.runtime.mesh import data_mesh
from tests.harness.builders import answers, small_config
from tests.harness.halting_patterns import assert_same, drawn_images, drawn_model

model = drawn_model(small_config())
depths = np.random.default_rng(0).integers(1, 4, (14, 6))  # the last device has two images of its four
mesh = data_mesh(16)
assert mesh.shape["data"] == len(jax.devices()) == 4
plan = PlannedPlan(7, 4, 4, 2, (Stage(0, (7, 7)), Stage(1, (6, 7)), Stage(3, (0, 3))))
program = avit_jax.compile(model, 16, execution="planned", plan=plan, image_exit=False, mesh=mesh)
for overflows in (0, 1):
    images = drawn_images(depths)
    masked = answers(model, images)
    assert_same(masked, program(images))
    assert program.overflows == overflows, f"{program.overflows}, not {overflows}"
    work = program.executed(np.pad(np.asarray(masked.token_depth), ((0, 2), (0, 0))), 14).gmacs
    print(f"{work:.3e}")
    depths[5] = 4  # does not fit on the second device
collectives = re.findall(r"all-reduce|all-gather|all-to-all|collective-permute", program.compiled.as_text())
assert not collectives, collectives
made = avit_jax.plan(model, drawn_images(depths), 16, mesh=mesh)
assert made.batch_size == 4, made
print("4 devices agree")
