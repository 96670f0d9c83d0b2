"""Dropout and stochastic depth in planned execution: drawn as in masked execution, then moved to where tokens lie."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from avit_jax.execution.places import Layout
from avit_jax.model.config import AViTConfig
from avit_jax.model.layers import Block


@dataclasses.dataclass(frozen=True)
class Noise:
    """The noise of one layer for the images of one device."""

    config: AViTConfig
    key: PRNGKeyArray | None  # of the step; None: no noise
    layer: Int[Array, ""] | int  # from 0
    rate: Float[Array, ""] | None  # of stochastic depth in this layer
    images: int  # of the whole batch: the noise is drawn for all, so that every number of devices draws the same
    image: Int[Array, " b"]  # position in the batch of each row's image
    index: Int[Array, "b n"]  # position in its image of each slot's token
    layout: Layout

    def attention(self, branch: Float[Array, "t d"], block: Block) -> Float[Array, "t d"]:
        """The branch of attention, with noise."""
        if self.key is None:
            return branch
        drop, path, *_ = self._keys(self.key)
        return self._path(self._dropped(branch, block.drop, drop), path)

    def mlp(self, x: Float[Array, "t d"], block: Block) -> Float[Array, "t d"]:
        """The branch of the MLP, with noise, from its normalised input."""
        if self.key is None:
            return block.mlp(x[None], None)[0]
        _, _, hidden, drop, path = self._keys(self.key)
        inner = self._dropped(block.mlp.hidden(x), block.mlp.drop, hidden)
        return self._path(self._dropped(block.mlp.fc2(inner), block.drop, drop), path)

    def _keys(self, key: PRNGKeyArray) -> Array:
        """The five keys of a layer in Block: dropout and path of attention, hidden values, dropout and path of MLP."""
        return jax.random.split(jax.random.fold_in(key, self.layer), 5)

    def _dropped(self, values: Float[Array, "t m"], drop: nnx.Dropout, key: PRNGKeyArray) -> Float[Array, "t m"]:
        if not drop.rate:
            return values
        ones = jnp.ones((self.images, self.config.num_tokens, values.shape[1]))
        factors = drop(ones, deterministic=False, rngs=key)
        return values * self.layout.flat(factors[self.image[:, None], self.index])

    def _path(self, branch: Float[Array, "t d"], key: PRNGKeyArray) -> Float[Array, "t d"]:
        if not self.config.drop_path_rate or self.rate is None:
            return branch
        keep = jax.random.bernoulli(key, 1 - self.rate, (self.images, 1, 1))[:, 0, 0]
        kept = self.layout.flat(jnp.broadcast_to(keep[self.image][:, None], self.index.shape))
        return jnp.where(kept[:, None], branch / (1 - self.rate), 0)
