"""Confidence exit: a whole image stops at the first layer that is confident of its class (BranchyNet, DeeBERT)."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from avit_jax.halting.rule import Classify, Halting, State, Teacher, Trace, first_state
from avit_jax.model.rule import Keys
from avit_jax.model.seen import Seen
from avit_jax.runtime.files import shown_value
from avit_jax.runtime.numbers import is_real, is_whole


@dataclasses.dataclass(frozen=True)
class ConfidenceExit(Halting):
    """An image leaves after the first layer l >= first_layer with max softmax(e_l(x_l)) > threshold, or after the last.

    Layers count from 0. e_l is the exit of layer l, and the image's logits are those of the exit where it leaves. With
    own_heads every layer has its own LayerNorm and linear heads, initialised from the model's. Otherwise all layers
    share the model's norm and heads, and the rule has no parameters. In a distilled model e_l is the mean of both
    heads. Training computes every layer of every image. Its loss is the mean over layers of the classification loss of
    e_l (arXiv 1709.01686), and threshold has no effect.

    Raises ValueError for a threshold outside 0..1, for a first_layer below 0, and for values of another type.
    """

    threshold: float
    own_heads: bool = False
    first_layer: int = 0

    name: ClassVar[str] = "confidence"
    label: ClassVar[str] = "confidence"
    masks_in_training: ClassVar[bool] = False
    sweeps: ClassVar[tuple[str, ...]] = ("threshold",)
    neutral: ClassVar[Mapping[str, Any] | None] = {"threshold": 1.0}
    advice: ClassVar[str] = "a lower threshold lets images leave earlier"

    def __post_init__(self) -> None:
        if not is_real(self.threshold, 0, 1):
            raise ValueError(f"threshold is {shown_value(self.threshold)}: it must be a number from 0 to 1")
        if not isinstance(self.own_heads, bool):
            raise ValueError(f"own_heads is {shown_value(self.own_heads)}: give True or False")
        if not is_whole(self.first_layer, 0):
            raise ValueError(f"first_layer is {shown_value(self.first_layer)}: it must be a whole number from 0")
        object.__setattr__(self, "threshold", float(self.threshold))  # JSON has no NumPy numbers
        object.__setattr__(self, "first_layer", int(self.first_layer))

    @property
    def reads(self) -> frozenset[str]:
        """The logits of the model's heads, unless the layers have their own."""
        return frozenset() if self.own_heads else frozenset({"logits"})

    def describe(self) -> str:
        """The settings, such as "confidence exit above 0.9, own heads"."""
        first = f" from layer {self.first_layer}" if self.first_layer else ""
        return f"confidence exit above {self.threshold:g}{first}{', own heads' if self.own_heads else ''}"

    def check(self, config: Any) -> None:
        """Raises ValueError for a model without classes, with too few layers, or whose own heads would read a mean."""
        if not config.num_classes:
            raise ValueError("a confidence exit needs class logits and num_classes is 0: load a model with a head")
        if self.first_layer >= config.depth:
            raise ValueError(f"first_layer is {self.first_layer} and the last layer is {config.depth - 1}: lower it")
        if self.own_heads and config.pool != "token":
            raise ValueError(f"own_heads read the class token and pool is {config.pool!r}: give own_heads=False")

    def levels(self, model: Any, images: Float[Array | np.ndarray, "b h w c"]) -> Callable[[float], "ConfidenceExit"]:
        """Level q is the q-quantile of the confidences of all exits before the last, on up to 256 of the images."""
        graphdef, params = nnx.split(model.with_config(rule=dataclasses.replace(self, threshold=1.0)))

        @jax.jit
        def confidences(params: Any, images: Float[Array, "b h w c"]) -> Float[Array, "l b"]:
            _, trace, _ = nnx.merge(graphdef, params).forward(images)
            return jax.nn.softmax(trace.of_images["logits"].mean(2)).max(-1)

        spread = np.linspace(0, len(images) - 1, min(len(images), 256)).round().astype(int)
        found = np.asarray(confidences(params, jnp.asarray(images)[spread]))[self.first_layer : -1]

        def at(level: float) -> ConfidenceExit:
            # Above every confidence at level 1, below every one at level 0.
            threshold = float(level >= 1) if not 0 < level < 1 else float(np.quantile(found, level))
            return dataclasses.replace(self, threshold=min(threshold, 1.0))

        return at

    def module(self, model: Any) -> "ExitHeads | None":
        """The heads of every layer, initialised from the model's; None without own_heads."""
        if not self.own_heads:
            return None
        heads = [model.head, model.head_dist] if model.config.distilled else [model.head]
        return ExitHeads(model.norm, heads, model.config.depth)

    def initial(self, batch: int, config: Any, draw: Keys | None = None) -> State:
        """All images active, with logits of 0."""
        state = first_state(batch, config.num_tokens, config.num_outputs, config.embed_dim)
        logits = jnp.zeros((batch, 1 + config.distilled, config.num_classes))
        return dataclasses.replace(state, of_images={"head_logits": logits})

    def advance(
        self,
        state: State,
        seen: Seen,
        *,
        layer: Int[Array, ""] | int,
        is_last: Bool[Array, ""] | bool,
        module: Any = None,
    ) -> tuple[State, Trace]:
        """The state after a layer, and the logits of its exit [b heads k] as "logits"."""
        assert seen.outputs is not None
        logits = module(seen.outputs, layer) if self.own_heads else seen.logits
        assert logits is not None
        going = state.active.any(1)
        sure = jax.nn.softmax(logits.mean(0)).max(-1) > self.threshold
        exits = going & ((sure & (layer >= self.first_layer)) | is_last)
        by_image = logits.swapaxes(0, 1)
        new_state = State(
            active=state.active & ~exits[:, None],
            token_depth=state.token_depth + state.active,
            output=jnp.where(exits[:, None, None], seen.outputs, state.output),
            of_images={"head_logits": jnp.where(exits[:, None, None], by_image, state.of_images["head_logits"])},
        )
        return new_state, Trace(of_images={"logits": by_image})

    def head_logits(self, state: State) -> Float[Array, "heads b k"]:
        """The logits of the exit where each image left."""
        return state.of_images["head_logits"].swapaxes(0, 1)

    def losses(
        self,
        trace: Trace,
        state: State,
        head_logits: Float[Array, "heads b k"],
        *,
        classify: Classify,
        settings: None = None,
        image_weight: Float[Array, " b"] | None = None,
        teacher: Teacher | None = None,
    ) -> dict[str, Float[Array, ""]]:
        """The mean over the layers of the classification loss of their exits."""
        of_layers = trace.of_images["logits"].swapaxes(1, 2)
        return {"classification": jax.vmap(classify)(of_layers).mean()}

    def extra_macs(self, config: Any, token_depth: Int[Array, "b n"]) -> Float[Array, " b"]:
        """D * C for each head of an exit computed before the one that gave the logits, which is counted as the head."""
        asked = jnp.maximum(token_depth[:, 0] - 1 - self.first_layer, 0)
        return asked.astype(jnp.float32) * (1 + config.distilled) * config.head_inputs * config.num_classes


