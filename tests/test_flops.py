"""Work against DeiT's published figures and a loop over tokens."""

import jax.numpy as jnp
import numpy as np
import pytest

import avit_jax
from avit_jax.evaluation import config_gmacs


@pytest.mark.parametrize(("size", "published"), [("tiny", 1.3), ("small", 4.6), ("base", 17.6)])
def test_dense_work_is_deits(size: str, published: float) -> None:
    config = avit_jax.PRESETS[f"deit_{size}_patch16_224"]
    depth = jnp.full((2, config.num_tokens), config.depth, jnp.int32)
    np.testing.assert_allclose(config_gmacs(depth, config), published, atol=0.05)


def test_work_is_the_sum_over_layers_of_what_is_active() -> None:
    config = avit_jax.PRESETS["avit_tiny_distilled_patch16_224"]
    depth = np.random.default_rng(0).integers(1, 13, (3, config.num_tokens)).astype(np.int32)
    d = config.embed_dim
    for image, found in zip(depth, config_gmacs(jnp.asarray(depth), config), strict=True):
        total = 196 * 16 * 16 * 3 * d + 2 * d * 1000
        for layer in range(1, 13):
            n = int((image >= layer).sum())
            qkv, scores, mixing, projection, mlp = n * d * 3 * d, n * n * d, n * n * d, n * d * d, 2 * n * d * 4 * d
            total += qkv + scores + mixing + projection + mlp
        np.testing.assert_allclose(found, total / 1e9, rtol=1e-6)
