"""Attention by one kernel that never writes the matrix of weights: cuDNN's, through jax.nn.dot_product_attention."""

import re
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

ATTENTION = ("auto", "plain", "cudnn", "xla")
Implementation = Literal["cudnn", "xla"]

# What cuDNN demands on every GPU that has the kernel; Hopper takes heads of up to 256.
_WIDTH_MULTIPLE, _MOST_WIDTH = 8, 128


def cudnn_takes(dtype: Any, width: int) -> bool:
    """Whether cuDNN's kernel takes queries of this type and width (of one head)."""
    return jnp.dtype(dtype) == jnp.bfloat16 and width % _WIDTH_MULTIPLE == 0 and width <= _MOST_WIDTH


def cudnn_is_here() -> bool:
    """Whether JAX computes on an NVIDIA GPU for which cuDNN has the kernel: compute capability 8.0 (Ampere) or more."""
    default: Any = jax.config.jax_default_device  # type: ignore[attr-defined]
    device = default if isinstance(default, jax.Device) else jax.local_devices(backend=default)[0]
    capability = re.fullmatch(r"(\d+)\.\d+", str(getattr(device, "compute_capability", "")))  # AMD's are like gfx90a
    return capability is not None and int(capability[1]) >= 8


def fused_attention(
    query: Float[Array, "b h q c"],
    key: Float[Array, "b h n c"],
    value: Float[Array, "b h n c"],
    mass: Bool[Array, "b n"] | None,
    implementation: Implementation,
) -> Float[Array, "b q d"]:
    """The mean of the values that each query attends to, heads side by side, in the type of the values.

    mass: which keys there are; None: all. An image without any key sees its first one.
    implementation: of jax.nn.dot_product_attention; "cudnn" is only for GPUs, "xla" is the same without the kernel.
    """
    query, key, value = (x.swapaxes(1, 2) for x in (query, key, value))
    batch, queries, tokens = len(query), query.shape[1], key.shape[1]
    if mass is None:
        lengths = jnp.full((batch,), tokens, jnp.int32)
    else:
        # The kernel takes a mask only as a bias of every query and key, and would compute the gradient of that bias.
        # The order of keys does not matter, so those that are there come first, and the kernel takes their number.
        order = jnp.argsort(~mass, axis=1, stable=True)
        inverse = jnp.argsort(order, axis=1)
        key, value = _reordered(key, order, inverse), _reordered(value, order, inverse)
        # One key at least: a softmax of nothing could be NaN.
        lengths = jnp.maximum(mass.sum(1, dtype=jnp.int32), 1)
    # In training JAX 0.10 refuses odd numbers of tokens for cuDNN.
    query, key, value = (jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0))) for x in (query, key, value))
    # Lengths are given even if all keys are there. Without them cuDNN 9 has computed NaN gradients for numbers of
    # tokens that do not fill its tiles (github.com/NVIDIA/cudnn-frontend, issues 160 and 1072).
    mixed = jax.nn.dot_product_attention(
        query, key, value, key_value_seq_lengths=lengths, implementation=implementation
    )
    return mixed[:, :queries].reshape(batch, queries, -1)


@jax.custom_vjp
def _reordered(
    values: Shaped[Array, "b n h c"], order: Int[Array, "b n"], inverse: Int[Array, "b n"]
) -> Shaped[Array, "b n h c"]:
    return jnp.take_along_axis(values, order[:, :, None, None], axis=1)


def _reordered_forward(values: Array, order: Array, inverse: Array) -> tuple[Array, Array]:
    return _reordered(values, order, inverse), inverse


def _reordered_backward(inverse: Array, gradient: Array) -> tuple[Array | None, ...]:
    # A gather again: the gradient that JAX derives is a scatter-add, which is slow on a GPU.
    return jnp.take_along_axis(gradient, inverse[:, :, None, None], axis=1), None, None


_reordered.defvjp(_reordered_forward, _reordered_backward)
