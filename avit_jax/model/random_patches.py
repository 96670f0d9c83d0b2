"""Patches cut at random places instead of the grid (RaViTT, arXiv 2306.10959).

The abstract says that patches are cut at random in training, and that fewer of them then suffice. The law of the
places, the interpolated position embeddings and everything else here are our choices.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from avit_jax.model.config import AViTConfig
from avit_jax.model.rule import Keys
from avit_jax.runtime.files import shown_value
from avit_jax.runtime.numbers import is_real, is_whole

LAWS = ("uniform", "jitter", "grid")


def draw_positions(
    keys: Keys, config: AViTConfig, *, tokens: int = 0, law: str = "uniform", probability: float = 1.0
) -> Int[Array, "b n 2"]:
    """The row and column, in pixels, of the top left corner of each patch.

    keys: one for each image. tokens: patches of an image, n; 0: as many as the grid has. law: "uniform", anywhere in
    the image, independently; "jitter", a cell of the grid moved by up to half a patch and kept inside the image;
    "grid", a cell of the grid. With fewer tokens than cells, each image draws its cells without replacement, and they
    keep the grid's order. probability: that an image follows the law; the others stay on the grid. Raises ValueError
    for an unknown law, a probability outside 0..1, and more tokens than the grid has.
    """
    if law not in LAWS:
        raise ValueError(f"the law of random patches is {law!r}: choose one of {', '.join(LAWS)}")
    if not is_real(probability, 0, 1):
        raise ValueError(f"the probability of random patches is {shown_value(probability)}: give a number from 0 to 1")
    check_tokens(tokens, config, "tokens")
    (rows, columns), side = config.patch_grid, config.patch_size
    cells = rows * columns
    count = tokens or cells
    most = jnp.array(config.image_shape) - side

    def of_image(key: Any) -> Array:
        coin, choice, place = jax.random.split(key, 3)
        chosen = jnp.arange(cells)
        if count < cells:
            chosen = jnp.sort(jax.random.permutation(choice, cells)[:count])
        corner = jnp.stack([chosen // columns, chosen % columns], axis=1) * side
        if law == "grid":
            return corner
        if law == "jitter":
            moved = corner + jax.random.randint(place, corner.shape, -(side // 2), side // 2 + 1)
            drawn = jnp.clip(moved, 0, most)
        else:
            drawn = jax.random.randint(place, corner.shape, 0, most + 1)
        return jnp.where(jax.random.bernoulli(coin, probability), drawn, corner)

    return jax.vmap(of_image)(keys)


def check_tokens(tokens: Any, config: AViTConfig, name: str) -> None:
    """Raises ValueError unless the grid has so many patches. tokens: 0 for all of them. name: of the user's setting."""
    cells = config.num_tokens - config.num_special
    if not is_whole(tokens, 0, cells):
        shown = shown_value(tokens)
        raise ValueError(f"{name} is {shown}: give 0 (all) or a whole number up to the {cells} patches of the grid")


def check_positions(positions: Any, images: int, config: AViTConfig) -> None:
    """Raises ValueError unless positions are integers [images, patches, 2] whose patches lie inside the image.

    Values inside a jitted program are not known and not checked.
    """
    kind, shape = getattr(positions, "dtype", None), np.shape(positions)
    if kind is None or not jnp.issubdtype(kind, jnp.integer) or shape != (images, *shape[1:2], 2):
        raise ValueError(
            f"the positions of patches are {kind} of shape {shape}: give integers [{images}, patches, 2], the row and "
            "column of each patch's top left corner in pixels"
        )
    most = np.array(config.image_shape) - config.patch_size
    if not isinstance(positions, jax.core.Tracer) and ((values := np.asarray(positions)) != values.clip(0, most)).any():
        raise ValueError(
            f"a patch is cut at {values.reshape(-1, 2).min(0)} to {values.reshape(-1, 2).max(0)}, row and column: give "
            f"corners from 0 to {most[0]} and {most[1]}, so that patches lie inside the image"
        )


def cut(images: Float[Array, "b h w c"], positions: Int[Array, "b n 2"], side: int) -> Float[Array, "b n v"]:
    """The pixels of the patches at these corners, in the order of PatchEmbed.patches. side: of a patch, in pixels."""

    def patch(image: Array, corner: Array) -> Array:
        return jax.lax.dynamic_slice(image, (*corner, 0), (side, side, image.shape[-1])).reshape(-1)

    # One gather of whole pixels by their index takes longer on a CPU, by a seventh at 224 pixels.
    return jax.vmap(jax.vmap(patch, (None, 0)))(images, positions)


def interpolated(
    table: Float[Array, "cells d"], positions: Int[Array, "b n 2"], config: AViTConfig
) -> Float[Array, "b n d"]:
    """The position embedding of each patch: bilinear between those of the four nearest cells of the grid.

    e(r) = sum over cells g of max(0, 1 - |r_1 - g_1|) max(0, 1 - |r_2 - g_2|) table[g], with r the corner divided by
    the side of a patch. On the grid that is the cell's own embedding, exactly.
    """
    # A quotient of floats may miss a whole number by a rounding error, so the whole part is divided apart.
    whole, part = positions // config.patch_size, (positions % config.patch_size) / jnp.float32(config.patch_size)
    near = []
    for axis, cells in enumerate(config.patch_grid):
        after = jnp.arange(cells) - whole[..., axis, None]
        rest = part[..., axis, None]
        near.append(jnp.where(after == 0, 1 - rest, jnp.where(after == 1, rest, 0)))
    weights = (near[0][..., :, None] * near[1][..., None, :]).reshape(*positions.shape[:2], len(table))
    # Full precision: TPUs and some GPUs would otherwise round the embeddings.
    return jnp.einsum("bng,gd->bnd", weights, table, precision=jax.lax.Precision.HIGHEST)


def config_of_tokens(config: AViTConfig, patches: int) -> AViTConfig:
    """The configuration as rules and counts of work must see it if an image has so many patches: a row of them."""
    if patches == config.num_tokens - config.num_special:
        return config
    return dataclasses.replace(config, image_size=(config.patch_size, config.patch_size * patches))
