"""Run by test_program.py with four devices: every execution of every kind of rule over a mesh against masked."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import jax
import numpy as np
from jax.sharding import PartitionSpec

import avit_jax
from avit_jax.execution.compiled import on_one_device
from avit_jax.runtime.mesh import data_mesh
from tests.harness.builders import answers, spread_gate
from tests.test_program import CONFIGS, FITTING, images_of

four = data_mesh(4)
assert four.shape["data"] == len(jax.devices()) == 4
# Images are split over `data` alone, so the other axis computes the same twice.
two = jax.make_mesh((2, 2), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
for name, config in CONFIGS.items():
    model, images = spread_gate(config), images_of(config, 7)
    expected = answers(model, images)
    for mesh in (four, two):
        for execution in FITTING[name]:
            plan = avit_jax.plan(model, images, 7, mesh=mesh) if execution == "planned" else None
            program = avit_jax.compile(model, 7, execution=execution, plan=plan, image_exit=False, mesh=mesh)
            assert program.abstract_arguments[1].sharding.spec == PartitionSpec("data"), name
            for count in (7, 3):
                found = program(images[:count])
                np.testing.assert_allclose(found.logits, expected.logits[:count], atol=2e-5, err_msg=name)
                np.testing.assert_array_equal(found.token_depth, expected.token_depth[:count], err_msg=name)
            joined = on_one_device(found)
            assert all(len(part.devices()) == 1 for part in jax.tree.leaves(joined)), name
            np.testing.assert_array_equal(joined.logits, found.logits)
print("4 devices agree")
