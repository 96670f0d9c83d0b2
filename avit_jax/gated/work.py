"""Multiply-adds of a layer whose tokens, heads and sublayers are partly off, truly and as Meng et al. count them."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from avit_jax.gated.gates import Choice

_OF_A_NORM = 5  # operations for each value of a LayerNorm, in the published count


def layer_macs(config: Any, choice: Choice, *, short_last_layer: bool = False) -> Float[Array, "l b"]:
    """Multiply-adds of each layer of each image, gates included.

    With n tokens on, H' of H heads on, D' = D H' / H, MLP width m and sublayer gates s:

        s_1 (3 n D D' + 2 n^2 D' + n D' D) + s_2 (n D' m + n m D) + (N - 1) D + (H + 2) D

    The last summand is that of the gates of heads and sublayers, which the first layer does not have; N - 1 are the
    patches. choice: of all layers. short_last_layer: the last layer computes only the tokens that the logits read.
    """
    n, width, s = _on(config, choice)
    d, m = config.embed_dim, config.mlp_dim
    queries = n
    if short_last_layer and config.pool == "token":
        last = (jnp.arange(config.depth) == config.depth - 1)[:, None]
        queries = jnp.where(last, config.num_outputs, n)
    attention = queries * d * width + 2 * n * d * width + 2 * queries * n * width + queries * width * d
    return s[..., 0] * attention + s[..., 1] * queries * (width * m + m * d) + _of_gates(config)


def published_macs(config: Any, choice: Choice) -> Float[Array, "l b"]:
    """The same as the public code's table counts it: for comparison only.

    It counts the output projection as n D'^2 instead of n D' D, a layer without heads as nothing, and 5 for each value
    of a LayerNorm.
    """
    n, width, s = _on(config, choice)
    d, m = config.embed_dim, config.mlp_dim
    attention = 3 * n * d * width + 2 * n**2 * width + n * width**2
    layers = s[..., 0] * attention + s[..., 1] * n * (width * m + m * d)
    return jnp.where(width > 0, layers, 0) + 2 * _OF_A_NORM * config.num_tokens * d + _of_gates(config)


def _on(config: Any, choice: Choice) -> tuple[Array, Array, Array]:
    """Tokens, width of the heads, and sublayers that are on."""
    return choice.tokens.sum(-1), config.embed_dim * choice.heads.mean(-1), choice.sublayers


def _of_gates(config: Any) -> Float[Array, "l 1"]:
    patches = config.num_tokens - config.num_special
    others = jnp.where(jnp.arange(config.depth) > 0, config.num_heads + 2, 0)
    return (patches + others)[:, None] * float(config.embed_dim)
