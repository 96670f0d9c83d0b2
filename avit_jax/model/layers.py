"""The layers of a vision transformer: patch embedding, MLP, block."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from avit_jax.model.attention import Attention, Mass
from avit_jax.model.config import AViTConfig
from avit_jax.model.linear import gelu, layer_norm, linear
from avit_jax.model.seen import Facts
from avit_jax.reduction.groups import Groups, reduce


@dataclasses.dataclass(frozen=True)  # compares by its bound: with a closure, every model would be compiled again
class _Uniform:
    bound: float

    def __call__(self, key: PRNGKeyArray, shape: tuple[int, ...], dtype: Any, *_: Any) -> Array:
        return jax.random.uniform(key, shape, dtype, -self.bound, self.bound)


class PatchEmbed(nnx.Module):
    """Non-overlapping patches, one linear map each (a convolution with stride = patch)."""

    def __init__(self, config: AViTConfig, *, rngs: nnx.Rngs) -> None:
        self.patch_size = config.patch_size
        fan_in = config.patch_size**2 * config.in_channels
        uniform = _Uniform(fan_in**-0.5)  # PyTorch's default for convolutions, which DeiT leaves in place
        self.proj = nnx.Linear(
            fan_in,
            config.embed_dim,
            dtype=jnp.dtype(config.dtype),
            kernel_init=uniform,
            bias_init=uniform,
            rngs=rngs,
        )

    def patches(self, images: Float[Array, "b h w c"]) -> Float[Array, "b p v"]:
        """The pixels of each patch, patches row by row."""
        batch, height, width, channels = images.shape
        size = self.patch_size
        rows, columns = height // size, width // size
        patches = images.reshape(batch, rows, size, columns, size, channels).transpose(0, 1, 3, 2, 4, 5)
        return patches.reshape(batch, rows * columns, size * size * channels)

    def __call__(self, images: Float[Array, "b h w c"]) -> Float[Array, "b p d"]:
        """Patches row by row, embedded."""
        return self.proj(self.patches(images))


class Mlp(nnx.Module):
    """Two linear layers with the exact (erf) GELU between them."""

    def __init__(self, config: AViTConfig, *, rngs: nnx.Rngs) -> None:
        self.fc1 = linear(config.embed_dim, config.mlp_dim, config.dtype, rngs)
        self.fc2 = linear(config.mlp_dim, config.embed_dim, config.dtype, rngs)
        self.drop = nnx.Dropout(config.drop_rate)

    def __call__(self, x: Float[Array, "b n d"], key: PRNGKeyArray | None) -> Array:
        """The output for each token. key: draws dropout; None: no dropout."""
        return self.fc2(self.drop(self.hidden(x), deterministic=key is None, rngs=key))

    def hidden(self, x: Float[Array, "... d"]) -> Float[Array, "... m"]:
        """The hidden values."""
        return gelu(self.fc1(x))


def _products(primitive: Any, *arguments: Any, **parameters: Any) -> Any:
    """A policy of jax.checkpoint: keep what linear layers give, and what a fused attention kernel does."""
    fused = str(primitive).startswith("dot_product_attention_fwd")
    return fused or jax.checkpoint_policies.dots_with_no_batch_dims_saveable(primitive, *arguments, **parameters)


def checkpointed(layer: Callable[..., Any], config: AViTConfig) -> Callable[..., Any]:
    """A scanned layer whose backward pass computes again what is not kept of the forward pass.

    With config.remat, nothing but the layer's input is kept. Otherwise the products of its linear layers are: norms,
    GELU and attention weights take most of the memory, and computing them again takes less time than storing them.
    """
    keep = None if config.remat else _products
    return jax.checkpoint(layer, prevent_cse=False, policy=keep)


def split_layers(stacked: Any, lengths: Sequence[int]) -> list[Any]:
    """The stacked weights of consecutive parts of the layers. lengths: the number of layers of each part."""
    leaves, tree = jax.tree.flatten(stacked)
    # Slices would work too, but their gradient is a sum of whole arrays.
    parts = zip(*(jax.lax.split(leaf, lengths) for leaf in leaves), strict=True)
    return [jax.tree.unflatten(tree, part) for part in parts]


@jax.custom_vjp
def layer_weights(part: Any, stacked: Any, layer: Int[Array, ""] | int) -> Any:
    """A layer's weights, read from those of all layers. Their gradient is that of the layer's own part (split_layers).

    A part is never read, so it is never copied. Otherwise a copy of all weights would wait for the backward pass.
    """
    return jax.tree.map(lambda values: jax.lax.dynamic_index_in_dim(values, layer, keepdims=False), stacked)


def _layer_weights_forward(part: Any, stacked: Any, layer: Any) -> tuple[Any, None]:
    return layer_weights(part, stacked, layer), None


def _layer_weights_backward(_: None, gradient: Any) -> tuple[Any, None, None]:
    return gradient, None, None


layer_weights.defvjp(_layer_weights_forward, _layer_weights_backward)


def drop_path(branch: Float[Array, "b n d"], rate: Float[Array, ""], key: PRNGKeyArray) -> Float[Array, "b n d"]:
    """Stochastic depth (arXiv 1603.09382): drop the branch of whole images with `rate`, scale up the rest."""
    keep = jax.random.bernoulli(key, 1 - rate, (branch.shape[0], 1, 1))
    return jnp.where(keep, branch / (1 - rate), 0)


class Block(nnx.Module):
    """Pre-norm transformer block; the residual stream stays in float32."""

    def __init__(self, config: AViTConfig, *, rngs: nnx.Rngs) -> None:
        self.norm1 = layer_norm(config, rngs)
        self.attn = Attention(config, rngs=rngs)
        self.norm2 = layer_norm(config, rngs)
        self.mlp = Mlp(config, rngs=rngs)
        self.drop = nnx.Dropout(config.drop_rate)

    def __call__(
        self,
        x: Float[Array, "b n d"],
        mass: Mass = None,
        drop_path_rate: Float[Array, ""] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "b n d"]:
        """The output of the layer.

        mass: of each key; None: all 1. drop_path_rate: of stochastic depth; None: no stochastic depth. key: draws
        dropout and stochastic depth; None: neither.
        """
        y, _ = self.attend(x, mass, drop_path_rate, key)
        return self.transform(y, drop_path_rate, key)

    def attend(
        self,
        x: Float[Array, "b n d"],
        mass: Mass = None,
        drop_path_rate: Float[Array, ""] | None = None,
        key: PRNGKeyArray | None = None,
        reads: frozenset[str] = frozenset(),
        *,
        self_visible: bool = False,
    ) -> tuple[Float[Array, "b n d"], Facts]:
        """The attention half of the layer: y = x + attention(LN(x)), and the facts that `reads` names (Seen)."""
        keys = [None] * 5 if key is None else list(jax.random.split(key, 5))
        branch, facts = self.attn(self.norm1(x), mass, reads, self_visible=self_visible)
        return x + self._regularised(branch.astype(x.dtype), drop_path_rate, keys[0], keys[1]), facts

    def attend_reduced(
        self,
        x: Float[Array, "b n d"],
        mass: Mass,
        drop_path_rate: Float[Array, ""] | None,
        key: PRNGKeyArray | None,
        reads: frozenset[str],
        choose: Callable[[Facts], Groups | None],
    ) -> tuple[Float[Array, "b k d"], Groups | None]:
        """The attention half of a layer that reduces its tokens before the values, and the groups that `choose` gave.

        The attention of all tokens is reduced with them: queries are averaged, keys are added.
        """
        keys = [None] * 5 if key is None else list(jax.random.split(key, 5))
        weights, total, facts = self.attn.weights(self.norm1(x), mass, reads)
        groups = choose(facts)
        x = x if groups is None else reduce(x, groups)
        branch = self.attn.mixed(weights, total, self.norm1(x), groups).astype(x.dtype)
        return x + self._regularised(branch, drop_path_rate, keys[0], keys[1]), groups

    def transform(
        self,
        y: Float[Array, "b n d"],
        drop_path_rate: Float[Array, ""] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "b n d"]:
        """The MLP half of the layer: y + MLP(LN(y))."""
        keys = [None] * 5 if key is None else list(jax.random.split(key, 5))
        branch = self.mlp(self.norm2(y), keys[2]).astype(y.dtype)
        return y + self._regularised(branch, drop_path_rate, keys[3], keys[4])

    def _regularised(
        self,
        branch: Array,
        drop_path_rate: Float[Array, ""] | None,
        drop_key: PRNGKeyArray | None,
        path_key: PRNGKeyArray | None,
    ) -> Array:
        if drop_key is None or path_key is None:
            return branch
        branch = self.drop(branch, deterministic=False, rngs=drop_key)
        return branch if drop_path_rate is None else drop_path(branch, drop_path_rate, path_key)

    def read(self, x: Float[Array, "b n d"], mass: Mass, queries: int) -> Float[Array, "b q d"]:
        """The first `queries` tokens after this layer, without dropout; the others serve as keys and values."""
        first = x[:, :queries] + self.attn.read(self.norm1(x), mass, queries).astype(x.dtype)
        return first + self.mlp(self.norm2(first), None).astype(x.dtype)
