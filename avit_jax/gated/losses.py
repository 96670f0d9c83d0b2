"""The usage terms of Meng et al.'s objective (arXiv 2111.15668): how much of the network the gates leave on."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from avit_jax.halting.image_mean import image_mean
from avit_jax.runtime.settings import Settings, setting

FORMS = ("paper", "official")


@dataclasses.dataclass(frozen=True)
class GateLoss(Settings):
    """The part of config.loss that gates add. Raises ValueError for a value out of range."""

    section = "loss"

    gate_weight: float = setting(2.0, "Weight of each of the three usage terms of gates.", least=0)
    gate_form: str = setting(
        "official",
        "paper: squares of all three deviations (as we remember it); official: of patches only, as the public code.",
        choices=FORMS,
    )
    token_target: float = setting(0.5, "The share of tokens that gates should leave on, 0..1.", least=0, most=1)
    head_target: float = setting(0.5, "The share of heads, where a layer runs.", least=0, most=1)
    sublayer_target: float = setting(0.5, "The share of attentions and MLPs.", least=0, most=1)


def usage_losses(
    tokens: Float[Array, "l b n"],
    heads: Float[Array, "l b h"],
    sublayers: Float[Array, "l b 2"],
    settings: GateLoss,
    image_weight: Float[Array, " b"] | None = None,
) -> dict[str, Float[Array, ""]]:
    """The weighted terms token_use, head_use and sublayer_use.

    With gates t, h and s, means over images, layers and what a layer has, and M = 1 where s_1 + s_2 > 0:

        token_use     (mean(t) - token_target)^2
        head_use      |sum(h M) / sum(M) - head_target|     its square with the form "paper"
        sublayer_use  |mean(s) - sublayer_target|           likewise

    The class token counts in t; the first layer, which has no gates of heads and sublayers, does not count in h and s.
    image_weight: 0 for images that do not count.
    """
    heads, sublayers = heads[1:], sublayers[1:]

    def mean(values: Array) -> Array:
        return image_mean(jnp.moveaxis(values, 1, 0), image_weight)

    runs = jax.lax.stop_gradient(sublayers.sum(-1, keepdims=True) > 0).astype(heads.dtype)
    terms = {"token_use": jnp.square(mean(tokens) - settings.token_target)}
    if len(heads):  # not in a model of one layer
        share = mean(heads * runs) / jnp.maximum(mean(runs), jnp.finfo(heads.dtype).tiny)
        form = jnp.square if settings.gate_form == "paper" else jnp.abs
        terms["head_use"] = form(share - settings.head_target)
        terms["sublayer_use"] = form(mean(sublayers) - settings.sublayer_target)
    return {name: settings.gate_weight * term for name, term in terms.items()}
