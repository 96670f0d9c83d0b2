"""The mean over images that every loss uses."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def image_mean(values: Float[Array, "b ..."], image_weight: Float[Array, " b"] | None = None) -> Float[Array, ""]:
    """The mean over images and all other axes. image_weight: 0 for images that are left out, otherwise 1."""
    if image_weight is None:
        return values.mean()
    of_images = values.reshape(len(values), -1).mean(1)
    return image_weight @ of_images / jnp.maximum(image_weight.sum(), 1)
