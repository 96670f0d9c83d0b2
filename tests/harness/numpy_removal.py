"""Halting rules in NumPy: a stopped token is taken out of the arrays. Every execution has to agree with it."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from scipy.special import erf, softmax

from avit_jax import AViT
from tests.harness.numpy_tome import Token, linear, norm, pooled


@dataclasses.dataclass
class Layer:
    """What a layer shows of the tokens that are there."""

    position: np.ndarray  # in the image
    patch: np.ndarray  # whether it is a patch
    class_attention: np.ndarray
    value_norm: np.ndarray
    before: np.ndarray
    after: np.ndarray


@dataclasses.dataclass
class Result:
    """Of one image."""

    logits: np.ndarray
    token_depth: np.ndarray


Goes = Callable[[int, Layer], np.ndarray]  # which tokens go on after a layer, from 0; special ones included


def remove_tokens(model: AViT, image: np.ndarray, goes: Goes) -> Result:
    """One image through a model; tokens are removed after each layer by indexing."""
    config = model.config
    parameters = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    x = np.asarray(model.embed(jnp.asarray(image[None])), np.float64)[0]
    there = np.arange(len(x))
    final, depth = x.copy(), np.zeros(len(x), int)
    for layer in range(config.depth):
        before = x
        normed = norm(x, _of_layer(parameters["blocks"]["norm1"], layer), config.norm_epsilon)
        attn = {name: _of_layer(part, layer) for name, part in parameters["blocks"]["attn"].items()}
        query, key, value = np.split(linear(normed, attn["qkv"]), 3, -1)
        heads = [np.split(part, config.num_heads, -1) for part in (query, key, value)]
        matrices = [softmax(q @ k.T / np.sqrt(q.shape[-1]), -1) for q, k in zip(*heads[:2], strict=True)]
        mixed = np.concatenate([a @ v for a, v in zip(matrices, heads[2], strict=True)], -1)
        x = x + linear(mixed, attn["proj"])
        mlp = {name: _of_layer(part, layer) for name, part in parameters["blocks"]["mlp"].items()}
        hidden = linear(norm(x, _of_layer(parameters["blocks"]["norm2"], layer), config.norm_epsilon), mlp["fc1"])
        x = x + linear(hidden * (1 + erf(hidden / np.sqrt(2))) / 2, mlp["fc2"])
        depth[there] += 1
        final[there] = x
        rows = config.class_token + config.distilled
        attention = np.mean([[a[row] for row in range(rows)] for a in matrices], (0, 1)) if rows else np.zeros(len(x))
        lengths = np.sqrt((value**2).sum(-1))
        going = goes(layer, Layer(there, there >= config.num_special, attention, lengths, before, x))
        x, there = x[going], there[going]
        if not len(there):
            break
    tokens = [Token(value, [i], i < config.num_special) for i, value in enumerate(final)]
    features = pooled(tokens, model, parameters)
    names = ["head", "head_dist"][: len(features)]
    logits = np.mean([linear(f, parameters[name]) for f, name in zip(features, names, strict=True)], axis=0)
    return Result(logits, depth)


def _of_layer(stacked: Any, layer: int) -> Any:
    return {name: np.asarray(values[layer], np.float64) for name, values in stacked.items()}
