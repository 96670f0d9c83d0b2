"""Linear layers, LayerNorm and GELU as every part of the model uses them."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from avit_jax.model.config import AViTConfig

# timm's trunc_normal_(std=0.02) truncates at +-2, which is +-100 standard deviations.
INIT = nnx.initializers.truncated_normal(0.02, lower=-100.0, upper=100.0)


def _wide_matmul(a: Array, b: Array) -> Float[Array, "..."]:
    """a @ b as float32."""
    if a.dtype == jnp.float32:
        return a @ b
    # On a CPU, bfloat16 matmul is fast only with float32 output. Elsewhere the output is bfloat16, to write less
    # memory.
    return jax.lax.platform_dependent(
        a,
        b,
        cpu=lambda a, b: jnp.matmul(a, b, preferred_element_type=jnp.float32),
        default=lambda a, b: (a @ b).astype(jnp.float32),
    )


@jax.custom_vjp
def matmul(x: Float[Array, "... i"], kernel: Float[Array, "i o"]) -> Float[Array, "... o"]:
    """x @ kernel, with a gradient that is fast on a CPU."""
    return _wide_matmul(x, kernel)


def _matmul_forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return _wide_matmul(x, kernel), (x, kernel)


def _matmul_backward(saved: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    x, kernel = saved
    gradient = gradient.astype(x.dtype)
    rows, gradient_rows = x.reshape(-1, x.shape[-1]), gradient.reshape(-1, gradient.shape[-1])
    # Only reverse mode is defined. A CPU copies the operand that it transposes; transposing the narrower one takes 10 %
    # off a training step.
    if rows.shape[1] > gradient_rows.shape[1]:
        kernel_gradient = _wide_matmul(gradient_rows.T, rows).T
    else:
        kernel_gradient = _wide_matmul(rows.T, gradient_rows)
    return _wide_matmul(gradient, kernel.T).astype(x.dtype), kernel_gradient.astype(kernel.dtype)


matmul.defvjp(_matmul_forward, _matmul_backward)


def _dot_general(x: Array, kernel: Array, *_: Any, **__: Any) -> Array:
    """nnx.Linear's contraction of the last axis with the first."""
    return matmul(x, kernel)


def gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """x * Phi(x), exactly. jax.nn.gelu's erfc form is the same function, but a tenth slower in training on a CPU."""
    wide = x.astype(jnp.float32)  # 1 + erf cancels for negative x, which needs float32
    return (0.5 * wide * (1 + jax.lax.erf(wide * 0.5**0.5))).astype(x.dtype)


def linear(inputs: int, outputs: int, dtype: str, rngs: nnx.Rngs, *, use_bias: bool = True) -> nnx.Linear:
    """A linear layer that multiplies in `dtype`; its parameters and its output are float32."""
    return nnx.Linear(
        inputs,
        outputs,
        use_bias=use_bias,
        dtype=jnp.dtype(dtype),
        kernel_init=INIT,
        dot_general=_dot_general,
        rngs=rngs,
    )


def layer_norm(config: AViTConfig, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """LayerNorm in float32."""
    # The fast variance E[x^2] - E[x]^2 loses precision if a token's mean is large.
    return nnx.LayerNorm(config.embed_dim, epsilon=config.norm_epsilon, use_fast_variance=False, rngs=rngs)
