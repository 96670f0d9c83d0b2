"""Rules that keep the patches with the highest class attention: top-k, and EViT (arXiv 2202.07800)."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from avit_jax.model.rule import Keys, check_class_attention, check_layers, plain_layers
from avit_jax.model.seen import Seen
from avit_jax.reduction.groups import Groups, Reduction, group_sums
from avit_jax.runtime.files import shown_value
from avit_jax.runtime.numbers import is_real


@dataclasses.dataclass(frozen=True)
class TopK(Reduction):
    """Keep the ceil(keep_rate * n) patches with the highest class attention of the n that are there, in some layers.

    The other patches are dropped between attention and MLP. The class attention of a patch is the weight that the class
    token's query gives its key, as a mean over the heads; in a distilled model also over the distillation token's.
    Ties go to the patch that comes first. keep_rate may also be a tuple with one number for each of `layers`, which
    count from 0. No parameters, and no gradient through the choice. It is EViT without its fused token.

    Raises ValueError unless every keep_rate is above 0 and at most 1, and layers are whole numbers in ascending order.
    """

    keep_rate: float | tuple[float, ...]
    layers: tuple[int, ...] = (3, 6, 9)

    name: ClassVar[str] = "topk"
    label: ClassVar[str] = "top-k"
    sweeps: ClassVar[tuple[str, ...]] = ("keep_rate",)
    neutral: ClassVar[Mapping[str, Any] | None] = {"keep_rate": 1.0, "layers": (0,)}  # every model has a layer 0
    reads: ClassVar[frozenset[str]] = frozenset({"class_attention", "size"})
    fuses: ClassVar[bool] = False  # whether the dropped tokens become one more token

    def __post_init__(self) -> None:
        kind = type(self).__name__
        layers = plain_layers(kind, self.layers)
        single = not isinstance(self.keep_rate, tuple | list)
        rates: Any = (self.keep_rate,) if single else self.keep_rate
        if not all(is_real(rate, 0, 1) and rate > 0 for rate in rates):
            raise ValueError(
                f"{kind}'s keep_rate is {shown_value(self.keep_rate)}: give a number above 0 and at most 1, or one for "
                "each layer"
            )
        if not single and len(rates) != len(layers):
            raise ValueError(
                f"{kind}'s keep_rate has {len(rates)} numbers and layers has {len(layers)}: give one for each layer, "
                "or a single number"
            )
        # JSON has lists, which cannot be hashed, and no NumPy numbers.
        object.__setattr__(self, "keep_rate", float(rates[0]) if single else tuple(map(float, rates)))
        object.__setattr__(self, "layers", layers)

    def describe(self) -> str:
        """The settings, such as "top-k, keep_rate 0.7 in layers 3, 6, 9"."""
        said = ", ".join(f"{rate:g}" for rate in np.atleast_1d(self.keep_rate))
        return f"{self.label}, keep_rate {said} in layers {', '.join(map(str, self.layers))}"

    def counts(self, config: Any) -> tuple[int, ...]:
        """Tokens after each layer, special ones included.

        Raises ValueError for a model without one of the layers, and for one without the class token that is read.
        """
        kind = type(self).__name__
        check_layers(kind, self.layers, config.depth)
        if "class_attention" in self.reads:
            check_class_attention(kind, config)
        steps = self._steps(config.num_tokens - config.num_special)
        counts, tokens = [], config.num_tokens
        for layer in range(config.depth):
            if layer in steps:
                tokens = config.num_special + self._with_fused(*steps[layer])
            counts.append(tokens)
        return tuple(counts)

    def acts_in(self, config: Any) -> tuple[int, ...]:
        """The layers that drop tokens, from 0. If only one is dropped, and fused, the count stays as it is."""
        steps = self._steps(config.num_tokens - config.num_special)
        return tuple(layer for layer, (kept, there) in steps.items() if kept < there)

    def levels(self, model: Any, images: Float[Array | np.ndarray, "b h w c"]) -> Callable[[float], "TopK"]:
        """Level is the keep_rate, with patches counted so that two layers seldom lose one at the same level.

        The i-th of `layers` keeps ceil(level^i * P) of the model's P patches, at least one.
        """
        patches = model.config.num_tokens - model.config.num_special

        def at(level: float) -> TopK:
            rates, there = [], patches
            for power in range(1, len(self.layers) + 1):
                kept = _kept(level**power, patches)
                rates.append(kept / there)
                there = self._with_fused(kept, there)
            return dataclasses.replace(self, keep_rate=tuple(rates))

        return at

    def groups(
        self, seen: Seen, *, layer: int, num_special: int, draw: Keys | None = None, module: Any = None
    ) -> Groups | None:
        """The tokens that stay after a layer (from 0), in their order, and the fused one; None if all stay."""
        if missing := sorted(name for name in self.reads if getattr(seen, name) is None):
            raise ValueError(f"{type(self).__name__} needs {missing[0]} of a layer: compute what its `reads` names")
        assert seen.size is not None
        there = seen.size.shape[1] - num_special
        kept = _kept(self._rates()[layer], there)
        if kept == there:
            return None
        scores = self._scores(seen, draw)[:, num_special:]
        return _groups(scores, kept, seen.size, seen.class_attention if self.fuses else None)

    def _scores(self, seen: Seen, draw: Keys | None) -> Float[Array, "b n"]:
        """A score for each token; of the patches, those with the highest ones stay."""
        assert seen.class_attention is not None
        return seen.class_attention

    def _rates(self) -> dict[int, float]:
        """The keep_rate of each of `layers`."""
        rates = self.keep_rate if isinstance(self.keep_rate, tuple) else (self.keep_rate,) * len(self.layers)
        return dict(zip(self.layers, rates, strict=True))

    def _steps(self, patches: int) -> dict[int, tuple[int, int]]:
        """For each of `layers`, how many tokens are kept of how many that are there, without the special ones."""
        steps, there = {}, patches
        for layer, rate in self._rates().items():
            steps[layer] = _kept(rate, there), there
            there = self._with_fused(*steps[layer])
        return steps

    def _with_fused(self, kept: int, there: int) -> int:
        return kept + (self.fuses and kept < there)


@dataclasses.dataclass(frozen=True)
class EViT(TopK):
    """TopK, and the dropped tokens become one more: f = sum_i s_i y_i, s_i the class attention of dropped token i.

    f comes last (arXiv 2202.07800). As in the published code the weights s_i do not add up to 1, gradients go through
    them, and in later layers f is one of the n tokens of which ceil(keep_rate * n) stay. For a head that reads the mean
    of the patches, f stands for all those that it is made of.

    Raises ValueError as TopK does.
    """

    name: ClassVar[str] = "evit"
    label: ClassVar[str] = "EViT"
    fuses: ClassVar[bool] = True


def _kept(rate: float, there: int) -> int:
    """ceil(rate * there), at least 1; without rounding errors such as 0.07 * 100 = 7.000000000000001."""
    return max(1, math.ceil(rate * there - 1e-9))


def _groups(
    scores: Float[Array, "b p"], kept: int, size: Float[Array, "b n"], fused: Float[Array, "b n"] | None
) -> Groups:
    """The groups in which the patches with the highest scores stay.

    size: of all tokens, special ones first. fused: the weights with which dropped tokens become the last token; None:
    they become nothing.
    """
    (batch, patches), tokens = scores.shape, size.shape[1]
    num_special = tokens - patches
    _, chosen = jax.lax.top_k(jax.lax.stop_gradient(scores), kept)
    places = jnp.arange(patches)
    stays = (chosen[:, :, None] == places).any(1)
    # Those that stay, then those that are dropped, each in its order: one sort is faster on a CPU than a comparison of
    # every place with every slot.
    order = num_special + jnp.sort(jnp.where(stays, places, places + patches), axis=1) % patches
    special = jnp.broadcast_to(jnp.arange(num_special), (batch, num_special))
    stays = jnp.pad(stays, ((0, 0), (num_special, 0)), constant_values=True)
    into = jnp.where(stays, jnp.cumsum(stays, axis=1) - 1, num_special + kept)
    if fused is None:
        leader, joins = jnp.concatenate([special, order[:, :kept]], axis=1), order[:, :0]
        weight, slot_size = jnp.ones_like(size), jnp.take_along_axis(size, leader, axis=1)
    else:  # the first of the dropped tokens leads their slot
        leader, joins = jnp.concatenate([special, order[:, : kept + 1]], axis=1), order[:, kept + 1 :]
        weight, slot_size = jnp.where(stays, 1, fused), group_sums(size, into, leader, joins)
    return Groups(into, weight, leader, joins, slot_size, mean=False)
