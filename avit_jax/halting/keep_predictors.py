"""DynamicViT's predictors (arXiv 2106.02034): small networks that say how likely each patch is to be kept."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

INIT = nnx.initializers.truncated_normal(0.02)


class KeepPredictors(nnx.Module):
    """One predictor for each stage, with parameters stacked on a stage axis. D is the width of a token.

    e = GELU(W_1 LN(x) + b_1) has D values, of which the first half is local and the mean of the second half over the
    kept patches is global. The result is log_softmax(W_4 GELU(W_3 GELU(W_2 [local, global]))), with biases, where the
    widths are D, D/2, D/4 and 2. LN adds 1e-5 to the variance. Products are in `dtype`, the log_softmax in float32.
    patches: of a whole image; the rule keeps a share of them in each stage.
    """

    def __init__(self, embed_dim: int, stages: int, patches: int, dtype: str) -> None:
        self.patches = patches
        graphdef = nnx.graphdef(nnx.eval_shape(lambda: _Predictor(embed_dim, dtype, jax.random.key(0))))

        def parameters(key: PRNGKeyArray) -> nnx.State:
            return nnx.state(_Predictor(embed_dim, dtype, key))

        # The same start for every model: with such small weights all patches are about as likely to be kept.
        keys = jax.random.split(jax.random.key(0), stages)
        self.stages = nnx.merge(graphdef, jax.vmap(parameters)(keys))

    def __call__(
        self, patches: Float[Array, "b p d"], keep: Float[Array, "b p"], stage: Int[Array, ""] | int
    ) -> Float[Array, "b p 2"]:
        """Log-probabilities of keeping and of dropping each patch. keep: 1 for patches kept so far. stage: from 0."""
        graphdef, stacked = nnx.split(self.stages)
        predictor: Any = nnx.merge(graphdef, jax.tree.map(lambda p: p[stage], stacked))
        return predictor(patches, keep)


class _Predictor(nnx.Module):
    def __init__(self, embed_dim: int, dtype: str, key: PRNGKeyArray) -> None:
        rngs = nnx.Rngs(params=key)
        self.norm = nnx.LayerNorm(embed_dim, epsilon=1e-5, use_fast_variance=False, rngs=rngs)

        def linear(inputs: int, outputs: int) -> nnx.Linear:
            return nnx.Linear(inputs, outputs, dtype=jnp.dtype(dtype), kernel_init=INIT, rngs=rngs)

        self.fc1 = linear(embed_dim, embed_dim)
        self.fc2 = linear(embed_dim, embed_dim // 2)
        self.fc3 = linear(embed_dim // 2, embed_dim // 4)
        self.fc4 = linear(embed_dim // 4, 2)

    def __call__(self, patches: Float[Array, "b p d"], keep: Float[Array, "b p"]) -> Float[Array, "b p 2"]:
        embedded = _gelu(self.fc1(self.norm(patches)))
        own, shared = jnp.split(embedded.astype(jnp.float32), 2, axis=-1)
        kept = keep.sum(-1)
        total = jnp.where(kept > 0, kept, 1)[:, None]
        mean = (shared * keep[..., None]).sum(1) / total
        both = jnp.concatenate([own, jnp.broadcast_to(mean[:, None], shared.shape)], axis=-1)
        logits = self.fc4(_gelu(self.fc3(_gelu(self.fc2(both)))))
        return jax.nn.log_softmax(logits.astype(jnp.float32))


def _gelu(x: Array) -> Array:
    return jax.nn.gelu(x, approximate=False)


def predictor_macs(embed_dim: int, patches: int) -> int:
    """Multiply-adds of one predictor for an image with this number of patches."""
    half, quarter = embed_dim // 2, embed_dim // 4
    return patches * (embed_dim**2 + embed_dim * half + half * quarter + quarter * 2)
