"""Oracles for rules that stop whole images: every layer of every image, and the model's heads in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from avit_jax import AViT


def tokens_of_layers(model: AViT, images: np.ndarray) -> np.ndarray:
    """[layers, images, tokens, width] in float64: tokens after each layer if none ever halts."""
    graphdef, blocks = nnx.split(model.blocks)
    run = jax.jit(lambda params, x: nnx.merge(graphdef, params)(x))
    x, found = model.embed(jnp.asarray(images)), []
    for layer in range(model.config.depth):
        x = run(jax.tree.map(lambda p, layer=layer: p[layer], blocks), x)
        found.append(np.asarray(x, np.float64))
    return np.stack(found)


def head_logits(model: AViT, tokens: np.ndarray) -> np.ndarray:
    """[heads, classes] for the tokens of one image [tokens, width], with pool "token" or "mean_norm"."""
    config = model.config
    patches = tokens[config.num_special :]
    read = patches.mean(0)[None] if config.pool == "mean_norm" else tokens[: 1 + config.distilled]
    heads = [model.head, model.head_dist] if config.distilled else [model.head]
    said = []
    for value, head in zip(read, heads, strict=True):
        value = (value - value.mean()) / np.sqrt(value.var() + config.norm_epsilon)
        value = value * np.asarray(model.norm.scale[...]) + np.asarray(model.norm.bias[...])
        said.append(value @ np.asarray(head.kernel[...]) + np.asarray(head.bias[...]))
    return np.stack(said)
