"""The mean of which every loss is made."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def image_mean(values: Float[Array, "b ..."], image_weight: Float[Array, " b"] | None = None) -> Float[Array, ""]:
    """The mean over images and all that belongs to them; images of weight 0 are left out."""
    if image_weight is None:
        return values.mean()
    of_images = values.reshape(len(values), -1).mean(1)
    return image_weight @ of_images / jnp.maximum(image_weight.sum(), 1)
