"""DynamicViT's training (arXiv 2106.02034): patches are dropped by chance, as masks, so that predictors learn."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from avit_jax.halting.image_mean import image_mean
from avit_jax.halting.rule import Classify, Halting, State, Teacher, Trace, first_state
from avit_jax.model.rule import Keys
from avit_jax.model.seen import Seen
from avit_jax.runtime.settings import Settings, setting


@dataclasses.dataclass(frozen=True)
class DynamicViTLoss(Settings):
    """The part of config.loss that DynamicViT adds; the defaults are the published weights.

    Raises ValueError for a value out of range.
    """

    section = "loss"

    keep_ratio_weight: float = setting(
        2.0, "dynamicvit: weight of (share of kept patches - its target)^2, the mean over stages.", least=0
    )
    teacher_logits_weight: float = setting(
        0.5, "dynamicvit: weight of KL(teacher || student) of the logits; needs a teacher if above 0.", least=0
    )
    teacher_tokens_weight: float = setting(
        0.5, "dynamicvit: weight of the squared distance of kept tokens to the teacher's; as above.", least=0
    )


@dataclasses.dataclass(frozen=True)
class KeepSampling(Halting):
    """What training under DynamicViT runs: every token is computed, and attention weighs keys by decisions d in {0, 1}.

    For each stage, a predictor reads the tokens that enter layer `layers[stage]` and gives z, the log-probabilities of
    keeping and dropping each patch. With Gumbel noise g (one draw for each image, stage, patch and choice):

        d <- d * [z + g is higher for keeping]          gradient: that of softmax(z + g), straight through

    Special tokens have d = 1. A token without mass still attends to itself. token_depth counts the layers that a token
    enters with d = 1. The loss has four terms:

        classification + keep_ratio_weight * mean over stages and images of (mean_n d_n - keep_rate^stage)^2
        + teacher_logits_weight * KL(teacher || student) + teacher_tokens_weight * mean (LN(x_L) - teacher's LN(x_L))^2

    where the last mean is over the channels of the patches that are kept after the last stage, without gradient to d.
    """

    keep_rate: float
    layers: tuple[int, ...]
    num_special: int

    name: ClassVar[str] = "dynamicvit training"
    label: ClassVar[str] = "DynamicViT in training"
    reads: ClassVar[frozenset[str]] = frozenset({"tokens"})
    draws: ClassVar[bool] = True
    self_visible: ClassVar[bool] = True
    teacher_tokens: ClassVar[bool] = True
    loss_settings: ClassVar[type[Settings] | None] = DynamicViTLoss

    def describe(self) -> str:
        """The settings, such as "patches kept by chance, rate 0.7 before layers 3, 6, 9"."""
        return f"patches kept by chance, rate {self.keep_rate:g} before layers {', '.join(map(str, self.layers))}"

    def initial(self, batch: int, config: Any, draw: Keys | None = None) -> State:
        """All tokens kept; the random keys of the images go along."""
        assert draw is not None
        state = first_state(batch, config.num_tokens, config.num_outputs, config.embed_dim)
        return dataclasses.replace(
            state, of_tokens={"keep": jnp.ones((batch, config.num_tokens))}, of_images={"draw": draw}
        )

    def mass(self, state: State) -> Float[Array, "b n"]:
        """The decisions d."""
        return state.of_tokens["keep"]

    def advance(
        self,
        state: State,
        seen: Seen,
        *,
        layer: Int[Array, ""] | int,
        is_last: Bool[Array, ""] | bool,
        module: Any = None,
    ) -> tuple[State, Trace]:
        """The state after a layer, and the decisions [b n] for the next one as "keep"."""
        assert seen.tokens is not None
        tokens, keep = seen.tokens, state.of_tokens["keep"]

        def decide(keep: Array) -> Array:
            stage = jnp.searchsorted(jnp.array(self.layers), layer + 1)
            patches, before = tokens[:, self.num_special :], keep[:, self.num_special :]
            noise = gumbel_noise(state.of_images["draw"], stage, patches.shape[1])
            kept = straight_through(module(patches, before, stage) + noise) * before
            return keep.at[:, self.num_special :].set(kept)

        acts = jnp.isin(layer + 1, jnp.array(self.layers))
        new_keep = jax.lax.cond(acts, decide, lambda keep: keep, keep)
        new_state = dataclasses.replace(
            state,
            token_depth=state.token_depth + (keep > 0),
            output=tokens[:, : state.output.shape[1]],
            of_tokens={"keep": new_keep},
        )
        return new_state, Trace(of_tokens={"keep": new_keep})

    def losses(
        self,
        trace: Trace,
        state: State,
        head_logits: Float[Array, "heads b k"],
        *,
        classify: Classify,
        settings: DynamicViTLoss,
        image_weight: Float[Array, " b"] | None = None,
        teacher: Teacher | None = None,
    ) -> dict[str, Float[Array, ""]]:
        """The four weighted terms. Raises ValueError for a term that needs a teacher if there is none."""
        by_layer = trace.of_tokens["keep"][..., self.num_special :]
        ratios = [
            image_mean(jnp.square(by_layer[layer - 1].mean(-1) - self.keep_rate**stage), image_weight)
            for stage, layer in enumerate(self.layers, 1)
        ]
        terms = {
            "classification": classify(head_logits),
            "keep_ratio": settings.keep_ratio_weight * jnp.stack(ratios).mean(),
        }
        for name in ("teacher_logits", "teacher_tokens"):
            weight = getattr(settings, f"{name}_weight")
            if weight > 0 and teacher is None:
                raise ValueError(
                    f"{settings.key(f'{name}_weight')} is {weight:g} and there is no teacher: give config.teacher, "
                    "the static model that training starts from, or set the weight to 0"
                )
        if teacher is not None:
            divergence = _divergence(teacher.logits, head_logits.mean(0))
            distance = self._token_distance(teacher.tokens, state, image_weight)
            terms["teacher_logits"] = settings.teacher_logits_weight * image_mean(divergence, image_weight)
            terms["teacher_tokens"] = settings.teacher_tokens_weight * distance
        return terms

    def _token_distance(
        self, teacher_tokens: Array, state: State, image_weight: Float[Array, " b"] | None
    ) -> Float[Array, ""]:
        """The mean squared difference to the teacher's tokens over all patches that are kept; 0 if there are none."""
        own = state.of_tokens["normed"][:, self.num_special :]
        theirs = teacher_tokens[:, -own.shape[1] :]
        if theirs.shape != own.shape:
            raise ValueError(
                f"the teacher has patch tokens of shape {theirs.shape[1:]} and the model of {own.shape[1:]}: give a "
                f"teacher of the same architecture, or set {DynamicViTLoss.key('teacher_tokens_weight')} to 0"
            )
        kept = jax.lax.stop_gradient(state.of_tokens["keep"][:, self.num_special :])
        kept = kept if image_weight is None else kept * image_weight[:, None]
        return (kept * jnp.square(own - theirs).mean(-1)).sum() / jnp.maximum(kept.sum(), 1)


def gumbel_noise(draw: Keys, stage: Int[Array, ""] | int, patches: int) -> Float[Array, "b p 2"]:
    """Noise of the Gumbel distribution for the two choices of each patch, from the keys of the images."""
    of_stage = jax.vmap(jax.random.fold_in, (0, None))(draw, stage)
    return jax.vmap(lambda key: jax.random.gumbel(key, (patches, 2)))(of_stage)


def straight_through(scores: Float[Array, "b p 2"]) -> Float[Array, "b p"]:
    """1 where the first score is the higher one, else 0; the gradient is that of the softmax's first value."""
    soft = jax.nn.softmax(scores)[..., 0]
    hard = (scores[..., 0] >= scores[..., 1]).astype(soft.dtype)
    return hard + (soft - jax.lax.stop_gradient(soft))


def _divergence(teacher_logits: Float[Array, "b k"], logits: Float[Array, "b k"]) -> Float[Array, " b"]:
    """KL(teacher || student) of each image, in nats."""
    log_teacher = jax.nn.log_softmax(teacher_logits)
    return (jnp.exp(log_teacher) * (log_teacher - jax.nn.log_softmax(logits))).sum(-1)
