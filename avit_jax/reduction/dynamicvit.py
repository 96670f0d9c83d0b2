"""DynamicViT (arXiv 2106.02034): before a few layers, learnt predictors choose the patches that stay."""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from avit_jax.halting.keep_predictors import KeepPredictors, predictor_macs
from avit_jax.halting.keep_sampling import DynamicViTLoss, KeepSampling
from avit_jax.halting.rule import Halting
from avit_jax.model.rule import Keys, check_layers, plain_layers
from avit_jax.model.seen import Seen
from avit_jax.reduction.groups import Groups, Place, Reduction
from avit_jax.runtime.files import shown_value
from avit_jax.runtime.numbers import is_real
from avit_jax.runtime.settings import Settings


@dataclasses.dataclass(frozen=True)
class DynamicViT(Reduction):
    """Before layer layers[stage - 1], the patches with the highest predicted score stay: int(P * keep_rate^stage).

    P is the number of patches of an image and stages count from 1; at least one patch stays. Layers count from 0. The
    score is the log-probability of keeping a patch, by the stage's predictor (halting.keep_predictors), from the tokens
    that enter the layer. Special tokens always stay. Training drops nothing: it masks patches that are drawn by chance
    (halting.keep_sampling). The predictors are trained for one keep_rate, but work with any.

    Raises ValueError for a keep_rate that is not above 0 and at most 1, and unless layers are whole numbers
    from 1 in ascending order.
    """

    keep_rate: float
    layers: tuple[int, ...] = (3, 6, 9)

    name: ClassVar[str] = "dynamicvit"
    label: ClassVar[str] = "DynamicViT"
    sweeps: ClassVar[tuple[str, ...]] = ("keep_rate",)
    reads: ClassVar[frozenset[str]] = frozenset({"before"})
    place: ClassVar[Place] = "before the layer"
    loss_settings: ClassVar[type[Settings] | None] = DynamicViTLoss

    def __post_init__(self) -> None:
        if not is_real(self.keep_rate, 0, 1) or self.keep_rate == 0:
            raise ValueError(
                f"DynamicViT's keep_rate is {shown_value(self.keep_rate)}: give a number above 0 and at most 1"
            )
        object.__setattr__(self, "keep_rate", float(self.keep_rate))  # JSON has no NumPy numbers
        # Before layer 0 the patches have seen nothing of each other.
        object.__setattr__(self, "layers", plain_layers("DynamicViT", self.layers, least=1))

    def describe(self) -> str:
        """The settings, such as "DynamicViT, keep rate 0.7 before layers 3, 6, 9"."""
        return f"DynamicViT, keep rate {self.keep_rate:g} before layers {', '.join(map(str, self.layers))}"

    def counts(self, config: Any) -> tuple[int, ...]:
        """Tokens after each layer, special ones included. Raises ValueError if the rule does not fit the model."""
        check_layers("DynamicViT", self.layers, config.depth, least=1)
        if config.pool != "token":
            raise ValueError(f"DynamicViT keeps no mean over patches and pool is {config.pool!r}: use pool 'token'")
        if config.embed_dim % 4:
            raise ValueError(f"embed_dim is {config.embed_dim}: DynamicViT's predictors need a multiple of 4")
        patches = self._patches(config.num_tokens - config.num_special)
        stages = np.searchsorted(self.layers, np.arange(config.depth), side="right")
        return tuple(config.num_special + patches[stage] for stage in stages)

    def _patches(self, patches: int) -> list[int]:
        """Of an image's number of patches, those that are there before the first stage and after each one."""
        return [patches, *(max(1, int(patches * self.keep_rate**stage)) for stage in range(1, len(self.layers) + 1))]

    def levels(self, model: Any, images: Float[Array | np.ndarray, "b h w c"]) -> Callable[[float], "DynamicViT"]:
        """Level 0 keeps one patch. Just below level 1 the predictors may cost more than dropping patches saves."""
        least = 1 / (model.config.num_tokens - model.config.num_special)
        return lambda level: dataclasses.replace(self, keep_rate=least + level * (1 - least))

    def module(self, model: Any) -> KeepPredictors:
        """A predictor for each stage, with small random weights."""
        config = model.config
        return KeepPredictors(config.embed_dim, len(self.layers), config.num_tokens - config.num_special, config.dtype)

    def groups(
        self, seen: Seen, *, layer: int, num_special: int, draw: Keys | None = None, module: Any = None
    ) -> Groups | None:
        """The groups that drop all patches but those with the highest scores. No gradient goes through the choice."""
        assert seen.before is not None
        patches = seen.before[:, num_special:]
        stage = self.layers.index(layer)
        keep, drop = jnp.moveaxis(module(patches, jnp.ones(patches.shape[:2]), stage), -1, 0)
        # In the order of `keep`, but it goes on to tell patches apart whose `keep` rounds to 0.
        score = jax.lax.stop_gradient(keep - drop)
        return keep_highest(score, self._patches(module.patches)[stage + 1], num_special)

    def in_training(self, config: Any) -> Halting:
        """Masked training with patches that are kept by chance."""
        return KeepSampling(self.keep_rate, self.layers, config.num_special)

    def extra_macs(self, config: Any) -> int:
        """Multiply-adds of the predictors, each for the patches that are there before its stage."""
        patches = self._patches(config.num_tokens - config.num_special)
        before = dict(zip(self.layers, patches, strict=False))
        return sum(predictor_macs(config.embed_dim, before[layer]) for layer in self.acts_in(config))


def keep_highest(score: Float[Array, "b p"], count: int, num_special: int) -> Groups:
    """The groups that keep special tokens and the `count` patches with the highest scores, in their order."""
    batch, patches = score.shape
    places = jnp.arange(patches)[None]
    _, chosen = jax.lax.top_k(score, count)
    stays = (chosen[:, :, None] == places[:, None]).any(1)
    special = jnp.broadcast_to(jnp.arange(num_special)[None], (batch, num_special))
    slot = jnp.where(stays, num_special - 1 + jnp.cumsum(stays, axis=1), num_special + count)
    leader = jnp.concatenate([special, num_special + jnp.sort(chosen, axis=1)], axis=1)
    return Groups(
        into=jnp.concatenate([special, slot], axis=1),
        weight=jnp.ones((batch, num_special + patches)),
        leader=leader,
        joins=jnp.zeros((batch, 0), leader.dtype),
        size=jnp.ones(leader.shape),
        mean=False,
    )
