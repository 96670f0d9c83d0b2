"""ToMe (arXiv 2210.09461): in every layer the most similar tokens are merged, between attention and MLP."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from avit_jax.model.rule import Keys
from avit_jax.model.seen import Seen
from avit_jax.reduction.groups import Groups, Reduction, group_sums
from avit_jax.runtime.files import shown_value
from avit_jax.runtime.numbers import is_whole


@dataclasses.dataclass(frozen=True)
class ToMe(Reduction):
    """Merge r tokens in every layer; r is one number, or one for each layer. No parameters.

    Tokens at even positions form set A, those at odd positions set B. u is the mean of a token's keys over the heads,
    scaled to length 1. Every token of A is paired with the token of B that has the highest u_A . u_B, and the r pairs
    with the highest values merge:

        y'_j = sum_i s_i y_i / sum_i s_i        s'_j = sum_i s_i        over the tokens i that become j

    s is a token's size: the number of patches that it stands for. The shorter sequence has the special tokens, then the
    rest of A, then B, each in its order. Special tokens take no part in merging. At most half of the patches merge in
    one layer; a larger r is reduced to that. `proportional`: attention weights each key by its size.

    Raises ValueError unless r is a whole number of at least 0, or a tuple of such numbers.
    """

    r: int | tuple[int, ...]
    proportional: bool = True

    name: ClassVar[str] = "tome"
    label: ClassVar[str] = "ToMe"
    sweeps: ClassVar[tuple[str, ...]] = ("r",)
    reads: ClassVar[frozenset[str]] = frozenset({"key_mean", "size"})
    neutral: ClassVar[Mapping[str, Any] | None] = {"r": 0}

    def __post_init__(self) -> None:
        if isinstance(self.r, list):  # from JSON; a tuple can be hashed
            object.__setattr__(self, "r", tuple(self.r))
        for r in self.r if isinstance(self.r, tuple) else (self.r,):
            if not is_whole(r, 0):
                raise ValueError(
                    f"ToMe's r is {shown_value(self.r)}: give a whole number from 0 and below 2^31, or a tuple with "
                    "one per layer"
                )
        plain = tuple(map(int, self.r)) if isinstance(self.r, tuple) else int(self.r)
        object.__setattr__(self, "r", plain)  # JSON has no NumPy numbers
        if not isinstance(self.proportional, bool):
            raise ValueError(f"ToMe's proportional is {shown_value(self.proportional)}: give True or False")

    def describe(self) -> str:
        """The settings, such as "ToMe, r 8"."""
        r = str(self.r) if isinstance(self.r, int) else f"({', '.join(map(str, self.r))})"
        return f"ToMe, r {r}{'' if self.proportional else ', sizes not in attention'}"

    def counts(self, config: Any) -> tuple[int, ...]:
        """Tokens after each layer, special ones included. Raises ValueError unless r has one number for each layer."""
        if isinstance(self.r, tuple) and len(self.r) != config.depth:
            raise ValueError(
                f"ToMe's r has {len(self.r)} numbers and the model {config.depth} layers: give one for each, "
                "or a single number"
            )
        counts, tokens = [], config.num_tokens
        for layer in range(config.depth):
            tokens -= self._merges(layer, tokens, config.num_special)
            counts.append(tokens)
        return tuple(counts)

    def levels(self, model: Any, images: Float[Array | np.ndarray, "b h w c"]) -> Callable[[float], "ToMe"]:
        """Level 0 merges half of the patches in every layer; in between, layers merge one token more or less."""
        config = model.config
        most = (config.num_tokens - config.num_special) / 2

        def at(level: float) -> ToMe:
            ends = np.floor((1 - level) * most * np.arange(config.depth + 1)).astype(int)
            return dataclasses.replace(self, r=tuple(np.diff(ends).tolist()))

        return at

    def groups(
        self, seen: Seen, *, layer: int, num_special: int, draw: Keys | None = None, module: Any = None
    ) -> Groups | None:
        """The groups of tokens that merge in a layer (from 0); None if none do."""
        metric, size = seen.key_mean, seen.size
        if metric is None or size is None:
            raise ValueError("ToMe needs key_mean and size of a layer: compute what its `reads` names")
        merges = self._merges(layer, size.shape[1], num_special)
        return merged_pairs(metric, size, merges, num_special) if merges else None

    def matching_macs(self, config: Any) -> tuple[int, ...]:
        """Multiply-adds of u_A . u_B in each layer where tokens merge, for one image."""
        counts = self.counts(config)
        width = config.embed_dim // config.num_heads
        before = (config.num_tokens, *counts[:-1])
        return tuple(-(-n // 2) * (n // 2) * width if after < n else 0 for n, after in zip(before, counts, strict=True))

    def _merges(self, layer: int, tokens: int, num_special: int) -> int:
        r = self.r[layer] if isinstance(self.r, tuple) else self.r
        return min(r, (tokens - num_special) // 2)


def merged_pairs(metric: Float[Array, "b n c"], size: Float[Array, "b n"], merges: int, num_special: int) -> Groups:
    """ToMe's groups, from the vectors by which tokens are compared. No gradient goes through the choice or the sizes.

    metric: one vector for each token, of any length. size: patches that each token stands for. merges: number of tokens
    that merge, from 1 to half of the patches. num_special: the first tokens, which take no part.
    """
    metric, size = jax.lax.stop_gradient((metric, size))
    metric = metric / jnp.maximum(jnp.linalg.norm(metric, axis=-1, keepdims=True), jnp.finfo(jnp.float32).tiny)
    first_a, first_b = num_special + num_special % 2, num_special + 1 - num_special % 2  # first patches
    # Full precision, so that rounding on an accelerator does not decide which of two nearly equal pairs merges.
    similarity = jnp.matmul(
        metric[:, first_a::2], metric[:, first_b::2].swapaxes(1, 2), precision=jax.lax.Precision.HIGHEST
    )
    batch, patches_a, patches_b = similarity.shape
    places = jnp.arange(patches_a)[None]
    _, chosen = jax.lax.top_k(similarity.max(-1), merges)  # [b, merges], places in A
    goes = (chosen[:, :, None] == places[:, None]).any(1)
    # The places that stay, in their order: what a stable argsort of `goes` gives, but faster on a CPU.
    stays = jnp.sort(jnp.where(goes, places + patches_a, places), axis=1)[:, : patches_a - merges]

    first_slot_b = num_special + patches_a - merges
    slot_a = jnp.where(goes, first_slot_b + similarity.argmax(-1), num_special - 1 + jnp.cumsum(~goes, axis=1))
    special, of_b = (jnp.broadcast_to(jnp.arange(n)[None], (batch, n)) for n in (num_special, patches_b))
    by_set = jnp.concatenate([special, slot_a, first_slot_b + of_b], axis=1)
    positions = [*range(num_special), *range(first_a, size.shape[1], 2), *range(first_b, size.shape[1], 2)]
    into = by_set[:, np.argsort(positions)]
    leader = jnp.concatenate([special, first_a + 2 * stays, first_b + 2 * of_b], axis=1)
    joins = first_a + 2 * chosen
    return Groups(into, size, leader, joins, group_sums(size, into, leader, joins), mean=True)


def r_schedule(r: int, depth: int, slope: float = -1.0) -> tuple[int, ...]:
    """One r for each of `depth` layers that changes linearly and is about r on average.

    slope -1 falls from 2 r to 0 (the paper's decreasing schedule), 0 is constant, 1 rises from 0 to 2 r. Raises
    ValueError unless -1 <= slope <= 1, r is at least 0 and depth at least 1.
    """
    if r < 0 or depth < 1 or not -1 <= slope <= 1:
        raise ValueError(
            f"r is {r}, depth {depth} and slope {slope}: give r from 0, depth from 1, and a slope from -1 to 1"
        )
    first = int(r * (1 - slope))
    last = 2 * r - first
    return tuple(int(first + (last - first) * layer / max(depth - 1, 1)) for layer in range(depth))
