"""PonderNet (arXiv 2107.05407): a learned probability of leaving after each layer, for a whole image."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from avit_jax.halting.image_mean import image_mean
from avit_jax.halting.rule import Classify, Halting, State, Teacher, Trace, first_state, keep_last
from avit_jax.model.rule import Keys
from avit_jax.model.seen import Seen
from avit_jax.runtime.files import shown_value
from avit_jax.runtime.numbers import is_real
from avit_jax.runtime.settings import Settings, setting


@dataclasses.dataclass(frozen=True)
class PonderNetLoss(Settings):
    """The part of config.loss that PonderNet adds. Raises ValueError for a value out of range."""

    section = "loss"

    geometric_weight: float = setting(
        0.01, "Weight of the divergence of PonderNet's exit probabilities from a geometric distribution.", least=0
    )


@dataclasses.dataclass(frozen=True)
class PonderNet(Halting):
    """An image leaves after layer l with probability lambda_l if it is still there, and after the last for certain.

        lambda_l = sigmoid(u . x_l(class token) + b), lambda_L = 1        p_l = lambda_l prod_{j<l} (1 - lambda_j)
        loss = mean over images of sum_l p_l * classification(logits of layer l) + geometric_weight * KL(p || p_G)
        p_G(l) = lambda_p (1 - lambda_p)^(l-1) for l < L, and the rest at L

    One u and b serve all layers. They start as u = 0 and b = logit(lambda_p), so p starts as p_G. With lambda_p = 0.1
    the mean of p_G is 7.2 layers of 12. Every layer's logits come from the model's norm and heads. Training computes
    every layer of every image. At inference the logits are those of the layer where the image leaves: the first with
    p_1 + .. + p_l >= threshold. With `sampled`, each image's threshold is drawn evenly from 0..1, so that it leaves
    after layer l with probability p_l.

    Raises ValueError unless 0 < lambda_p < 1 and 0 <= threshold <= 1, and for values of another type.
    """

    lambda_p: float = 0.1
    threshold: float = 0.5
    sampled: bool = False

    name: ClassVar[str] = "pondernet"
    label: ClassVar[str] = "PonderNet"
    masks_in_training: ClassVar[bool] = False
    sweeps: ClassVar[tuple[str, ...]] = ("threshold",)
    reads: ClassVar[frozenset[str]] = frozenset({"logits"})
    draws: ClassVar[bool] = True  # the compiler leaves the keys out unless `sampled` uses them
    loss_settings: ClassVar[type[Settings] | None] = PonderNetLoss
    advice: ClassVar[str] = "a lower threshold lets images leave earlier"

    def __post_init__(self) -> None:
        if not is_real(self.lambda_p) or not 0 < self.lambda_p < 1:
            raise ValueError(f"lambda_p is {shown_value(self.lambda_p)}: it must be a number above 0 and below 1")
        if not is_real(self.threshold, 0, 1):
            raise ValueError(f"threshold is {shown_value(self.threshold)}: it must be a number from 0 to 1")
        if not isinstance(self.sampled, bool):
            raise ValueError(f"sampled is {shown_value(self.sampled)}: give True or False")
        object.__setattr__(self, "lambda_p", float(self.lambda_p))  # JSON has no NumPy numbers
        object.__setattr__(self, "threshold", float(self.threshold))

    def describe(self) -> str:
        """The settings, such as "PonderNet, prior 0.1, exit at 0.5"."""
        return f"PonderNet, prior {self.lambda_p:g}, {'sampled' if self.sampled else f'exit at {self.threshold:g}'}"

    def check(self, config: Any) -> None:
        """Raises ValueError for a model without a class token, which the exit probabilities read, or without a head."""
        if not config.class_token:
            raise ValueError("PonderNet reads the class token and the model has none: use ACT or ConfidenceExit")
        if not config.num_classes:
            raise ValueError("PonderNet needs class logits and num_classes is 0: load a model with a head")

    def module(self, model: Any) -> "LeavingUnit":
        """The unit that gives lambda, with embed_dim + 1 parameters."""
        return LeavingUnit(model.config.embed_dim, math.log(self.lambda_p) - math.log1p(-self.lambda_p))

    def levels(self, model: Any, images: Float[Array | np.ndarray, "b h w c"]) -> Callable[[float], "PonderNet"]:
        """The level is the threshold. Raises ValueError for sampled exits, whose work only training changes."""
        if self.sampled:
            raise ValueError("sampled exits have no threshold to choose: give PonderNet(sampled=False)")
        return lambda level: dataclasses.replace(self, threshold=float(level))

    def initial(self, batch: int, config: Any, draw: Keys | None = None) -> State:
        """All images there for certain, and the probability of still being there at which each one leaves."""
        leaves_at = jnp.full(batch, 1 - self.threshold)
        if self.sampled:
            assert draw is not None
            leaves_at = 1 - jax.vmap(jax.random.uniform)(draw)
        state = first_state(batch, config.num_tokens, config.num_outputs, config.embed_dim)
        return dataclasses.replace(state, of_images={"log_there": jnp.zeros(batch), "leaves_at": leaves_at})

    def advance(
        self,
        state: State,
        seen: Seen,
        *,
        layer: Int[Array, ""] | int,
        is_last: Bool[Array, ""] | bool,
        module: Any = None,
    ) -> tuple[State, Trace]:
        """The state after a layer; logit(lambda) [b] as "lambda_logit", and its logits [b heads k] as "logits"."""
        assert seen.outputs is not None
        assert seen.logits is not None
        lambda_logit = module(seen.outputs[:, 0])
        log_there = state.of_images["log_there"] + jax.nn.log_sigmoid(-lambda_logit)
        leaves = (jnp.exp(log_there) <= state.of_images["leaves_at"]) | is_last
        new_state = keep_last(state, seen, state.active & ~leaves[:, None], state.of_images | {"log_there": log_there})
        return new_state, Trace(of_images={"lambda_logit": lambda_logit, "logits": seen.logits.swapaxes(0, 1)})

    def losses(
        self,
        trace: Trace,
        state: State,
        head_logits: Float[Array, "heads b k"],
        *,
        classify: Classify,
        settings: PonderNetLoss,
        image_weight: Float[Array, " b"] | None = None,
        teacher: Teacher | None = None,
    ) -> dict[str, Float[Array, ""]]:
        """sum_l p_l * classification of layer l, and geometric_weight * KL(p || p_G), both means over images."""
        log_p = log_exit_probabilities(trace.of_images["lambda_logit"])
        p, logits = jnp.exp(log_p), trace.of_images["logits"].swapaxes(1, 2)
        classification = jax.vmap(lambda logits, share: classify(logits, share=share))(logits, p).sum()
        divergence = (p * (log_p - log_geometric(self.lambda_p, len(p))[:, None])).sum(0)
        geometric = settings.geometric_weight * image_mean(divergence, image_weight)
        return {"classification": classification, "geometric": geometric}

    def extra_macs(self, config: Any, token_depth: Int[Array, "b n"]) -> Float[Array, " b"]:
        """D for lambda in each layer but the last; only the exit's heads are computed, which the model counts."""
        return jnp.minimum(token_depth[:, 0], config.depth - 1).astype(jnp.float32) * config.embed_dim