class ExitHeads(nnx.Module):
    """A LayerNorm and heads for every layer, stacked on a layer axis."""

    def __init__(self, norm: nnx.LayerNorm, heads: list[nnx.Linear], depth: int) -> None:
        self.norm = _stacked(norm, depth)
        self.head = _stacked(heads[0], depth)
        self.head_dist = _stacked(heads[1], depth) if len(heads) > 1 else None

    def __call__(self, outputs: Float[Array, "b s d"], layer: Int[Array, ""] | int) -> Float[Array, "heads b k"]:
        """The logits of a layer's heads. outputs: its first tokens, which the heads read; layer: counted from 0."""
        outputs = _of_layer(self.norm, layer)(outputs)
        heads = [self.head] if self.head_dist is None else [self.head, self.head_dist]
        return jnp.stack([_of_layer(head, layer)(outputs[:, token]) for token, head in enumerate(heads)])


def _stacked(module: Any, depth: int) -> Any:
    """The module with its parameters repeated on a leading layer axis."""
    graphdef, state = nnx.split(module)
    return nnx.merge(graphdef, jax.tree.map(lambda p: jnp.broadcast_to(p, (depth, *p.shape)), state))


def _of_layer(stacked: Any, layer: Int[Array, ""] | int) -> Any:
    graphdef, state = nnx.split(stacked)
    return nnx.merge(graphdef, jax.tree.map(lambda p: p[layer], state))
