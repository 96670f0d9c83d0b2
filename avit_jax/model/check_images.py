"""The check of images before a model runs: anything but its input is refused with the reason and the fix."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from avit_jax.model.config import AViTConfig


def check_images(images: Any, config: AViTConfig) -> None:
    """Raises ValueError, with the reason, unless images are float32 [B, H, W, C] as the configuration says."""
    height, width = config.image_shape
    wanted = f"float32 [batch, {height}, {width}, {config.in_channels}]"
    if not isinstance(images, jax.Array | np.ndarray):
        kind = f"{type(images).__module__}.{type(images).__qualname__}".removeprefix("builtins.")
        raise ValueError(
            f"the model takes images as a NumPy or JAX array, {wanted}, but this is a {kind}: use np.asarray(images) "
            "for a tensor, avit_jax.preprocess(images, model.config) for pictures"
        )
    shape = tuple(images.shape)
    reason = None
    if images.dtype != jnp.float32:
        by = (
            "astype('float32')"
            if jnp.issubdtype(images.dtype, jnp.floating)
            else "avit_jax.preprocess(images, model.config)"
        )
        reason = f"they are {images.dtype}: use {by}"
    elif len(shape) != 4:
        reason = f"their shape is {shape}" + (": add a batch axis" if len(shape) == 3 else "")
    elif shape[1:] == (config.in_channels, height, width):
        reason = f"their shape is {shape}, channels first: use images.transpose(0, 2, 3, 1)"
    elif shape[1:] != (height, width, config.in_channels):
        reason = f"their shape is {shape}: resize with avit_jax.preprocess(images, model.config)"
    if reason:
        raise ValueError(f"the model takes images as {wanted}, but {reason}")
