"""MCTF in NumPy, token by token and image by image: what the model under this rule has to agree with."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from scipy.special import erf

from avit_jax import AViT
from tests.harness.numpy_tome import Result, Token, at_layer, linear, norm, pooled


def attention(tokens: list[Token], block: Any, heads: int, epsilon: float) -> np.ndarray:
    """The attention matrix of each head, keys weighted by their sizes."""
    x = norm(np.stack([token.value for token in tokens]), block["norm1"], epsilon)
    query, key, _ = (np.split(part, heads, axis=-1) for part in np.split(linear(x, block["attn"]["qkv"]), 3, -1))
    matrices = []
    for q, k in zip(query, key, strict=True):
        weights = np.exp(q @ k.T / np.sqrt(q.shape[-1])) * [token.size for token in tokens]
        matrices.append(weights / weights.sum(-1, keepdims=True))
    return np.stack(matrices)


def groups_of(tokens: list[Token], received: np.ndarray, r: int) -> list[list[int]]:
    """The positions that become each token of the shorter sequence; the one that leads comes first."""
    if r == 0:
        return [[n] for n in range(len(tokens))]
    evens = [i for i in range(0, len(tokens), 2) if not tokens[i].special]
    odds = [i for i in range(1, len(tokens), 2) if not tokens[i].special]

    def value(i: int, j: int) -> float:
        x, y = tokens[i].value, tokens[j].value
        cosine = x @ y / np.linalg.norm(x) / np.linalg.norm(y)
        attended, size = received[i] * received[j], tokens[i].size * tokens[j].size
        return (cosine + 1) / 2 * (1 / attended) ** (1 / 20) * (1 / size) ** (1 / 40)

    members = {n: [n] for n in range(len(tokens))}
    best = {i: max((value(i, j), j) for j in odds) for i in evens}
    first = sorted(evens, key=lambda i: -best[i][0])[: r // 2]
    for i in first:
        members[best[i][1]] += members.pop(i)
    evens = [i for i in evens if i not in first]
    best = {j: max((value(i, j), i) for i in evens) for j in odds}
    second = sorted(odds, key=lambda j: -best[j][0])[: r - r // 2]
    for j in second:
        members[best[j][1]] += members.pop(j)
    special = [n for n in range(len(tokens)) if tokens[n].special]
    rest = sorted((j for j in odds if j not in second), key=lambda j: -best[j][0])
    return [members[n] for n in (*special, *evens, *rest)]


def merged(tokens: list[Token], attention: np.ndarray, groups: list[list[int]]) -> tuple[list[Token], np.ndarray]:
    """The tokens that follow, and their attention."""
    weight = attention.mean((0, 1)) * [token.size for token in tokens]
    after, rows = [], []
    for group in groups:
        share = weight[group] / weight[group].sum()
        value = sum(s * tokens[n].value for s, n in zip(share, group, strict=True))
        members = [m for n in group for m in tokens[n].members]
        after.append(Token(value, members, tokens[group[0]].special))
        row = sum(s * attention[:, n] for s, n in zip(share, group, strict=True))
        rows.append(np.stack([row[:, keys].sum(-1) for keys in groups], axis=-1))
    return after, np.stack(rows, axis=1)


def mctf(model: AViT, image: np.ndarray, merges: list[int]) -> Result:
    """One image through a model without rule; merges: the tokens that MCTF merges in each layer."""
    config = model.config
    parameters = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    embedded = np.asarray(model.embed(jnp.asarray(image[None])), np.float64)[0]
    tokens = [Token(value, [i], i < config.num_special) for i, value in enumerate(embedded)]
    depth = [0] * len(tokens)
    layers = []
    for layer, r in enumerate(merges):
        block = {name: at_layer(layer, part) for name, part in parameters["blocks"].items()}
        weights = attention(tokens, block, config.num_heads, config.norm_epsilon)
        tokens, weights = merged(tokens, weights, groups_of(tokens, weights.mean((0, 1)), r))
        for token in tokens:
            depth[token.members[0]] += 1
        x = norm(np.stack([token.value for token in tokens]), block["norm1"], config.norm_epsilon)
        values = np.split(linear(x, block["attn"]["qkv"]), 3, -1)[2]
        heads = np.split(values, config.num_heads, axis=-1)
        mixed = np.concatenate([w @ v for w, v in zip(weights, heads, strict=True)], -1)
        y = np.stack([token.value for token in tokens]) + linear(mixed, block["attn"]["proj"])
        hidden = linear(norm(y, block["norm2"], config.norm_epsilon), block["mlp"]["fc1"])
        y = y + linear(hidden * (1 + erf(hidden / np.sqrt(2))) / 2, block["mlp"]["fc2"])
        tokens = [dataclasses.replace(token, value=value) for token, value in zip(tokens, y, strict=True)]
        layers.append([token.members for token in tokens])
    features = pooled(tokens, model, parameters)
    names = ["head", "head_dist"][: len(features)]
    logits = np.mean([linear(f, parameters[name]) for f, name in zip(features, names, strict=True)], axis=0)
    return Result(logits, depth, layers)