class LeavingUnit(nnx.Module):
    """u and b of lambda = sigmoid(u . x + b), with u = 0."""

    def __init__(self, embed_dim: int, bias: float) -> None:
        self.kernel = nnx.Param(jnp.zeros(embed_dim))
        self.bias = nnx.Param(jnp.asarray(bias))

    def __call__(self, tokens: Float[Array, "b d"]) -> Float[Array, " b"]:
        """logit(lambda) of each token; a sum, because an accelerator rounds the inputs of a matrix product."""
        return (tokens * self.kernel[...]).sum(-1) + self.bias[...]


def log_exit_probabilities(lambda_logit: Float[Array, "l b"]) -> Float[Array, "l b"]:
    """log p_l from logit(lambda_l), by sums of logarithms; lambda of the last layer is 1, whatever its logit."""
    log_leaves = jax.nn.log_sigmoid(lambda_logit).at[-1].set(0)
    log_stays = jnp.cumsum(jax.nn.log_sigmoid(-lambda_logit[:-1]), axis=0)
    return log_leaves + jnp.concatenate([jnp.zeros_like(lambda_logit[:1]), log_stays])


def log_geometric(lambda_p: float, num_layers: int) -> Float[Array, " l"]:
    """log p_G: a geometric distribution over layers 1..L whose tail is at layer L, so that it sums to 1."""
    stays = np.arange(num_layers) * math.log1p(-lambda_p)
    return jnp.asarray(stays + np.where(np.arange(num_layers) < num_layers - 1, math.log(lambda_p), 0), jnp.float32)
