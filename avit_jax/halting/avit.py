"""The halting rule of A-ViT (arXiv 2112.07658): when a token stops, and the weight of its value in each layer."""

import dataclasses
from typing import ClassVar

from jaxtyping import Array, Float

from avit_jax.halting.accumulation import Accumulation


@dataclasses.dataclass(frozen=True)
class AViTGate(Accumulation):
    """A-ViT's rule (arXiv 2112.07658): every token adds up its halting scores and stops once they reach 1.

    h = sigmoid(gate_scale * x[..., 0] - gate_center) for active tokens, 0 for halted ones; a token goes on while the
    sum of its h is below 1 - halt_epsilon; every token stops at the last layer. A token's value in a layer has weight h
    if the token goes on, and the remainder 1 - (sum of earlier h) if it stops there. Raises ValueError for a setting
    that is not a number up to 10^9, and unless halt_epsilon lies between 0 and 1.
    """

    gate_scale: float
    gate_center: float
    halt_epsilon: float = 0.01

    name: ClassVar[str] = "avit"
    label: ClassVar[str] = "A-ViT"
    advice: ClassVar[str] = "avit_jax.start_gate(model, images, target_depth=...) or fine-tuning makes tokens halt"

    def gate_input(self, channel: Float[Array, "b n"]) -> Float[Array, "b n"]:
        """Each token's own channel 0."""
        return channel
