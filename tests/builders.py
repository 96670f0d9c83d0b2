"""Small models and data for the tests."""

from typing import Any

import jax
import numpy as np
from flax import nnx

from avit_jax import AViT, AViTConfig


def small_config(**overrides: Any) -> AViTConfig:
    """12 x 8 pixels, patch 4: 6 patches, 4 layers of width 16."""
    fields: dict[str, Any] = {
        "image_size": (12, 8),
        "patch_size": 4,
        "in_channels": 2,
        "num_classes": 5,
        "embed_dim": 16,
        "depth": 4,
        "num_heads": 2,
        "gate_scale": 4.0,
        "gate_center": 1.0,
    }
    return AViTConfig(**(fields | overrides))


def spread_gate(config: AViTConfig, seed: int = 0) -> AViT:
    """A model with weights large enough that its tokens halt at many different layers."""
    model = AViT(config, rngs=nnx.Rngs(seed))
    state = jax.tree.map(lambda x: 4 * x if x.ndim >= 2 else x, nnx.state(model, nnx.Param))
    nnx.update(model, state)
    return model


def toy_arrays(count: int = 120, classes: int = 3, size: int = 8, seed: int = 0) -> dict[str, np.ndarray]:
    """Images whose class is the position of a bright band: learnt within a few steps."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % classes
    images = rng.integers(0, 60, (count, size, size, 1))
    for image, label in zip(images, labels, strict=True):
        image[label * size // classes : (label + 1) * size // classes] += 150
    return {"images": images.astype(np.uint8), "labels": labels}
