"""ATS (arXiv 2111.15667): patches are sampled from the distribution of their scores; those not sampled stop."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from avit_jax.halting.patches import StopsPatches, active_patches, acts_in, stop_all, stop_patches
from avit_jax.halting.rule import State, Trace
from avit_jax.model.rule import Keys, check_class_attention, check_layers, plain_layers
from avit_jax.model.seen import Seen
from avit_jax.runtime.files import shown_value
from avit_jax.runtime.numbers import is_whole


@dataclasses.dataclass(frozen=True)
class ATS(StopsPatches):
    """Sample patches in each of the layers (from 0; None: all from layer 3 on). No parameters.

        score_n = A[class, n] |v_n|                         A: mean over heads; v: the values of all heads as one vector
        F_n = cumulative sum of the scores in ascending order, scaled linearly to run from 0 to 1
        y_k = y_0 + (1 - y_0) k / (samples - 1)             k = 0..samples - 1; y_0: the smallest F above 0

    Each y_k picks the patch whose F is nearest, the lower one at a tie. The patches that were picked go on. The lowest
    one never is, and many small ones share few picks. samples: from 2; None: as many as the image has patches, as
    published. All patches go on if only one is left or only the lowest has a score. With a distillation token A is the
    mean of both rows.

    The published code samples an image alone as here. In a batch its result depends on the other images, because their
    padding enters F.

    Raises ValueError for fewer than 2 samples, for layers that are not in ascending order from 0, and for values of
    another type.
    """

    samples: int | None = None
    layers: tuple[int, ...] | None = None

    name: ClassVar[str] = "ats"
    label: ClassVar[str] = "ATS"
    sweeps: ClassVar[tuple[str, ...]] = ("samples",)
    neutral: ClassVar[Mapping[str, Any] | None] = {"layers": ()}
    reads: ClassVar[frozenset[str]] = frozenset({"class_attention", "value_norm"})
    advice: ClassVar[str] = "fewer samples let more patches stop"

    def __post_init__(self) -> None:
        if self.samples is not None:
            if not is_whole(self.samples, 2):
                raise ValueError(
                    f"ATS's samples is {shown_value(self.samples)}: give a whole number from 2 and below 2^31, or None"
                )
            object.__setattr__(self, "samples", int(self.samples))  # JSON has no NumPy numbers
        if self.layers is not None:
            object.__setattr__(self, "layers", plain_layers("ATS", self.layers, some=False))

    def describe(self) -> str:
        """The settings, such as "ATS, 64 samples in layers (3, 6, 9)"."""
        samples = "as many samples as patches" if self.samples is None else f"{self.samples} samples"
        layers = "from layer 3" if self.layers is None else f"in layers ({', '.join(map(str, self.layers))})"
        return f"ATS, {samples} {layers}"

    def check(self, config: Any) -> None:
        """Raises ValueError for a model without class token, or without one of the layers."""
        check_class_attention("ATS", config)
        check_layers("ATS", self.layers or (), config.depth)

    def levels(self, model: Any, images: Float[Array | np.ndarray, "b h w c"]) -> Callable[[float], "ATS"]:
        """From 2 samples to 1024 for each patch, evenly in the logarithm; above level 0.9 in fewer and fewer layers.

        Even many samples drop the lowest patch of each layer, so that only without any layer nothing stops.
        """
        patches = model.config.num_tokens - model.config.num_special
        last = model.config.depth - 1  # it has no effect there
        layers = [layer for layer in (range(3, last) if self.layers is None else self.layers) if layer < last]

        def at(level: float) -> ATS:
            samples = round(2 * (512 * patches) ** min(level / 0.9, 1))
            left_out = round(max(level - 0.9, 0) / 0.1 * len(layers))
            return ATS(samples, tuple(layers[left_out:]))

        return at

    def initial(self, batch: int, config: Any, draw: Keys | None = None) -> State:
        """All tokens active; the number of patches goes along, because planned execution shows fewer slots later."""
        state = super().initial(batch, config, draw)
        patches = jnp.full((batch, 1), config.num_tokens - config.num_special)
        return dataclasses.replace(state, of_images={"patches": patches})

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
        assert seen.value_norm is not None
        acts = layer >= 3 if self.layers is None else acts_in(self.layers, layer)
        score = jax.lax.stop_gradient(seen.class_attention * seen.value_norm)
        samples = state.of_images["patches"] if self.samples is None else self.samples
        picked = sampled(score, active_patches(state), samples)
        return stop_patches(state, seen, ~picked & acts, is_last), Trace()


def sampled(
    score: Float[Array, "b n"], there: Bool[Array, "b n"], samples: Int[Array, "b 1"] | int
) -> Bool[Array, "b n"]:
    """The tokens that the heights y_0 .. pick from those that are there; see ATS.

    score: at least 0; it may be anything for tokens that are not there. samples: the number of heights, from 2.
    """
    order = jnp.argsort(jnp.where(there, score, jnp.inf), axis=1)  # those that are not there come last
    total = jnp.cumsum(jnp.take_along_axis(jnp.where(there, score, 0), order, axis=1), axis=1)
    first, last = total[:, :1], total[:, -1:]
    spread = last > first
    level = jnp.where(spread, (total - first) / jnp.where(spread, last - first, 1), 0)
    lowest = jnp.where(level > 0, level, 1).min(1, keepdims=True)  # y_0
    # A token is picked if a height lies between the middle to the token before it and the middle to the next one. So
    # count the heights up to each upper middle. Scores ascend, so the only equal levels are zeros, which no height
    # picks.
    middle = (level[:, :-1] + level[:, 1:]) / 2
    steps = jnp.floor((middle - lowest) / jnp.maximum(1 - lowest, jnp.finfo(jnp.float32).tiny) * (samples - 1))
    is_end = jnp.arange(score.shape[1])[None] >= there.sum(1, keepdims=True) - 1
    below = jnp.where(is_end, samples, jnp.pad(jnp.clip(steps + 1, 0, samples), ((0, 0), (0, 1))))
    picks = jnp.diff(below, axis=1, prepend=0) > 0
    picks = jnp.put_along_axis(jnp.zeros_like(there), order, picks, axis=1, inplace=False)
    return there & (picks | ~spread)
