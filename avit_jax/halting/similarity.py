"""Similarity: a patch, or a whole image, stops once a layer hardly changes it (A-ViT's comparison; our form of it)."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from avit_jax.halting.patches import StopsPatches, active_patches, stop_all, stop_patches
from avit_jax.halting.rule import State, Trace, keep_last
from avit_jax.model.seen import Seen
from avit_jax.runtime.files import shown_value
from avit_jax.runtime.numbers import is_real

FORMS = ("token", "image")


@dataclasses.dataclass(frozen=True)
class Similarity(StopsPatches):
    """Stop after layer l if x_l is nearly x_{l-1}; the first layer stops nothing. No parameters.

        sim_l(n) = cosine of x_l(n) and x_{l-1}(n), both without their mean over channels, as LayerNorm sees them

    form "token": a patch stops if its sim_l is above the threshold. form "image": the image stops if the mean of sim_l
    over its patches is. thresholds: one number for all layers, or one for each layer; 2 is beyond any cosine. The
    residual stream grows with depth, so similarity rises from layer to layer, and each layer needs its own threshold:
    `levels` finds them. The mechanism is named in arXiv 2112.07658, without code or details; this is our form of it.

    Raises ValueError for a threshold outside -2..2, for another form, and for values of another type.
    """

    thresholds: float | tuple[float, ...]
    form: str = "token"

    name: ClassVar[str] = "similarity"
    label: ClassVar[str] = "similarity (our form)"
    sweeps: ClassVar[tuple[str, ...]] = ("thresholds",)
    neutral: ClassVar[Mapping[str, Any] | None] = {"thresholds": 2.0}
    reads: ClassVar[frozenset[str]] = frozenset({"before", "tokens"})
    advice: ClassVar[str] = "lower thresholds let tokens stop earlier"

    def __post_init__(self) -> None:
        given = self.thresholds if isinstance(self.thresholds, tuple | list) else (self.thresholds,)
        if not given or not all(is_real(value, -2, 2) for value in given):
            raise ValueError(
                f"thresholds is {shown_value(self.thresholds)}: give a number from -2 to 2, or a tuple with one per "
                "layer"
            )
        plain = tuple(map(float, given))  # JSON has no NumPy numbers
        object.__setattr__(self, "thresholds", plain if given is self.thresholds else plain[0])
        if self.form not in FORMS:
            raise ValueError(f"form is {shown_value(self.form)}: choose one of {', '.join(FORMS)}")

    def describe(self) -> str:
        """The settings, such as "similarity of each token above 0.95"."""
        values = self.thresholds if isinstance(self.thresholds, tuple) else (self.thresholds,)
        return f"similarity of each {self.form} above {', '.join(f'{value:g}' for value in values)}"

    def check(self, config: Any) -> None:
        """Raises ValueError unless there is one threshold for each layer, or one for all."""
        if isinstance(self.thresholds, tuple) and len(self.thresholds) != config.depth:
            raise ValueError(
                f"there are {len(self.thresholds)} thresholds and the model has {config.depth} layers: "
                "give one for each, or a single number"
            )

    def levels(self, model: Any, images: Float[Array | np.ndarray, "b h w c"]) -> Callable[[float], "Similarity"]:
        """The thresholds that are the same quantile of sim_l in every layer; at level 1 nothing stops.

        The quantiles are those of the static model on these images: of its patches, or of its image means. An image
        stays static until it stops, so in the image form no image ever stops earlier at a higher level. In the token
        form that holds on average, because patches that stop change what the others see.
        """
        static = dataclasses.replace(self, thresholds=2.0)
        graphdef, params = nnx.split(model.with_config(rule=static))

        @jax.jit
        def measured(params: Any, images: Array) -> Array:
            def one(image: Array) -> Array:
                return nnx.merge(graphdef, params).forward(image[None])[1].of_tokens["similarity"][:, 0]

            return jax.lax.map(one, images, batch_size=min(32, len(images)))

        found = np.asarray(measured(params, jnp.asarray(images)))[:, :, model.config.num_special :]  # [b l p]
        values = found.mean(-1).T if self.form == "image" else np.moveaxis(found, 1, 0).reshape(model.config.depth, -1)

        def at(level: float) -> Similarity:
            if level <= 0 or level >= 1:
                return dataclasses.replace(self, thresholds=-2.0 if level <= 0 else 2.0)
            return dataclasses.replace(self, thresholds=tuple(np.quantile(values, level, axis=1).tolist()))

        return at

    def advance(
        self,
        state: State,
        seen: Seen,
        *,
        layer: Int[Array, ""] | int,
        is_last: Bool[Array, ""] | bool,
        module: Any = None,
    ) -> tuple[State, Trace]:
        """The state after a layer; "similarity" is recorded for every token."""
        if is_last is True:  # packed execution may compute only the tokens of the heads there
            return stop_all(state, seen), Trace(of_tokens={"similarity": jnp.zeros(state.active.shape)})
        assert seen.tokens is not None
        assert seen.before is not None
        similarity = jax.lax.stop_gradient(centred_cosine(seen.tokens, seen.before))
        limit = jnp.array(self.thresholds)
        limit = limit[layer] if limit.ndim else limit
        trace = Trace(of_tokens={"similarity": similarity})
        if self.form == "token":
            return stop_patches(state, seen, (similarity > limit) & (layer >= 1), is_last), trace
        patches = active_patches(state)
        mean = jnp.where(patches, similarity, 0).sum(1) / jnp.maximum(patches.sum(1), 1)
        stops = ((mean > limit) & (layer >= 1)) | is_last
        return keep_last(state, seen, state.active & ~stops[:, None]), trace


def centred_cosine(a: Float[Array, "b n d"], b: Float[Array, "b n d"]) -> Float[Array, "b n"]:
    """The cosine of each token of a and b, both without their mean over channels; 0 for a constant token."""
    a, b = a - a.mean(-1, keepdims=True), b - b.mean(-1, keepdims=True)
    lengths = jnp.sqrt(jnp.square(a).sum(-1)) * jnp.sqrt(jnp.square(b).sum(-1))
    return (a * b).sum(-1) / jnp.maximum(lengths, jnp.finfo(jnp.float32).tiny)
