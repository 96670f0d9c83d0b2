"""What rules that stop single patches have in common: special tokens are marked, and never stop early."""

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from avit_jax.halting.rule import Halting, State, keep_last
from avit_jax.model.rule import Keys
from avit_jax.model.seen import Seen


class StopsPatches(Halting):
    """A rule that stops single patches; its base marks the special tokens and runs a short last layer."""

    reads_last_layer: ClassVar[bool] = False

    def initial(self, batch: int, config: Any, draw: Keys | None = None) -> State:
        """All tokens active, with "special" in of_tokens: packed execution moves these marks with the tokens."""
        state = super().initial(batch, config, draw)
        special = jnp.arange(config.num_tokens) < config.num_special
        return dataclasses.replace(state, of_tokens={"special": jnp.broadcast_to(special, state.active.shape)})


def active_patches(state: State) -> Bool[Array, "b n"]:
    """The active tokens that are not special."""
    return state.active & ~state.of_tokens["special"]


def stop_patches(state: State, seen: Seen, stops: Bool[Array, "b n"], is_last: Bool[Array, ""] | bool) -> State:
    """The state after a layer in which patches stop; special tokens only stop at the last layer, as all tokens do."""
    goes_on = state.active & (state.of_tokens["special"] | ~stops) & jnp.logical_not(is_last)
    return keep_last(state, seen, goes_on)


def stop_all(state: State, seen: Seen) -> State:
    """The state after the last layer, of which a rule that stops patches needs no facts."""
    return keep_last(state, seen, jnp.zeros_like(state.active))


def acts_in(layers: tuple[int, ...], layer: Int[Array, ""] | int) -> Bool[Array, ""]:
    """Whether a layer, possibly traced, is one of `layers`."""
    return (jnp.array(layers, jnp.int32) == layer).any()
