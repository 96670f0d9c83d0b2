"""Run by test_report_numbers.py with eight devices: totals over a mesh against those of one device."""

import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import jax
import numpy as np

from avit_jax import Preprocessing
from avit_jax.data.sources import Split
from avit_jax.evaluate.figures import figures, totals
from avit_jax.runtime.mesh import data_mesh
from tests.harness.builders import small_config, spread_gate

model = spread_gate(small_config(preprocessing=Preprocessing((0.5, 0.4), (0.2, 0.3))))
rng = np.random.default_rng(0)
split = Split(rng.integers(0, 256, (37, 12, 8, 2)).astype(np.uint8), rng.integers(0, 5, 37).astype(np.int32))
mesh = data_mesh(16)
assert mesh.shape["data"] == len(jax.devices()) == 8
for execution in ("masked", "packed"):
    one, eight = (totals(model, split, 16, execution, m) for m in (data_mesh(1), mesh))
    np.testing.assert_array_equal(one.depth_histogram, eight.depth_histogram)
    np.testing.assert_array_equal(one.depth_by_token, eight.depth_by_token)
    assert one.executed_slots == eight.executed_slots
    for field in dataclasses.fields(one.images):
        np.testing.assert_allclose(getattr(one.images, field.name), getattr(eight.images, field.name), rtol=1e-5)
    a, b = (figures(found, model.config) for found in (one, eight))
    assert (a.top1, a.top5, a.mean_depth, a.images) == (b.top1, b.top5, b.mean_depth, 37)
print("8 devices agree")
