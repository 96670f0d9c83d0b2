"""ToMe in NumPy, token by token and image by image: what the model under this rule has to agree with."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from scipy.special import erf

from avit_jax import AViT


@dataclasses.dataclass
class Token:
    """What one place of the sequence holds."""

    value: np.ndarray
    members: list[int]  # of the image's first tokens, all that became this one; the one that leads it comes first
    special: bool

    @property
    def size(self) -> int:
        return len(self.members)


@dataclasses.dataclass
class Result:
    """Of one image."""

    logits: np.ndarray
    token_depth: list[int]
    members: list[list[list[int]]]  # for each layer and slot


def norm(x: np.ndarray, parameters: Any, epsilon: float) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + epsilon)
    return scaled * parameters["scale"] + parameters["bias"]


def linear(x: np.ndarray, parameters: Any) -> np.ndarray:
    return x @ parameters["kernel"] + parameters.get("bias", 0)


def attention(tokens: list[Token], block: Any, heads: int, proportional: bool, epsilon: float) -> tuple[Any, Any]:
    """The branch of attention, and the mean of each token's keys over the heads."""
    x = norm(np.stack([token.value for token in tokens]), block["norm1"], epsilon)
    query, key, value = (np.split(part, heads, axis=-1) for part in np.split(linear(x, block["attn"]["qkv"]), 3, -1))
    mixed = []
    for q, k, v in zip(query, key, value, strict=True):
        scores = q @ k.T / np.sqrt(q.shape[-1])
        if proportional:
            scores = scores + np.log([token.size for token in tokens])
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        mixed.append(weights / weights.sum(-1, keepdims=True) @ v)
    return linear(np.concatenate(mixed, -1), block["attn"]["proj"]), np.mean(key, axis=0)


def merged(tokens: list[Token], keys: np.ndarray, r: int) -> list[Token]:
    """The tokens that follow: the special ones, those at even positions that stay, then those at odd positions."""
    patches = sum(not token.special for token in tokens)
    r = min(r, patches // 2)
    if r == 0:
        return tokens
    unit = keys / np.linalg.norm(keys, axis=-1, keepdims=True)
    evens = [i for i in range(0, len(tokens), 2) if not tokens[i].special]
    odds = [i for i in range(1, len(tokens), 2) if not tokens[i].special]
    best = {i: max(odds, key=lambda j: unit[i] @ unit[j]) for i in evens}
    going = sorted(evens, key=lambda i: -(unit[i] @ unit[best[i]]))[:r]
    after = {}
    for j in odds:
        group = [j, *(i for i in evens if i in going and best[i] == j)]
        total = sum(tokens[i].size * tokens[i].value for i in group)
        size = sum(tokens[i].size for i in group)
        after[j] = Token(total / size, [m for i in group for m in tokens[i].members], False)
    special = [token for token in tokens if token.special]
    return special + [tokens[i] for i in evens if i not in going] + [after[j] for j in odds]


def pooled(tokens: list[Token], model: AViT, parameters: Any) -> list[np.ndarray]:
    config, values = model.config, np.stack([token.value for token in tokens])
    patches = np.array([not token.special for token in tokens])
    sizes = np.array([token.size for token in tokens])[patches]

    def mean(x: np.ndarray) -> np.ndarray:  # every patch counts once, with the value of what it became
        return np.repeat(x[patches], sizes, axis=0).mean(0)

    normed = norm(values, parameters["norm"], config.norm_epsilon)
    return {
        "token": list(normed[: 1 + config.distilled]),
        "mean_norm": [norm(mean(values), parameters["norm"], config.norm_epsilon)],
        "norm_mean": [mean(normed)],
        "token_and_mean": [np.concatenate([normed[0], mean(normed)])],
    }[config.pool]


def tome(model: AViT, image: np.ndarray, r: list[int], proportional: bool = True) -> Result:
    """One image through a model without rule, tokens merged by ToMe."""
    config = model.config
    parameters = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    embedded = np.asarray(model.embed(jnp.asarray(image[None])), np.float64)[0]
    tokens = [Token(value, [i], i < config.num_special) for i, value in enumerate(embedded)]
    depth = [0] * len(tokens)
    layers = []
    for layer in range(config.depth):
        block = nnx.to_pure_dict(nnx.state(model.blocks, nnx.Param))
        block = {
            name: {part: at_layer(layer, content) for part, content in parts.items()} for name, parts in block.items()
        }
        for token in tokens:
            depth[token.members[0]] += 1
        branch, keys = attention(tokens, block, config.num_heads, proportional, config.norm_epsilon)
        tokens = [dataclasses.replace(t, value=t.value + b) for t, b in zip(tokens, branch, strict=True)]
        tokens = merged(tokens, keys, r[layer])
        hidden = linear(
            norm(np.stack([t.value for t in tokens]), block["norm2"], config.norm_epsilon), block["mlp"]["fc1"]
        )
        branch = linear(hidden * (1 + erf(hidden / np.sqrt(2))) / 2, block["mlp"]["fc2"])
        tokens = [dataclasses.replace(t, value=t.value + b) for t, b in zip(tokens, branch, strict=True)]
        layers.append([token.members for token in tokens])
    features = pooled(tokens, model, parameters)
    heads = ["head", "head_dist"][: len(features)]
    logits = np.mean([linear(f, parameters[h]) for f, h in zip(features, heads, strict=True)], axis=0)
    return Result(logits, depth, layers)


def at_layer(layer: int, content: Any) -> Any:
    """The parameters of one layer, from those of all, stacked."""
    if isinstance(content, dict):
        return {name: at_layer(layer, part) for name, part in content.items()}
    return np.asarray(content[layer], np.float64)
