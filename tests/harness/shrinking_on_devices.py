"""Run by test_shrinking.py with eight devices: logits and gradients over a mesh against one device."""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import jax
import numpy as np
from flax import nnx

import avit_jax
from avit_jax import MCTF, ToMe
from avit_jax.model.config import NO_RULE
from avit_jax.runtime.mesh import batch_sharding, data_mesh, replicated
from tests.harness.builders import small_config, spread_gate

images = np.random.default_rng(0).normal(size=(16, 16, 16, 2)).astype(np.float32)
mesh = data_mesh(16)
assert mesh.shape["data"] == len(jax.devices()) == 8
for rule in (ToMe(3), MCTF(3)):
    model = spread_gate(small_config(image_size=16, depth=2, **NO_RULE | {"rule": rule}), factor=2.0)
    one, eight = (avit_jax.compile(model, 16, mesh=m) for m in (data_mesh(1), mesh))
    for count in (16, 5):
        a, b = one(images[:count]), eight(images[:count])
        np.testing.assert_allclose(a.logits, b.logits, atol=1e-5)
        np.testing.assert_array_equal(a.token_depth, b.token_depth)
    graphdef, params = nnx.split(model)

    @jax.jit
    def gradient(params: Any, images: jax.Array, graphdef: nnx.GraphDef = graphdef) -> Any:
        return jax.grad(lambda p: (nnx.merge(graphdef, p).forward(images)[0].logits ** 2).mean())(params)

    split = jax.device_put(images, batch_sharding(mesh))
    expected, found = gradient(params, images), gradient(jax.device_put(params, replicated(mesh)), split)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), expected, found)
    assert max(float(abs(leaf).max()) for leaf in jax.tree.leaves(expected)) > 0.1
print("8 devices agree")
