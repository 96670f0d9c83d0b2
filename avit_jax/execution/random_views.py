"""Inference on patches cut at random places: the mean answer of a few random views of each image (RaViTT)."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Shaped

from avit_jax.execution import shrinking
from avit_jax.execution.work import output_gmacs
from avit_jax.model.check_images import check_images
from avit_jax.model.random_patches import LAWS, check_tokens, config_of_tokens, draw_positions
from avit_jax.model.rule import image_keys
from avit_jax.model.vit import AViT
from avit_jax.runtime.files import shown_value
from avit_jax.runtime.numbers import is_whole


@dataclasses.dataclass(frozen=True)
class RandomViews:
    """How images are cut at inference.

    tokens: patches of a view; 0: as many as the grid has. views: random views whose answers are averaged. law: where
    patches are, see random_patches.draw_positions; "grid" with fewer tokens is a random part of the grid. seed: of the
    places. Raises ValueError for values out of range.
    """

    tokens: int = 0
    views: int = 1
    law: str = "uniform"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("tokens", 0), ("views", 1), ("seed", 0)):
            if not is_whole(getattr(self, name), least):
                value = shown_value(getattr(self, name))
                raise ValueError(f"{name} is {value}: give a whole number from {least} and below 2^31")
        if self.law not in LAWS:
            raise ValueError(f"the law of random patches is {self.law!r}: choose one of {', '.join(LAWS)}")


def random_views(
    model: AViT, images: Shaped[Array | np.ndarray, "..."], how: RandomViews
) -> tuple[Float[Array, "b k"], Float[Array, " b"]]:
    """The mean softmax of each image's random views, and the 10^9 multiply-adds of all its views.

    images: float32 [B, H, W, C], as avit_jax.preprocess returns them. The places are drawn from the image's own pixels
    and the seed, so an image has the same answer in every batch and in every run. Without a rule, the last layer
    computes only what the logits read. Raises ValueError for other images, for more tokens than the grid has, for fewer
    under a reduction rule, and for other places than the grid's under PositionDepths.
    """
    check_images(images, model.config)
    check_views(model, how)
    return _program(*nnx.split(model), jnp.asarray(images), how)


def check_views(model: AViT, how: Any) -> None:
    """Raises ValueError for what random_views cannot do with this model."""
    if not isinstance(how, RandomViews):
        raise ValueError(f"how is {shown_value(how)}: give avit_jax.RandomViews(...)")
    check_tokens(how.tokens, model.config, "tokens")
    rule = model.config.reduction
    if rule is not None and rule.by_cell and how.law != "grid":
        raise ValueError(
            f"the law of random patches is {how.law!r} and the rule {rule.name} has a depth for each cell of the grid: "
            'give law="grid", or choose another rule'
        )


@functools.partial(jax.jit, static_argnums=(0, 3))
def _program(
    graphdef: nnx.GraphDef, params: nnx.State, images: Float[Array, "b h w c"], how: RandomViews
) -> tuple[Float[Array, "b k"], Float[Array, " b"]]:
    model = nnx.merge(graphdef, params)
    config = model.config
    keys = jax.vmap(jax.random.fold_in, (0, None))(image_keys(images), how.seed)

    def view(number: Array) -> tuple[Array, Array]:
        own = jax.vmap(jax.random.fold_in, (0, None))(keys, number)
        positions = draw_positions(own, config, tokens=how.tokens, law=how.law)
        if config.rule_in_force is None:
            output = shrinking.forward(model, images, None, short_last_layer=True, positions=positions)
        else:
            output = model.forward(images, positions=positions)[0]
        seen = config_of_tokens(config, positions.shape[1])
        work = output_gmacs(seen, output, short_last_layer=True)
        return jax.nn.softmax(output.logits), jnp.asarray(work)

    answers, work = jax.lax.map(view, jnp.arange(how.views))
    return answers.mean(0), work.sum(0)
