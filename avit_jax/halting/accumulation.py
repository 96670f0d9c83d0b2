"""What A-ViT and ACT share: halting scores add up, and whoever reaches 1 stops with the remainder as its weight."""

import abc
import dataclasses
import math
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from avit_jax.halting.avit_losses import AViTLoss, halting_losses
from avit_jax.halting.rule import Classify, Halting, State, Teacher, Trace, drop_halted, first_state
from avit_jax.model.rule import Keys
from avit_jax.model.seen import Seen
from avit_jax.runtime.files import shown_value
from avit_jax.runtime.numbers import is_real
from avit_jax.runtime.settings import Settings

_FAR = 1e6  # a change of gate_center beyond every gate input, with which all tokens halt at once or none does


@dataclasses.dataclass(frozen=True)
class Accumulation(Halting):
    """A rule whose halting scores add up over the layers (adaptive computation time, arXiv 1603.08983).

    h = sigmoid(gate_scale * input - gate_center) for active tokens, 0 for halted ones; a token goes on while the sum of
    its h is below 1 - halt_epsilon; every token stops at the last layer. A token's value in a layer has weight h if the
    token goes on, and the remainder 1 - (sum of earlier h) if it stops there. A subclass says what the input is.
    Raises ValueError for a setting that is not a number up to 10^9, and unless halt_epsilon lies between 0 and 1.
    """

    gate_scale: float
    gate_center: float
    halt_epsilon: float = 0.01

    sweeps: ClassVar[tuple[str, ...]] = ("gate_center", "gate_scale")
    loss_settings: ClassVar[type[Settings] | None] = AViTLoss

    def __post_init__(self) -> None:
        for name in ("gate_scale", "gate_center", "halt_epsilon"):
            value = getattr(self, name)
            if not is_real(value):
                raise ValueError(f"{name} is {shown_value(value)}: it must be a number from -10^9 to 10^9")
            object.__setattr__(self, name, float(value))  # JSON has no NumPy numbers
        if not 0 < self.halt_epsilon < 1:
            raise ValueError(f"halt_epsilon is {self.halt_epsilon}: it must lie between 0 and 1")

    def describe(self) -> str:
        """Scale and center, such as "gate 10 / 30"."""
        return f"gate {self.gate_scale:g} / {self.gate_center:g}"

    @abc.abstractmethod
    def gate_input(self, channel: Float[Array, "b n"]) -> Float[Array, "b n"]:
        """The input of each token's score. channel: channel 0 of the tokens, 0 for halted ones."""

    def levels(self, model: Any, images: Float[Array | np.ndarray, "b h w c"]) -> Callable[[float], "Accumulation"]:
        """gate_center + 4 * logit(level): level 0.5 is the rule as it is, 0 stops everything after the first layer."""

        def at(level: float) -> Accumulation:
            shift = 4 * (math.log(level) - math.log1p(-level)) if 0 < level < 1 else _FAR * (1 if level > 0 else -1)
            return dataclasses.replace(self, gate_center=self.gate_center + shift)

        return at

    def initial(self, batch: int, config: Any, draw: Keys | None = None) -> State:
        """All tokens active, nothing accumulated."""
        shape = (batch, config.num_tokens)
        state = first_state(batch, config.num_tokens, config.num_outputs, config.embed_dim)
        of_tokens = {
            "cumulative_halting": jnp.zeros(shape),  # sum of the halting scores so far
            "remainder": jnp.ones(shape),  # 1 - that sum, kept from the layer where the token stopped
            "ponder_cost": jnp.zeros(shape),  # layers + remainder; complete once the token has stopped
        }
        return dataclasses.replace(state, of_tokens=of_tokens)

    def advance(
        self,
        state: State,
        seen: Seen,
        *,
        layer: Int[Array, ""] | int,
        is_last: Bool[Array, ""] | bool,
        module: Any = None,
    ) -> tuple[State, Trace]:
        """The state after a layer, and the layer's halting scores [b n] as "halting_score"."""
        assert seen.gate is not None
        assert seen.outputs is not None
        active, own = state.active, state.of_tokens
        gate_input = self.gate_input(jnp.where(active, seen.gate, 0))
        halting_score = jnp.where(active, jax.nn.sigmoid(self.gate_scale * gate_input - self.gate_center), 0)
        effective = jnp.where(is_last, active.astype(halting_score.dtype), halting_score)
        cumulative = own["cumulative_halting"] + effective
        goes_on = active & (cumulative < 1 - self.halt_epsilon)
        stops = active & ~goes_on
        weight = jnp.where(goes_on, effective, jnp.where(stops, own["remainder"], 0))
        num_outputs = state.output.shape[1]
        read = drop_halted(seen.outputs, active[:, :num_outputs])
        new_state = State(
            active=goes_on,
            token_depth=state.token_depth + active,
            output=state.output + weight[:, :num_outputs, None] * read,
            of_tokens={
                "cumulative_halting": cumulative,
                "remainder": jnp.where(goes_on, own["remainder"] - effective, own["remainder"]),
                "ponder_cost": own["ponder_cost"] + active + jnp.where(stops, own["remainder"], 0),
            },
        )
        return new_state, Trace(of_tokens={"halting_score": halting_score})

    def finish(self, state: State, images: Bool[Array, "b 1"]) -> State:
        """Stop the tokens that are active in these images; the remainder adds to their ponder cost, as at any stop."""
        dropped = state.active & images
        ponder_cost = state.of_tokens["ponder_cost"] + jnp.where(dropped, state.of_tokens["remainder"], 0)
        return dataclasses.replace(
            state, active=state.active & ~images, of_tokens=state.of_tokens | {"ponder_cost": ponder_cost}
        )

    def losses(
        self,
        trace: Trace,
        state: State,
        head_logits: Float[Array, "heads b k"],
        *,
        classify: Classify,
        settings: AViTLoss,
        image_weight: Float[Array, " b"] | None = None,
        teacher: Teacher | None = None,
    ) -> dict[str, Float[Array, ""]]:
        """Classification, ponder_weight * mean ponder cost, and prior_weight * prior."""
        ponder, prior = halting_losses(self.scores(trace), state.of_tokens["ponder_cost"], settings, image_weight)
        return {"classification": classify(head_logits), "ponder": ponder, "prior": prior}

    def scores(self, trace: Trace) -> Float[Array, "l b n"]:
        """The scores by layer that the prior compares, also those of the last layer, which decide nothing."""
        return trace.of_tokens["halting_score"]
