"""The losses of A-ViT: ponder cost, and the prior over halting depths."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from avit_jax.halting.image_mean import image_mean
from avit_jax.runtime.settings import Settings, setting

PRIORS = ("official", "kl")


@dataclasses.dataclass(frozen=True)
class AViTLoss(Settings):
    """The part of config.loss that A-ViT adds. Raises ValueError for a value out of range."""

    section = "loss"

    ponder_weight: float = setting(0.0, "Weight of the mean ponder cost, which is in layers.", least=0)
    prior_weight: float = setting(0.0, "Weight of the prior over the layers where tokens halt.", least=0)
    prior: str = setting(
        "kl",
        "kl: the paper's Kullback-Leibler divergence; official: that of the published code, always around layer 9.",
        choices=PRIORS,
    )
    prior_target_depth: float = setting(9.0, "Centre of the kl prior, in layers.")
    prior_deviation: float = setting(1.0, "Standard deviation of the kl prior, in layers.", above=0)


def _check_prior(kind: str) -> None:
    if kind not in PRIORS:
        raise ValueError(f"prior {kind!r} is unknown: choose one of {', '.join(PRIORS)}")


def ponder_loss(ponder_cost: Float[Array, "b n"], image_weight: Float[Array, " b"] | None = None) -> Float[Array, ""]:
    """Mean ponder cost over images and tokens, in layers (arXiv 2112.07658)."""
    return image_mean(ponder_cost, image_weight)


def log_depth_prior(num_layers: int, kind: str, target_depth: float, deviation: float = 1.0) -> Float[Array, " l"]:
    """Logarithm of the target distribution over layers 1..L: a bell around a layer.

    "kl": the normal density at 1..L around target_depth, normalised; deviation in layers. "official": as in the
    published code, a normal density around layer 9 with deviation 1, whatever the arguments are, times 0.98 / (sum of
    the first 8 values); it does not sum to 1. Raises ValueError for an unknown kind.
    """
    _check_prior(kind)
    layers = jnp.arange(1, num_layers + 1, dtype=jnp.float32)
    if kind == "official":
        log_density = jax.scipy.stats.norm.logpdf(layers, 9.0)
        return log_density + jnp.log(0.98) - jax.nn.logsumexp(log_density[:8])
    return jax.nn.log_softmax(jax.scipy.stats.norm.logpdf(layers, target_depth, deviation))


def prior_loss(
    layer_halting_mean: Float[Array, " l"], kind: str = "kl", target_depth: float = 9.0, deviation: float = 1.0
) -> Float[Array, ""]:
    """How far the mean halting scores H by layer are from the depth prior p, in nats; q = H / sum(H).

    "kl": KL(q || p), as in the paper. "official": sum(p * (log p - log q)) / L with q clipped to 0.01..0.99, and 0 if
    that is negative. target_depth and deviation: in layers, as for log_depth_prior. q is computed as softmax(log(max(H,
    tiny))), because a gate far out of range gives H near 1e-33, where the gradient of the plain quotient overflows.
    Raises ValueError for an unknown kind.
    """
    log_prior = log_depth_prior(layer_halting_mean.shape[0], kind, target_depth, deviation)
    log_halting = jnp.log(jnp.maximum(layer_halting_mean, jnp.finfo(jnp.float32).tiny))
    if kind == "official":
        q = jnp.clip(jax.nn.softmax(log_halting), 0.01, 0.99)
        return jax.nn.relu(jnp.sum(jnp.exp(log_prior) * (log_prior - jnp.log(q))) / log_prior.shape[0])
    log_q = jax.nn.log_softmax(log_halting)
    return jnp.sum(jnp.exp(log_q) * (log_q - log_prior))


def halting_losses(
    halting_score: Float[Array, "l b n"],
    ponder_cost: Float[Array, "b n"],
    settings: AViTLoss,
    image_weight: Float[Array, " b"] | None = None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The two weighted terms: ponder_weight * mean ponder cost, and prior_weight * prior of the mean score by layer."""
    if image_weight is None:
        by_layer = halting_score.mean((1, 2))
    else:
        by_layer = jax.vmap(image_mean, (0, None))(halting_score, image_weight)
    prior = prior_loss(by_layer, settings.prior, settings.prior_target_depth, settings.prior_deviation)
    return settings.ponder_weight * ponder_loss(ponder_cost, image_weight), settings.prior_weight * prior
