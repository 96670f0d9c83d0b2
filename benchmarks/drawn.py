"""An A-ViT whose depths are set by the image, so that any depth profile is possible with random weights.

Channel 0 of the patch embedding is the patch's mean, and each block adds exactly 1 to it. With the gate at 0.5, a patch
of mean 1 - d stops at layer d.
"""

import numpy as np
from flax import nnx

from avit_jax import AViT, AViTConfig
from avit_jax.model.config import NO_RULE


def drawn_model(model_config: AViTConfig, class_depth: int, seed: int = 0) -> AViT:
    """A model with random weights whose class token stops at class_depth.

    model_config: its gate_scale and gate_center must be 40 and 20.
    """
    model = AViT(model_config, rngs=nnx.Rngs(seed))
    for path, param in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        if any(part in path for part in ("patch_embed", "cls_token", "pos_embed", "proj", "fc2")):
            param[...] = param[...].at[..., 0].set(0.0)
    kernel, bias = model.patch_embed.proj.kernel, model.blocks.mlp.fc2.bias
    assert bias is not None
    kernel[...] = kernel[...].at[:, 0].set(1 / kernel.shape[0])
    bias[...] = bias[...].at[:, 0].set(1.0)
    model.cls_token[...] = model.cls_token[...].at[..., 0].set(1.0 - class_depth)
    return model


def drawn_depths(
    model_config: AViTConfig,
    count: int,
    mean: float,
    token_spread: float,
    image_spread: float,
    class_depth: int,
    seed: int = 0,
) -> np.ndarray:
    """Depths in layers, [count, patches], such that the mean over all tokens is `mean`.

    token_spread, image_spread: standard deviations, in layers, of tokens around their image and of images around the
    mean. class_depth: the class token's depth, which counts in the mean.
    """
    rng = np.random.default_rng(seed)
    patches = model_config.num_tokens - 1
    offsets = rng.normal(0, image_spread, (count, 1)) + rng.normal(0, token_spread, (count, patches))
    wanted = (mean * model_config.num_tokens - class_depth) / patches
    low, high = -2.0 * model_config.depth, 2.0 * model_config.depth
    for _ in range(50):  # clipping moves the mean, so the right one is found by bisection
        middle = (low + high) / 2
        depths = np.clip(np.rint(middle + offsets), 1, model_config.depth)
        low, high = (middle, high) if depths.mean() < wanted else (low, middle)
    return depths


def drawn_images(model_config: AViTConfig, depths: np.ndarray, seed: int = 0) -> np.ndarray:
    """float32 images whose patches stop at these layers, with noise of mean 0 in every patch."""
    rows, columns = model_config.patch_grid
    size, channels = model_config.patch_size, model_config.in_channels
    patches = np.random.default_rng(seed).standard_normal(
        (len(depths), rows, columns, size, size, channels), dtype=np.float32
    )
    patches += (1 - depths).reshape(len(depths), rows, columns, 1, 1, 1) - patches.mean((3, 4, 5), keepdims=True)
    images = patches.transpose(0, 1, 3, 2, 4, 5).reshape(len(depths), *model_config.image_shape, channels)
    return np.ascontiguousarray(images, np.float32)


def dense_parts(model: AViT) -> AViT:
    """A model with the same weights and without the gate."""
    return model.with_config(**NO_RULE)


def in_bfloat16(model: AViT) -> AViT:
    """A model with the same weights that computes matmuls in bfloat16."""
    return model.with_config(dtype="bfloat16")
