"""Rules that drop tokens, in NumPy, token by token and image by image: what the model under them has to agree with."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from scipy.special import erf

from avit_jax import AViT
from tests.harness.numpy_tome import Result, Token, linear, norm, pooled

# The tokens that go on, from a layer's number, its tokens, and the attention that each gets from the special tokens
# with a head (None before the layer).
Choose = Callable[[int, list[Token], Any], list[Token]]


def unchanged(layer: int, tokens: list[Token], class_attention: Any) -> list[Token]:
    return tokens


def kept_and_fused(patches: list[Token], scores: np.ndarray, kept: int, fuse: bool) -> list[Token]:
    """The tokens with the highest scores in their order, then the sum of the others times their scores."""
    ranked = sorted(range(len(patches)), key=lambda i: (-scores[i], i))
    staying, going = sorted(ranked[:kept]), sorted(ranked[kept:])
    after = [patches[i] for i in staying]
    if fuse and going:
        value = sum(scores[i] * patches[i].value for i in going)
        after.append(Token(value, [m for i in going for m in patches[i].members], False))
    return after


def dropping(model: AViT, image: np.ndarray, before: Choose = unchanged, between: Choose = unchanged) -> Result:
    """One image through a model whose tokens are chosen before each layer, and between attention and MLP."""
    config = model.config
    parameters = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    embedded = np.asarray(model.embed(jnp.asarray(image[None])), np.float64)[0]
    tokens = [Token(value, [i], i < config.num_special) for i, value in enumerate(embedded)]
    depth = [0] * len(tokens)
    layers = []
    for layer in range(config.depth):
        block = _at(layer, parameters["blocks"])
        tokens = before(layer, tokens, None)
        for token in tokens:
            depth[token.members[0]] += 1
        x = norm(np.stack([token.value for token in tokens]), block["norm1"], config.norm_epsilon)
        parts = np.split(linear(x, block["attn"]["qkv"]), 3, -1)
        query, key, value = (np.split(part, config.num_heads, axis=-1) for part in parts)
        mixed, attention = [], []
        for q, k, v in zip(query, key, value, strict=True):
            weights = np.exp(q @ k.T / np.sqrt(q.shape[-1]))
            attention.append(weights / weights.sum(-1, keepdims=True))
            mixed.append(attention[-1] @ v)
        branch = linear(np.concatenate(mixed, -1), block["attn"]["proj"])
        tokens = [dataclasses.replace(t, value=t.value + b) for t, b in zip(tokens, branch, strict=True)]
        heads = [a[row] for a in attention for row in range(config.class_token + config.distilled)]
        tokens = between(layer, tokens, np.mean(heads, axis=0) if heads else None)
        y = norm(np.stack([t.value for t in tokens]), block["norm2"], config.norm_epsilon)
        hidden = linear(y, block["mlp"]["fc1"])
        branch = linear(hidden * (1 + erf(hidden / np.sqrt(2))) / 2, block["mlp"]["fc2"])
        tokens = [dataclasses.replace(t, value=t.value + b) for t, b in zip(tokens, branch, strict=True)]
        layers.append([token.members for token in tokens])
    features = pooled(tokens, model, parameters)
    names = ["head", "head_dist"][: len(features)]
    logits = np.mean([linear(f, parameters[name]) for f, name in zip(features, names, strict=True)], axis=0)
    return Result(logits, depth, layers)


def _at(layer: int, content: Any) -> Any:
    if isinstance(content, dict):
        return {name: _at(layer, part) for name, part in content.items()}
    return np.asarray(content[layer], np.float64)
