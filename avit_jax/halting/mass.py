"""Attention mass: the patches that together have a share of the class attention go on, the others stop."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from avit_jax.halting.patches import StopsPatches, active_patches, acts_in, stop_all, stop_patches
from avit_jax.halting.rule import State, Trace
from avit_jax.model.rule import check_class_attention, check_layers, plain_layers
from avit_jax.model.seen import Seen
from avit_jax.runtime.files import shown_value
from avit_jax.runtime.numbers import is_real


@dataclasses.dataclass(frozen=True)
class AttentionMass(StopsPatches):
    """In each of the layers (from 0), keep the patches with the most class attention. No parameters.

    The attention from the class token (mean over heads; with a distillation token, of both) is normalised over the
    patches that are there and sorted in descending order. A patch goes on if those before it have less than `share`. So
    the one that crosses the share goes on too, and at least one does. At equal attention the lower position comes
    first. With share 1 no patch stops.

    Raises ValueError for a share outside 0..1, for layers that are not in ascending order from 0, and for values of
    another type.
    """

    share: float
    layers: tuple[int, ...] = (3, 6, 9)

    name: ClassVar[str] = "mass"
    label: ClassVar[str] = "attention mass"
    sweeps: ClassVar[tuple[str, ...]] = ("share",)
    neutral: ClassVar[Mapping[str, Any] | None] = {"share": 1.0, "layers": ()}
    reads: ClassVar[frozenset[str]] = frozenset({"class_attention"})
    advice: ClassVar[str] = "a lower share lets more patches stop"

    def __post_init__(self) -> None:
        if not is_real(self.share, 0, 1):
            raise ValueError(f"AttentionMass's share is {shown_value(self.share)}: give a number from 0 to 1")
        object.__setattr__(self, "share", float(self.share))  # JSON has no NumPy numbers
        object.__setattr__(self, "layers", plain_layers("AttentionMass", self.layers, some=False))

    def describe(self) -> str:
        """The settings, such as "attention mass 0.9 in layers (3, 6, 9)"."""
        return f"attention mass {self.share:g} in layers ({', '.join(map(str, self.layers))})"

    def check(self, config: Any) -> None:
        """Raises ValueError for a model without class token, or without one of the layers."""
        check_class_attention("AttentionMass", config)
        check_layers("AttentionMass", self.layers, config.depth)

    def levels(self, model: Any, images: Float[Array | np.ndarray, "b h w c"]) -> Callable[[float], "AttentionMass"]:
        """Share 1 - (1 - level)^4: small steps near 1, where a few patches have nearly all the attention."""
        return lambda level: dataclasses.replace(self, share=1.0 - (1 - level) ** 4)

    def advance(
        self,
        state: State,
        seen: Seen,
        *,
        layer: Int[Array, ""] | int,
        is_last: Bool[Array, ""] | bool,
        module: Any = None,
    ) -> tuple[State, Trace]:
        """The state after a layer; nothing is recorded."""
        if is_last is True:  # packed execution may compute only the tokens of the heads there
            return stop_all(state, seen), Trace()
        assert seen.class_attention is not None
        stops = jnp.zeros_like(state.active)
        if self.share < 1:  # at 1, rounding must not decide
            kept = largest(jax.lax.stop_gradient(seen.class_attention), active_patches(state), self.share)
            stops = ~kept & acts_in(self.layers, layer)
        return stop_patches(state, seen, stops, is_last), Trace()


def largest(score: Float[Array, "b n"], there: Bool[Array, "b n"], share: float) -> Bool[Array, "b n"]:
    """The tokens that are there and have less than `share` of the score before them in descending order.

    score: at least 0; it may be anything for tokens that are not there. All are kept if the scores add up to 0.
    """
    order = jnp.argsort(jnp.where(there, -score, jnp.inf), axis=1)  # stable: at a tie, the lower position first
    total = jnp.cumsum(jnp.take_along_axis(jnp.where(there, score, 0), order, axis=1), axis=1)
    before = jnp.pad(total[:, :-1], ((0, 0), (1, 0)))
    whole = total[:, -1:]
    kept = (before < share * whole) | (jnp.arange(score.shape[1]) == 0) | (whole == 0)
    return there & jnp.put_along_axis(jnp.zeros_like(there), order, kept, axis=1, inplace=False)
