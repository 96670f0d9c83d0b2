"""The training objective: classification, with or without distillation, and the terms of the model's rule."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from avit_jax.gated.gates import Gates
from avit_jax.halting.image_mean import image_mean
from avit_jax.halting.rule import Classify, Halting, State, Teacher, Trace
from avit_jax.runtime.settings import Settings, setting

DISTILLATIONS = ("none", "hard", "soft")


@dataclasses.dataclass(frozen=True)
class ClassificationLoss(Settings):
    """The part of config.loss that every model has. Raises ValueError for a value out of range."""

    section = "loss"

    label_smoothing: float = setting(
        0.0, "The fraction of each target that is spread evenly over all classes.", least=0, below=1
    )
    distillation: str = setting(
        "none", "What is learnt from the teacher: its decision (hard), its distribution (soft).", choices=DISTILLATIONS
    )
    distillation_weight: float = setting(
        0.5, "The teacher's share of the classification loss; the labels have the rest.", least=0, most=1
    )
    distillation_temperature: float = setting(
        1.0, "With soft, the logits of teacher and student are divided by this.", above=0
    )


def classification_loss(
    logits: Float[Array, "b c"],
    targets: Int[Array, " b"] | Float[Array, "b c"],
    label_smoothing: float = 0.0,
    image_weight: Float[Array, " b"] | None = None,
) -> Float[Array, ""]:
    """Mean cross entropy, in nats; targets are labels or distributions (mixup), smoothed towards uniform.

    image_weight: 0 for images that do not count.
    """
    return image_mean(_cross_entropy(logits, targets, label_smoothing), image_weight)


def _cross_entropy(logits: Array, targets: Array, label_smoothing: float = 0.0) -> Float[Array, " b"]:
    if jnp.issubdtype(targets.dtype, jnp.integer):
        targets = jax.nn.one_hot(targets, logits.shape[-1])
    return optax.softmax_cross_entropy(logits, optax.smooth_labels(targets, label_smoothing))


def distillation_loss(
    head_logits: Float[Array, "heads b c"],
    targets: Int[Array, " b"] | Float[Array, "b c"],
    teacher_logits: Float[Array, "b c"] | None = None,
    *,
    kind: str = "none",
    weight: float = 0.5,
    temperature: float = 1.0,
    label_smoothing: float = 0.0,
    image_weight: Float[Array, " b"] | None = None,
    share: Float[Array, " b"] | None = None,
) -> Float[Array, ""]:
    """Classification with a teacher (DeiT, arXiv 2012.12877, equations 2 and 3), in nats.

    (1 - weight) * CE(class head, targets) + weight * term, where the term is the last head's CE with the teacher's
    decision ("hard") or temperature^2 * KL(teacher || student) ("soft"). "none": the mean logits against the targets.
    image_weight: 0 for images that do not count. share: a factor for the loss of each image; None: 1. Raises
    ValueError for an unknown kind, or if the teacher's logits are missing.
    """

    def mean(of_images: Array) -> Array:
        return image_mean(of_images if share is None else share * of_images, image_weight)

    if kind not in DISTILLATIONS:
        raise ValueError(f"distillation {kind!r} is unknown: choose one of {', '.join(DISTILLATIONS)}")
    if kind == "none":
        return mean(_cross_entropy(head_logits.mean(0), targets, label_smoothing))
    if teacher_logits is None:
        raise ValueError(f"distillation {kind!r} needs the teacher's logits")
    student = head_logits[-1]
    if kind == "hard":
        term = mean(_cross_entropy(student, teacher_logits.argmax(-1)))
    else:
        log_student = jax.nn.log_softmax(student / temperature)
        log_teacher = jax.nn.log_softmax(teacher_logits / temperature)
        divergence = optax.losses.kl_divergence_with_log_targets(log_student, log_teacher)
        term = temperature**2 * mean(divergence)
    own = mean(_cross_entropy(head_logits[0], targets, label_smoothing))
    return (1 - weight) * own + weight * term


def objective_terms(
    rule: Halting | Gates | None,
    head_logits: Float[Array, "heads b c"],
    trace: Trace,
    state: State | None,
    classify: Classify,
    settings: Any,
    image_weight: Float[Array, " b"] | None = None,
    teacher: Teacher | None = None,
) -> dict[str, Float[Array, ""]]:
    """The terms of the objective by name, weighted; their sum is minimised.

    Args:
        rule: The halting rule of training, which defines the terms; None: only classification.
        head_logits: Logits of each head.
        trace, state: What AViT.forward returns beside its output.
        classify: The mean classification loss of logits, in nats; see halting.rule.Classify.
        settings: Of the rule's type `loss_settings`, or None if it has none.
        image_weight: 0 for images that do not count.
        teacher: For a rule whose `teacher_tokens` asks for it.
    """
    if rule is None or state is None:
        return {"classification": classify(head_logits)}
    return rule.losses(
        trace, state, head_logits, classify=classify, settings=settings, image_weight=image_weight, teacher=teacher
    )
