"""The training objective: classification (with distillation), ponder cost, and the prior over halting depths."""

import dataclasses

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from avit_jax.runtime.settings import Settings, setting

PRIORS = ("official", "kl")
DISTILLATIONS = ("none", "hard", "soft")


@dataclasses.dataclass(frozen=True)
class ClassificationLoss(Settings):
    """The part of config.loss that any model has. Raises ValueError for values that cannot be."""

    section = "loss"

    label_smoothing: float = setting(
        0.0, "The part of each target that is spread evenly over all classes.", least=0, below=1
    )
    distillation: str = setting(
        "none", "How the teacher is followed: its decision (hard), its distribution (soft).", choices=DISTILLATIONS
    )
    distillation_weight: float = setting(
        0.5, "The teacher's part of the classification loss; the labels have the rest.", least=0, most=1
    )
    distillation_temperature: float = setting(
        1.0, "With soft, logits of teacher and student are divided by it.", above=0
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LossTerms:
    """The weighted terms of the objective; `total` is their sum."""

    classification: Float[Array, ""]
    ponder: Float[Array, ""]
    prior: Float[Array, ""]

    @property
    def total(self) -> Float[Array, ""]:
        """What is minimised."""
        return self.classification + self.ponder + self.prior


def image_mean(values: Float[Array, "b ..."], image_weight: Float[Array, " b"] | None = None) -> Float[Array, ""]:
    """The mean over images and all that belongs to them; images of weight 0 are left out."""
    if image_weight is None:
        return values.mean()
    of_images = values.reshape(len(values), -1).mean(1)
    return image_weight @ of_images / jnp.maximum(image_weight.sum(), 1)


def classification_loss(
    logits: Float[Array, "b c"],
    targets: Int[Array, " b"] | Float[Array, "b c"],
    label_smoothing: float = 0.0,
    image_weight: Float[Array, " b"] | None = None,
) -> Float[Array, ""]:
    """Mean cross entropy, in nats; targets are labels or distributions (mixup), smoothed towards uniform."""
    if jnp.issubdtype(targets.dtype, jnp.integer):
        targets = jax.nn.one_hot(targets, logits.shape[-1])
    entropy = optax.softmax_cross_entropy(logits, optax.smooth_labels(targets, label_smoothing))
    return image_mean(entropy, image_weight)


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
) -> Float[Array, ""]:
    """Classification with a teacher (DeiT, arXiv 2012.12877, equations 2 and 3), in nats.

    (1 - weight) * CE(class head, targets) + weight * term, where the term of the last head is CE with the teacher's
    decision ("hard") or temperature^2 * KL(teacher || student) ("soft"). "none": the mean logits against the targets.
    Raises ValueError for an unknown kind, or where the teacher's logits are missing.
    """
    if kind not in DISTILLATIONS:
        raise ValueError(f"distillation {kind!r} is unknown: choose one of {', '.join(DISTILLATIONS)}")
    if kind == "none":
        return classification_loss(head_logits.mean(0), targets, label_smoothing, image_weight)
    if teacher_logits is None:
        raise ValueError(f"distillation {kind!r} needs the teacher's logits")
    student = head_logits[-1]
    if kind == "hard":
        term = classification_loss(student, teacher_logits.argmax(-1), image_weight=image_weight)
    else:
        log_student = jax.nn.log_softmax(student / temperature)
        log_teacher = jax.nn.log_softmax(teacher_logits / temperature)
        divergence = optax.losses.kl_divergence_with_log_targets(log_student, log_teacher)
        term = temperature**2 * image_mean(divergence, image_weight)
    own = classification_loss(head_logits[0], targets, label_smoothing, image_weight)
    return (1 - weight) * own + weight * term


def ponder_loss(ponder_cost: Float[Array, "b n"], image_weight: Float[Array, " b"] | None = None) -> Float[Array, ""]:
    """Mean ponder cost over images and tokens, in layers (arXiv 2112.07658)."""
    return image_mean(ponder_cost, image_weight)


def log_depth_prior(num_layers: int, kind: str, target_depth: float, deviation: float = 1.0) -> Float[Array, " l"]:
    """Logarithm of the target distribution over layers 1..L: a bell around a layer.

    "kl": the normal density at 1..L around target_depth, normalised; deviation in layers. "official": as the published
    code has it, around layer 9 with deviation 1 whatever the arguments say, times 0.98 / (sum of the first 8 values);
    it does not sum to 1. Raises ValueError for an unknown kind.
    """
    layers = jnp.arange(1, num_layers + 1, dtype=jnp.float32)
    if kind == "official":
        log_density = jax.scipy.stats.norm.logpdf(layers, 9.0)
        return log_density + jnp.log(0.98) - jax.nn.logsumexp(log_density[:8])
    if kind == "kl":
        return jax.nn.log_softmax(jax.scipy.stats.norm.logpdf(layers, target_depth, deviation))
    raise ValueError(f"prior {kind!r} is unknown: choose one of {', '.join(PRIORS)}")


def prior_loss(
    layer_halting_mean: Float[Array, " l"], kind: str = "kl", target_depth: float = 9.0, deviation: float = 1.0
) -> Float[Array, ""]:
    """How far the mean halting scores H by layer are from the depth prior p, in nats; q = H / sum(H).

    "kl": KL(q || p), as in the paper. "official": sum(p * (log p - log q)) / L with q clipped to 0.01..0.99, counted
    when positive. q is computed as softmax(log(max(H, tiny))): a far gate gives H near 1e-33, where the gradient of
    the plain quotient overflows. Raises ValueError for an unknown kind.
    """
    log_prior = log_depth_prior(layer_halting_mean.shape[0], kind, target_depth, deviation)
    log_halting = jnp.log(jnp.maximum(layer_halting_mean, jnp.finfo(jnp.float32).tiny))
    if kind == "official":
        q = jnp.clip(jax.nn.softmax(log_halting), 0.01, 0.99)
        return jax.nn.relu(jnp.sum(jnp.exp(log_prior) * (log_prior - jnp.log(q))) / log_prior.shape[0])
    log_q = jax.nn.log_softmax(log_halting)
    return jnp.sum(jnp.exp(log_q) * (log_q - log_prior))


def halting_losses(
    halting_scores: Float[Array, "l b n"],
    ponder_cost: Float[Array, "b n"],
    *,
    ponder_weight: float,
    prior_weight: float,
    prior: str,
    prior_target_depth: float,
    prior_deviation: float = 1.0,
    image_weight: Float[Array, " b"] | None = None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The two weighted halting terms: ponder_weight * mean ponder cost and prior_weight * prior."""
    if image_weight is None:
        by_layer = halting_scores.mean((1, 2))
    else:
        by_layer = jax.vmap(image_mean, (0, None))(halting_scores, image_weight)
    prior_term = prior_loss(by_layer, prior, prior_target_depth, prior_deviation)
    return ponder_weight * ponder_loss(ponder_cost, image_weight), prior_weight * prior_term
