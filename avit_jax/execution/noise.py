"""Dropout and stochastic depth in planned execution: drawn as in masked execution, then moved to where tokens lie."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from avit_jax.execution.places import Layout
from avit_jax.model.config import AViTConfig
from avit_jax.model.layers import Block


@dataclasses.dataclass(frozen=True)
class Noise:
    """The noise of one layer.

    It is drawn for the whole batch, so that every number of devices draws the same, and `of` takes that of a device.
    """

    # Of dropout: attention, hidden values, MLP. For each token of each image; after `of`, for each place.
    factors: tuple[Float[Array, "*t _"] | None, ...] = (None, None, None)
    kept: tuple[Bool[Array, "..."] | None, ...] = (None, None)  # by stochastic depth: attention, MLP
    rate: Float[Array, ""] | None = None  # of stochastic depth in this layer

    @classmethod
    def of_layer(
        cls,
        config: AViTConfig,
        block: Block,
        key: PRNGKeyArray | None,
        layer: Int[Array, ""] | int,
        rate: Float[Array, ""] | None,
        images: int,
    ) -> "Noise":
        """The noise of a layer. key: of the step; None: no noise. layer: from 0. images: of the whole batch."""
        if key is None:
            return cls()
        # As in Block: dropout and path of attention, hidden values, dropout and path of the MLP.
        drop, path, hidden, drop_mlp, path_mlp = jax.random.split(jax.random.fold_in(key, layer), 5)

        def factors(dropout: nnx.Dropout, key: PRNGKeyArray, width: int) -> Array | None:
            if not dropout.rate:
                return None
            return dropout(jnp.ones((images, config.num_tokens, width)), deterministic=False, rngs=key)

        def kept(key: PRNGKeyArray) -> Array | None:
            if not config.drop_path_rate or rate is None:
                return None
            return jax.random.bernoulli(key, 1 - rate, (images, 1, 1))[:, 0, 0]

        return cls(
            (
                factors(block.drop, drop, config.embed_dim),
                factors(block.mlp.drop, hidden, config.mlp_dim),
                factors(block.drop, drop_mlp, config.embed_dim),
            ),
            (kept(path), kept(path_mlp)),
            rate,
        )

    def of(self, image: Int[Array, " b"], index: Int[Array, "b n"], layout: Layout) -> "Noise":
        """The noise of a layout's tokens. image: position of each image in the batch; index: of tokens in their image.

        What was drawn for each token or image becomes one row for each place.
        """
        factors = tuple(None if f is None else layout.of_tokens(f[image[:, None], index]) for f in self.factors)
        kept = tuple(
            None if k is None else layout.of_tokens(jnp.broadcast_to(k[image, None], index.shape)) for k in self.kept
        )
        return Noise(factors, kept, self.rate)

    def attention(self, branch: Float[Array, "*t d"]) -> Float[Array, "*t d"]:
        """The branch of attention, with noise."""
        return self._path(_dropped(branch, self.factors[0]), self.kept[0])

    def mlp(self, x: Float[Array, "*t d"], block: Block) -> Float[Array, "*t d"]:
        """The branch of the MLP, with noise, from its normalised input."""
        inner = _dropped(block.mlp.hidden(x), self.factors[1])
        return self._path(_dropped(block.mlp.fc2(inner), self.factors[2]), self.kept[1])

    def _path(self, branch: Float[Array, "*t d"], kept: Bool[Array, "*t"] | None) -> Float[Array, "*t d"]:
        if kept is None or self.rate is None:
            return branch
        return jnp.where(kept[..., None], branch / (1 - self.rate), 0)


def _dropped(values: Float[Array, "*t m"], factors: Float[Array, "*t m"] | None) -> Float[Array, "*t m"]:
    return values if factors is None else values * factors
