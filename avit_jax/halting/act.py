"""Adaptive computation time for a whole image (Graves, arXiv 1603.08983): all tokens share one halting score."""

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from avit_jax.halting.accumulation import Accumulation
from avit_jax.halting.rule import State, Trace
from avit_jax.model.seen import Seen


@dataclasses.dataclass(frozen=True)
class ACT(Accumulation):
    """An image adds up one halting score a layer, and all its tokens stop once the sum reaches 1 - halt_epsilon.

        h_l = sigmoid(gate_scale * mean over tokens of x_l[..., 0] - gate_center)        h_L = 1
        N = first l with h_1 + .. + h_l >= 1 - halt_epsilon        r = 1 - (h_1 + .. + h_{N-1})
        logits = heads(LayerNorm(h_1 x_1 + .. + h_{N-1} x_{N-1} + r x_N))

    The loss is A-ViT's: classification + ponder_weight * mean(N + r) + prior_weight * prior. There are no parameters.
    The defaults are the gate of the A-ViT paper. A mean of 0 then scores 5e-5, so a model that is fine-tuned starts
    with the logits of the static one, and the losses teach it to stop. Raises ValueError for a setting that is not a
    number up to 10^9, and unless halt_epsilon lies between 0 and 1.
    """

    gate_scale: float = 5.0
    gate_center: float = 10.0
    halt_epsilon: float = 0.01

    name: ClassVar[str] = "act"
    label: ClassVar[str] = "ACT"
    advice: ClassVar[str] = "fine-tuning with config.loss.ponder_weight, or a lower gate_center, makes images stop"

    def describe(self) -> str:
        """Scale and center, such as "ACT, gate 5 / 10"."""
        return f"ACT, {super().describe()}"

    def gate_input(self, channel: Float[Array, "b n"]) -> Float[Array, "b n"]:
        """The mean of channel 0 over the tokens of the image, which are all active or all halted."""
        return jnp.broadcast_to(channel.mean(1, keepdims=True), channel.shape)

    def advance(
        self,
        state: State,
        seen: Seen,
        *,
        layer: Int[Array, ""] | int,
        is_last: Bool[Array, ""] | bool,
        module: Any = None,
    ) -> tuple[State, Trace]:
        """The state after a layer; each image's score [b] as "score", and "halting_score" [b n], 0 in the last layer.

        Packed execution may compute only the class token in the last layer, and then there is no mean over tokens. The
        score of that layer decides nothing; only the prior in training compares it.
        """
        new_state, trace = super().advance(state, seen, layer=layer, is_last=is_last, module=module)
        score = trace.of_tokens["halting_score"]
        return new_state, Trace({"halting_score": jnp.where(is_last, 0, score)}, {"score": score[:, 0]})

    def scores(self, trace: Trace) -> Float[Array, "l b n"]:
        """The scores of the images, the same for all tokens of an image."""
        return jnp.broadcast_to(trace.of_images["score"][..., None], trace.of_tokens["halting_score"].shape)
