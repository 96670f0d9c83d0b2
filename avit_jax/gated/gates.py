"""The gates of Meng et al. (arXiv 2111.15668): patches, heads and sublayers chosen in each layer for each image."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from avit_jax.gated.gate_heads import GateHeads
from avit_jax.gated.losses import GateLoss, usage_losses
from avit_jax.halting.rule import Classify, State, Teacher, Trace
from avit_jax.model.rule import Rule
from avit_jax.runtime.files import shown_value
from avit_jax.runtime.numbers import is_real
from avit_jax.runtime.settings import Settings

_FAR = 60.0  # a logit beyond which a gate is always off or always on


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Choice:
    """What a layer computes: 1 or 0, with the gradient of a straight-through estimator; special tokens are always 1."""

    tokens: Float[Array, "*l b n"]
    heads: Float[Array, "*l b h"]
    sublayers: Float[Array, "*l b 2"]  # attention, MLP


@dataclasses.dataclass(frozen=True)
class Gates(Rule):
    """Meng et al.'s gates. In every layer, linear maps choose patches, heads, and whether attention and MLP run.

    Token logits are read from the patches after the layer's first LayerNorm, head and sublayer logits from the class
    token that enters; the first layer has all heads and both sublayers. A gate is on if sigmoid(logit) is above its
    threshold. In training it is on if sigmoid((logit + g) / temperature) is, with logistic noise g, and the gradient is
    that of the sigmoid (straight-through Gumbel estimator).

    temperature, token_threshold and threshold (of heads and sublayers) are those of the public code. Because of its
    token_threshold of 0.6, a patch with a logit between 0.41 and 2.03 is on at inference and mostly off in training;
    with 0.5 both agree. token_bias, bias: of the linear maps at the start of training, with which nearly all gates are
    on; the public code starts from 0. train_positions: whether position embeddings are trained; the public code keeps
    those that it starts from.

    Raises ValueError for a temperature that is not above 0, a threshold outside 0..1, and values of another type.
    """

    temperature: float = 5.0
    token_threshold: float = 0.6
    threshold: float = 0.5
    token_bias: float = 6.0
    bias: float = 4.0
    train_positions: bool = False

    name: ClassVar[str] = "gates"
    label: ClassVar[str] = "gated ViT"
    sweeps: ClassVar[tuple[str, ...]] = ("token_threshold", "threshold")
    loss_settings: ClassVar[type[Settings] | None] = GateLoss

    def __post_init__(self) -> None:
        for name in ("temperature", "token_threshold", "threshold", "token_bias", "bias"):
            value = getattr(self, name)
            least, most = (0, 1) if "threshold" in name else (-1e9, 1e9)
            if not is_real(value, least, most) or (name == "temperature" and value <= 0):
                wanted = "from 0 to 1" if "threshold" in name else "above 0" if name == "temperature" else "up to 10^9"
                raise ValueError(f"Gates' {name} is {shown_value(value)}: give a number {wanted}")
            object.__setattr__(self, name, float(value))  # JSON has no NumPy numbers
        if not isinstance(self.train_positions, bool):
            raise ValueError(f"Gates' train_positions is {shown_value(self.train_positions)}: give True or False")

    def describe(self) -> str:
        """The settings, such as "gates of patches above 0.6, of heads and sublayers above 0.5"."""
        return f"gates of patches above {self.token_threshold:g}, of heads and sublayers above {self.threshold:g}"

    def check(self, config: Any) -> None:
        """Raises ValueError for a model without class token, and for one with dropout or stochastic depth."""
        if not config.class_token:
            raise ValueError(
                "Gates reads the class token and the model has none: choose another rule, such as Similarity"
            )
        for name in ("drop_rate", "drop_path_rate"):
            if getattr(config, name):
                raise ValueError(
                    f"{name} is {getattr(config, name)} and the rule is gates, which itself drops parts of layers: "
                    f"give {name}=0"
                )

    def levels(self, model: Any, images: Float[Array | np.ndarray, "b h w c"]) -> Callable[[float], "Gates"]:
        """Both thresholds, shifted by the same logit: level 0.5 is the rule as it is, 0 turns everything off."""

        def at(level: float) -> Gates:
            shift = 4 * (math.log(level) - math.log1p(-level)) if 0 < level < 1 else _FAR if level > 0 else -_FAR

            def moved(threshold: float) -> float:
                middle = min(max(threshold, 1e-9), 1 - 1e-9)
                return 1 / (1 + math.exp(min(max(shift - math.log(middle / (1 - middle)), -700), 700)))

            return dataclasses.replace(
                self, token_threshold=moved(self.token_threshold), threshold=moved(self.threshold)
            )

        return at

    def module(self, model: Any) -> GateHeads:
        """The linear maps of every layer, with small random weights."""
        config = model.config
        return GateHeads(config.depth, config.embed_dim, config.num_heads, self.token_bias, self.bias)

    def maps(self, model: Any) -> GateHeads:
        """The linear maps that the model has."""
        return model.rule_module

    def choose(
        self,
        maps: GateHeads,
        seen: Float[Array, "b n d"],
        tokens: Float[Array, "b n d"],
        *,
        layer: Any,
        num_special: int,
        key: PRNGKeyArray | None = None,
    ) -> Choice:
        """The choice of a layer.

        maps: those of the layer. seen: the tokens after its first LayerNorm. tokens: as they enter. layer: from 0. key:
        draws the noise of training; None: no noise.
        """
        noise = (None, None, None) if key is None else tuple(jax.random.split(key, 3))
        patches = self._gate(maps.tokens(seen[:, num_special:])[..., 0], self.token_threshold, noise[0])
        heads = self._gate(maps.heads(tokens[:, 0]), self.threshold, noise[1])
        sublayers = self._gate(maps.sublayers(tokens[:, 0]), self.threshold, noise[2])
        first = layer == 0
        return Choice(
            jnp.concatenate([jnp.ones((len(seen), num_special)), patches], axis=1),
            jnp.where(first, 1.0, heads),
            jnp.where(first, 1.0, sublayers),
        )

    def _gate(self, logits: Array, threshold: float, key: PRNGKeyArray | None) -> Array:
        if key is None:
            return (jax.nn.sigmoid(logits) > threshold).astype(jnp.float32)
        return straight_through(logits, jax.random.logistic(key, logits.shape), threshold, self.temperature)

    def losses(
        self,
        trace: Trace,
        state: State,
        head_logits: Float[Array, "heads b k"],
        *,
        classify: Classify,
        settings: GateLoss,
        image_weight: Float[Array, " b"] | None = None,
        teacher: Teacher | None = None,
    ) -> dict[str, Float[Array, ""]]:
        """Classification, and how far the use of patches, heads and sublayers is from its targets."""
        usage = usage_losses(
            trace.of_tokens["token_gate"],
            trace.of_images["head_gate"],
            trace.of_images["sublayer_gate"],
            settings,
            image_weight,
        )
        return {"classification": classify(head_logits)} | usage


def straight_through(
    logits: Float[Array, "..."], noise: Float[Array, "..."], threshold: float, temperature: float
) -> Float[Array, "..."]:
    """1 where s = sigmoid((logits + noise) / temperature) is above the threshold, else 0; the gradient is that of s."""
    soft = jax.nn.sigmoid((logits + noise) / temperature)
    return (soft > threshold).astype(soft.dtype) + (soft - jax.lax.stop_gradient(soft))
