"""The linear maps of Meng et al.'s gates (arXiv 2111.15668), of all layers."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

_INIT = nnx.initializers.truncated_normal(0.02)


class GateHeads(nnx.Module):
    """The linear maps from tokens to gate logits, stacked on a layer axis; float32.

    D (width), H (heads): patches [l, D, 1], heads [l, D, H] and sublayers [l, D, 2], with biases. The first layer's
    maps of heads and sublayers are zero and not used.
    """

    def __init__(self, depth: int, embed_dim: int, num_heads: int, token_bias: float, bias: float) -> None:
        # The same start for every model.
        keys = jax.random.split(jax.random.key(0), 3)
        self.tokens = _Stack(keys[0], depth, embed_dim, 1, token_bias)
        self.heads = _Stack(keys[1], depth, embed_dim, num_heads, bias, unused=1)
        self.sublayers = _Stack(keys[2], depth, embed_dim, 2, bias, unused=1)


class _Stack(nnx.Module):
    def __init__(
        self, key: PRNGKeyArray, depth: int, inputs: int, outputs: int, bias: float, *, unused: int = 0
    ) -> None:
        there = (jnp.arange(depth) >= unused).astype(jnp.float32)
        self.kernel = nnx.Param(_INIT(key, (depth, inputs, outputs)) * there[:, None, None])
        self.bias = nnx.Param(jnp.full((depth, outputs), bias) * there[:, None])

    def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... k"]:
        """The logits, once the layer axis is gone. In full precision, because a gate is a comparison."""
        return jnp.matmul(x, self.kernel[...], precision=jax.lax.Precision.HIGHEST) + self.bias[...]
