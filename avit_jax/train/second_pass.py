"""Training with two passes of the same weights over each batch, for reduction rules that ask for it."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from avit_jax.execution import shrinking
from avit_jax.model.output import AViTOutput
from avit_jax.model.vit import AViT
from avit_jax.reduction.groups import Pass, Reduction


def both_passes(
    model: AViT,
    rules: tuple[Reduction, ...],
    images: Float[Array, "b h w c"],
    key: PRNGKeyArray,
    positions: Int[Array, "b p 2"] | None = None,
) -> tuple[AViTOutput, Pass, Pass]:
    """The output under the model's own reduction rule, its pass, and a pass under one of `rules`, drawn by chance.

    key: of the batch, or of a part of it; each pass has its own dropout and stochastic depth. positions: where patches
    are cut.
    """
    drawing, second_key = jax.random.split(jax.random.fold_in(key, model.config.depth + 2))

    def run(rule: Reduction | None, key: PRNGKeyArray) -> tuple[AViTOutput, Pass]:
        output, _, features = shrinking.run(model, images, rule, key=key, positions=positions)
        return output, Pass(output.head_logits, features)

    def second_pass(rule: Reduction) -> Pass:
        return run(rule, second_key)[1]

    different = tuple(dict.fromkeys(rules))  # each of them is compiled
    drawn = jax.random.choice(drawing, jnp.array([different.index(rule) for rule in rules]))
    output, first = run(model.config.reduction, key)
    # The gradient of a switch keeps the activations of every branch, so each branch computes its own again.
    branches = [jax.checkpoint(functools.partial(second_pass, rule)) for rule in different]
    return output, first, jax.lax.switch(drawn, branches)
