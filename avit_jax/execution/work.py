"""Work, counted in multiply-adds from the depths at which tokens stopped (arXiv 2112.07658; papers call it FLOPs)."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


def block_macs(
    active: Float[Array | np.ndarray, "..."], embed_dim: int, mlp_dim: int
) -> Float[Array | np.ndarray, "..."]:
    """Multiply-adds of one block with n active tokens: n * (4 d^2 + 2 d m) linear, 2 n^2 d in attention."""
    return active * (4 * embed_dim**2 + 2 * embed_dim * mlp_dim) + 2 * active**2 * embed_dim


def last_block_macs(
    active: Float[Array | np.ndarray, "..."], num_read: int, embed_dim: int, mlp_dim: int
) -> Float[Array | np.ndarray, "..."]:
    """Multiply-adds of the last block where only num_read tokens are read: the n active ones are keys and values."""
    keys_and_values = active * 2 * embed_dim**2
    read = 2 * embed_dim**2 + 2 * embed_dim * mlp_dim + 2 * active * embed_dim
    return keys_and_values + num_read * read * (active > 0)


def image_gmacs(
    token_depth: Int[Array, "b n"],
    *,
    depth: int,
    embed_dim: int,
    mlp_dim: int,
    patch_values: int,
    num_special: int,
    head_macs: int,
) -> Float[Array, " b"]:
    """10^9 multiply-adds of each image: patch embedding, the active tokens of every block, and the heads.

    patch_values is patch_size^2 * in_channels, head_macs the multiply-adds of the heads. Norms, softmax, GELU and the
    mean over patches do not count, as in the papers.
    """
    layers = jnp.arange(1, depth + 1)
    active = (token_depth[:, :, None] >= layers).sum(1).astype(jnp.float32)
    embedding = (token_depth.shape[1] - num_special) * patch_values * embed_dim
    return (block_macs(active, embed_dim, mlp_dim).sum(-1) + embedding + head_macs) / 1e9
