"""Run by test_cores.py, on a machine that seems to have three cores: a device for each, and programs on all of them."""

import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import jax
import numpy as np

import avit_jax
from avit_jax.runtime import mesh
from tests.harness.builders import small_config, spread_gate

warnings.simplefilter("error")
mesh.available_cores = lambda: 3
avit_jax.use_all_cores()
assert jax.local_device_count() == 3
avit_jax.use_all_cores()  # again, as where a notebook's cell runs twice: nothing to warn of
model = spread_gate(small_config())
images = np.random.default_rng(0).normal(size=(4, 12, 8, 2)).astype(np.float32)
program = avit_jax.compile(model, 4)
assert program.params["norm"]["scale"].sharding.num_devices == 3
np.testing.assert_allclose(program(images).logits, model(images).logits, atol=2e-5)
print("3 cores, 3 devices")
