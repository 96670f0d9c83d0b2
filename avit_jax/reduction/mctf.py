"""MCTF (arXiv 2403.10030): the least needed and most similar tokens are merged, before a layer computes its values."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from avit_jax.model.rule import Keys, check_layers, plain_layers
from avit_jax.model.seen import Seen
from avit_jax.reduction.groups import Groups, Place, Reduction, SecondPass, group_sums
from avit_jax.reduction.two_passes import MCTFLoss, lighter_merges, pair_losses
from avit_jax.runtime.files import shown_value
from avit_jax.runtime.numbers import is_real, is_whole
from avit_jax.runtime.settings import Settings

FEWEST = 10  # tokens that a layer leaves, as in the published code
_LEAST_ATTENTION = 1e-20  # attention received; less would make the weights of a merged token underflow


@dataclasses.dataclass(frozen=True)
class MCTF(Reduction):
    """Merge r tokens at the start of some layers, guided by similarity, attention and size. No parameters.

    A is the layer's attention, with each key weighted by its size s (the patches that it stands for). A_n, the
    attention that token n receives, is the mean over heads and queries. With x_i and x_j as they enter the layer, i at
    an even position and j at an odd one,

        W_ij = (cos(x_i, x_j) + 1) / 2 * (a_i a_j)^(1/20) * (b_i b_j)^(1/40)      a_n = 1 / A_n   b_n = 1 / s_n

    First the r // 2 even tokens with the highest maximum of their row of W join the odd token that attains it. Then the
    r - r // 2 odd tokens with the highest maximum over the even tokens that stayed join those in the same way. With
    w_n = s_n A_n, group g becomes

        x'_g = sum_i w_i x_i / sum_i w_i   s'_g = sum_i s_i   A'_gh = sum_i w_i sum_j A_ij / sum_i w_i   i in g, j in h

    and the layer goes on with x' + W_o (A' v), v computed from x'. The shorter sequence has the special tokens, then
    the even tokens that stay in their order, then the odd ones by falling maximum of W. Special tokens take no part.

    r: tokens that merge in each of the layers, or their share of the patches (a float below 1), or a tuple with one
    number for each of the layers. layers: where tokens merge, counted from 0; None: all but the first. At most half of
    the patches merge in one layer, and no layer leaves fewer than 10 tokens: a larger r is reduced to that, and nothing
    merges if 10 tokens or fewer enter. No gradient goes through W, w or s. Training has a second pass (two_passes).

    Raises ValueError for an r or layers of another kind.
    """

    r: int | float | tuple[int, ...]
    layers: tuple[int, ...] | None = None

    name: ClassVar[str] = "mctf"
    label: ClassVar[str] = "MCTF"
    sweeps: ClassVar[tuple[str, ...]] = ("r",)
    reads: ClassVar[frozenset[str]] = frozenset({"before", "attention_received", "size"})
    proportional: ClassVar[bool] = True
    place: ClassVar[Place] = "before the values"
    neutral: ClassVar[Mapping[str, Any] | None] = {"r": 0}
    loss_settings: ClassVar[type[Settings] | None] = MCTFLoss

    def __post_init__(self) -> None:
        object.__setattr__(self, "r", self._plain_r())
        if self.layers is not None:
            object.__setattr__(self, "layers", plain_layers("MCTF", self.layers))

    def _plain_r(self) -> int | float | tuple[int, ...]:
        """r in Python's own numbers, as JSON needs them."""
        r: Any = self.r
        if is_whole(r, 0):
            return int(r)
        if is_real(r, 0, 1) and r < 1:
            return float(r)
        if isinstance(r, list | tuple) and all(is_whole(number, 0) for number in r):
            return tuple(map(int, r))
        raise ValueError(
            f"MCTF's r is {shown_value(r)}: give a whole number from 0, a share of the patches from 0.0 to below 1.0, "
            "or a tuple of whole numbers with one for each layer that merges"
        )

    def describe(self) -> str:
        """The settings, such as "MCTF, r 0.35 in layers 3, 6, 9"."""
        r = f"({', '.join(map(str, self.r))})" if isinstance(self.r, tuple) else str(self.r)
        return f"MCTF, r {r}" + ("" if self.layers is None else f" in layers {', '.join(map(str, self.layers))}")

    def counts(self, config: Any) -> tuple[int, ...]:
        """Tokens after each layer, special ones included. Raises ValueError if r or layers do not fit the depth."""
        layers = self._layers(config.depth)
        check_layers("MCTF", layers, config.depth)
        if isinstance(self.r, tuple) and len(self.r) != len(layers):
            raise ValueError(
                f"MCTF's r has {len(self.r)} numbers and tokens merge in {len(layers)} layers: give one for each, or a "
                "single number"
            )
        merges = dict(zip(layers, self.r, strict=True)) if isinstance(self.r, tuple) else dict.fromkeys(layers, self.r)
        counts = [config.num_tokens]
        for layer in range(config.depth):
            counts.append(counts[-1] - _merges(merges.get(layer, 0), counts[-1], config.num_special))
        return tuple(counts[1:])

    def levels(self, model: Any, images: Float[Array | np.ndarray, "b h w c"]) -> Callable[[float], "MCTF"]:
        """Level 0 merges as much as it can in each of the layers; in between, layers merge one token more or less."""
        config = model.config
        layers = len(self._layers(config.depth))
        most = (config.num_tokens - config.num_special) / 2

        def at(level: float) -> MCTF:
            ends = np.floor((1 - level) * most * np.arange(layers + 1)).astype(int)
            return dataclasses.replace(self, r=tuple(np.diff(ends).tolist()))

        return at

    def groups(
        self, seen: Seen, *, layer: int, num_special: int, draw: Keys | None = None, module: Any = None
    ) -> Groups | None:
        """The groups of tokens that merge in a layer (from 0); None if none do."""
        tokens, received, size, r = seen.before, seen.attention_received, seen.size, self.r
        if tokens is None or received is None or size is None:
            raise ValueError("MCTF needs before, attention_received and size of a layer: compute what `reads` names")
        if isinstance(r, tuple):
            r = r[layer - 1 if self.layers is None else self.layers.index(layer)]
        merges = _merges(r, size.shape[1], num_special)
        return two_step_groups(tokens, received, size, merges, num_special) if merges else None

    def second_pass(self, config: Any, settings: MCTFLoss) -> SecondPass | None:
        """Merges up to 7/16 as many tokens; None if both weights are 0 or nothing merges (see two_passes)."""
        counts = (config.num_tokens, *self.counts(config))
        merges = [counts[layer] - counts[layer + 1] for layer in self._layers(config.depth)]
        rules = tuple(dataclasses.replace(self, r=r) for r in lighter_merges(merges, settings))
        return SecondPass(rules, functools.partial(pair_losses, settings=settings)) if rules else None

    def matching_macs(self, config: Any) -> tuple[int, ...]:
        """Multiply-adds of x_i . x_j in each layer where tokens merge, for one image."""
        counts = self.counts(config)
        before = (config.num_tokens, *counts[:-1])
        return tuple(
            -(-n // 2) * (n // 2) * config.embed_dim if after < n else 0
            for n, after in zip(before, counts, strict=True)
        )

    def _layers(self, depth: int) -> tuple[int, ...]:
        return tuple(range(1, depth)) if self.layers is None else self.layers


def _merges(r: int | float, tokens: int, num_special: int) -> int:
    """How many tokens a layer merges; r: their number, or as a float their share of the patches."""
    patches = tokens - num_special
    number = int(r * patches) if isinstance(r, float) else r
    return max(min(number, patches // 2, tokens - FEWEST), 0)


def two_step_groups(
    tokens: Float[Array, "b n d"],
    received: Float[Array, "b n"],
    size: Float[Array, "b n"],
    merges: int,
    num_special: int,
) -> Groups:
    """MCTF's groups. No gradient goes through the choice, the weights or the sizes.

    received: mean attention of each token over heads and queries. size: patches that each token stands for. merges:
    from 1 to half of the patches. num_special: the first tokens, which take no part.
    """
    tokens, received, size = jax.lax.stop_gradient((tokens, received, size))
    received = jnp.maximum(received, _LEAST_ATTENTION)
    unit = tokens / jnp.maximum(jnp.linalg.norm(tokens, axis=-1, keepdims=True), jnp.finfo(jnp.float32).tiny)
    ease = received ** (-1 / 20) * size ** (-1 / 40)
    first_a, first_b = num_special + num_special % 2, num_special + 1 - num_special % 2  # first patches
    # Full precision, so that rounding on an accelerator does not decide which of two nearly equal pairs merges.
    cosine = jnp.matmul(unit[:, first_a::2], unit[:, first_b::2].swapaxes(1, 2), precision=jax.lax.Precision.HIGHEST)
    value = (cosine + 1) / 2 * ease[:, first_a::2, None] * ease[:, None, first_b::2]

    merges_a = merges // 2
    merges_b = merges - merges_a
    best_a = value.max(-1)
    _, joins_a = jax.lax.top_k(best_a, merges_a)  # places among the even patches
    goes_a = (joins_a[:, :, None] == jnp.arange(best_a.shape[1])).any(1)
    left = jnp.where(goes_a[..., None], -jnp.inf, value)
    _, order_b = jax.lax.top_k(left.max(1), left.shape[2])  # places among the odd patches, those that join first
    rank_b = jnp.argsort(order_b, axis=1)

    # The slots of tokens that stay; then the others have the slots of those that they join. An even token may have
    # joined an odd one that joins another even one, so the odd ones come first.
    stays_a = best_a.shape[1] - merges_a
    slot_a = num_special - 1 + jnp.cumsum(~goes_a, axis=1)
    joined_b = jnp.take_along_axis(slot_a, left.argmax(1), axis=1)
    slot_b = jnp.where(rank_b < merges_b, joined_b, num_special + stays_a + rank_b - merges_b)
    slot_a = jnp.where(goes_a, jnp.take_along_axis(slot_b, value.argmax(-1), axis=1), slot_a)

    special = jnp.broadcast_to(jnp.arange(num_special)[None], (len(size), num_special))
    positions = [*range(num_special), *range(first_a, size.shape[1], 2), *range(first_b, size.shape[1], 2)]
    into = jnp.concatenate([special, slot_a, slot_b], axis=1)[:, np.argsort(positions)]
    # Places with those that go moved to the end: a stable argsort of goes_a, but faster on a CPU.
    places = jnp.arange(best_a.shape[1])[None]
    leads_a = jnp.sort(jnp.where(goes_a, places + best_a.shape[1], places), axis=1)[:, :stays_a]
    leader = jnp.concatenate([special, first_a + 2 * leads_a, first_b + 2 * order_b[:, merges_b:]], axis=1)
    joins = jnp.concatenate([first_a + 2 * joins_a, first_b + 2 * order_b[:, :merges_b]], axis=1)
    return Groups(into, size * received, leader, joins, group_sums(size, into, leader, joins), mean=True)
