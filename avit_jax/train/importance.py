"""How important a patch is to the class token, and a linear fit of it by what is known of the patch early."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from avit_jax.model.config import AViTConfig
from avit_jax.model.vit import AViT

# Of the regressions, as shares of the mean variance of the features. With less than 1 for hidden units the weights are
# so large that a little training changes which tokens halt.
_PIXEL_RIDGE, _UNIT_RIDGE = 1e-3, 1.0
_BATCH = 100  # images


@dataclasses.dataclass(frozen=True)
class Fit:
    """importance = pixels . patch + positions + sum over layers of (weights . hidden units + offset)."""

    pixels: Float[np.ndarray, " v"]
    positions: Float[np.ndarray, " p"]
    units: list[tuple[Float[np.ndarray, " m"], float]]  # weights and offset of the first layers
    values: list[Float[np.ndarray, "b p"]]  # the fit before layer 1, after it, and so on
    least_special: Float[np.ndarray, " s"]  # least sum of the units' part for each special token, up to any layer


def fit_importance(model: AViT, images: Float[np.ndarray, "b h w c"], units: int) -> Fit:
    """Ridge regression of the patches' importance by pixels and position, then of what is left by hidden units.

    units: the layers whose MLP takes part, one after the other. 0: none, and importance is the attention that a patch
    gets, mean over all layers; otherwise its rank among the patches of all images, without the first third of the
    layers.
    """
    attention = _attention_to_patches(model, images, first_layer=model.config.depth // 3 if units else 0)
    target = _ranks(attention) if units else attention
    patches = np.asarray(model.patch_embed.patches(jnp.asarray(images)), np.float64)
    pixels, positions = _by_pixels(patches, target)
    fit = Fit(pixels, positions, [], [patches @ pixels + positions], np.zeros(model.config.num_special))
    special = np.zeros((len(images), model.config.num_special))
    for layer in range(units):
        weights, offset = _by_units(model, images, layer, target - fit.values[-1])
        parts = [hidden @ weights + offset for hidden in _hidden(model, images, layer)]
        part = np.concatenate(parts)
        special = special + part[:, : model.config.num_special]
        fit = dataclasses.replace(
            fit,
            units=[*fit.units, (weights, offset)],
            values=[*fit.values, fit.values[-1] + part[:, model.config.num_special :]],
            least_special=np.minimum(fit.least_special, special.min(0)),
        )
    return fit


def _ranks(values: Float[np.ndarray, "b p"]) -> Float[np.ndarray, "b p"]:
    """The rank of each value among all, from 0 to 1; equal values have the mean of their ranks."""
    _, which, count = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(count)
    return ((last - (count + 1) / 2) / values.size)[which].reshape(values.shape)


def _by_pixels(
    patches: Float[np.ndarray, "b p v"], target: Float[np.ndarray, "b p"]
) -> tuple[Float[np.ndarray, " v"], Float[np.ndarray, " p"]]:
    """A weight for every pixel of a patch, an offset for every position."""
    # Centred by position: the offset of a position fits its mean.
    centred = (patches - patches.mean(0)).reshape(-1, patches.shape[-1])
    pixels = _ridge(centred.T @ centred, centred.T @ (target - target.mean(0)).ravel(), _PIXEL_RIDGE)
    return pixels, target.mean(0) - patches.mean(0) @ pixels


def _by_units(
    model: AViT, images: Float[np.ndarray, "b h w c"], layer: int, target: Float[np.ndarray, "b p"]
) -> tuple[Float[np.ndarray, " m"], float]:
    """A weight for every hidden unit of a layer's MLP, and an offset."""
    width, first = model.config.mlp_dim, model.config.num_special
    gram, cross, total, start = np.zeros((width, width)), np.zeros(width), np.zeros(width), 0
    for hidden in _hidden(model, images, layer):
        features = hidden[:, first:].reshape(-1, width)
        wanted = target[start : start + len(hidden)].ravel()
        gram += features.T @ features
        cross += features.T @ wanted
        total += features.sum(0)
        start += len(hidden)
    mean = total / target.size
    weights = _ridge(gram - target.size * np.outer(mean, mean), cross - target.size * mean * target.mean(), _UNIT_RIDGE)
    return weights, float(target.mean() - mean @ weights)


def _ridge(gram: Float[np.ndarray, "f f"], cross: Float[np.ndarray, " f"], share: float) -> Float[np.ndarray, " f"]:
    # Above 0, so that the matrix can be inverted for blank borders and flat images too.
    ridge = share * max(np.trace(gram), 0.0) / len(gram) + np.finfo(np.float32).tiny
    return np.linalg.solve(gram + ridge * np.eye(len(gram)), cross)


def _looking(model_config: AViTConfig) -> slice:
    """The tokens whose attention counts: class and distillation token if the logits read them, else all patches."""
    first = sum(model_config.tokens_read[: model_config.num_special])  # registers, which are not read, come after them
    return slice(first) if first else slice(model_config.num_special, None)


@functools.partial(jax.jit, static_argnums=0)
def _attention_step(graphdef: nnx.GraphDef, params: Any, images: Array) -> Float[Array, "l b p"]:
    model = nnx.merge(graphdef, params)
    blocks, stacked = nnx.split(model.blocks)
    num_special, looking = model.config.num_special, _looking(model.config)

    def layer(x: Array, params: Any) -> tuple[Array, Array]:
        block = nnx.merge(blocks, params)
        query, key, _ = block.attn.query_key_value(block.norm1(x))
        scores = query[:, :, looking] @ key.swapaxes(-1, -2) * query.shape[-1] ** -0.5
        attention = jax.nn.softmax(scores.astype(jnp.float32), axis=-1)[..., num_special:]
        return block(x), attention.mean((1, 2))

    return jax.lax.scan(layer, model.embed(images), stacked)[1]


def _attention_to_patches(
    model: AViT, images: Float[np.ndarray, "b h w c"], first_layer: int
) -> Float[np.ndarray, "b p"]:
    """The attention that patches get from the `_looking` tokens, mean over heads and layers, without halting."""
    return np.concatenate([layers[first_layer:].mean(0) for layers in _over(_attention_step, model, images)])


@functools.partial(jax.jit, static_argnums=0)
def _hidden_step(graphdef: nnx.GraphDef, params: Any, images: Array, layer: Array) -> Float[Array, "b n m"]:
    model = nnx.merge(graphdef, params)
    blocks, stacked = nnx.split(model.blocks)

    def block(index: Array) -> Any:
        return nnx.merge(blocks, jax.tree.map(lambda array: array[index], stacked))

    x = jax.lax.fori_loop(0, layer, lambda index, x: block(index)(x), model.embed(images))
    y, _ = block(layer).attend(x)
    return block(layer).mlp.hidden(block(layer).norm2(y))


def _hidden(model: AViT, images: Float[np.ndarray, "b h w c"], layer: int) -> Iterator[Float[np.ndarray, "b n m"]]:
    """The hidden units of a layer's MLP, special tokens first, without halting; some images at a time."""
    return _over(_hidden_step, model, images, jnp.asarray(layer))


def _over(step: Callable[..., Array], model: AViT, images: np.ndarray, *more: Array) -> Iterator[np.ndarray]:
    graphdef, params = nnx.split(model)
    for start in range(0, len(images), _BATCH):
        yield np.asarray(step(graphdef, params, images[start : start + _BATCH], *more), np.float64)
