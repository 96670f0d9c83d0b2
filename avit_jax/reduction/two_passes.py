"""MCTF's training (arXiv 2403.10030): a second pass of the same weights merges fewer tokens, and both must agree."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from avit_jax.halting.image_mean import image_mean
from avit_jax.halting.rule import Classify
from avit_jax.reduction.groups import Pass
from avit_jax.runtime.settings import Settings, setting

_WHOLE, _MOST = 16, 7  # the paper's r, and the largest r of its second pass
_SURE = 0.4  # probability of its label above which an image's two passes must agree


@dataclasses.dataclass(frozen=True)
class MCTFLoss(Settings):
    """The part of config.loss that MCTF adds; the defaults are the published weights.

    Raises ValueError for a value out of range.
    """

    section = "loss"

    second_pass_weight: float = setting(
        1.0, "mctf: weight of the classification loss of a second pass that merges fewer tokens.", least=0
    )
    agreement_weight: float = setting(
        3.0, "mctf: weight of the mean squared difference of both class tokens; with both 0 there is one pass.", least=0
    )


def lighter_merges(merges: Sequence[int], settings: MCTFLoss) -> list[tuple[int, ...]]:
    """Tokens that merge in each layer, for every second pass that may be drawn; none if there is no such pass.

    merges: of the first pass. A second pass has 0, 1, ... or 7 sixteenths of them, spread evenly.
    """
    if not any(merges) or not (settings.second_pass_weight or settings.agreement_weight):
        return []
    ends = np.cumsum((0, *merges))
    return [tuple(np.diff(ends * part // _WHOLE).tolist()) for part in range(_MOST + 1)]


def agreement(
    first: Pass, second: Pass, labels: Int[Array, " b"], image_weight: Float[Array, " b"] | None = None
) -> Float[Array, ""]:
    """The mean squared difference of the features, over the images that the first pass is sure of; 0 without any.

    Sure means that the label has a probability above 0.4. The second pass is the target: it gets no gradient. The paper
    trains without mixup; with it, the label is the image's own.
    """
    logits = first.head_logits.mean(0)
    of_label = jnp.take_along_axis(jax.nn.softmax(logits), labels[:, None], axis=1)[:, 0]
    sure = (of_label > _SURE).astype(logits.dtype)
    distance = jnp.square(first.features - jax.lax.stop_gradient(second.features)).mean((0, 2))
    return image_mean(distance, sure if image_weight is None else sure * image_weight)


def pair_losses(
    first: Pass,
    second: Pass,
    *,
    labels: Int[Array, " b"],
    classify: Classify,
    settings: MCTFLoss,
    image_weight: Float[Array, " b"] | None = None,
) -> dict[str, Float[Array, ""]]:
    """The three weighted terms: classification of both passes, and their agreement."""
    return {
        "classification": classify(first.head_logits),
        "second_pass": settings.second_pass_weight * classify(second.head_logits),
        "agreement": settings.agreement_weight * agreement(first, second, labels, image_weight),
    }
