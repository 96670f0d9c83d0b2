"""The halting rule of A-ViT (arXiv 2112.07658): when a token stops, and how much each layer's token weighs.

Pure functions over one small pytree; every execution of the model calls them, and nothing else decides who halts.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class HaltingState:
    """What the rule remembers of every token between two layers."""

    cumulative_halting: Float[Array, "b n"]  # sum of the halting scores so far
    remainder: Float[Array, "b n"]  # 1 - that sum, kept from the layer where the token stopped
    active: Bool[Array, "b n"]  # True while the token is computed
    token_depth: Int[Array, "b n"]  # layers that processed the token
    ponder_cost: Float[Array, "b n"]  # layers + remainder; complete once the token has stopped
    output: Float[Array, "b s d"]  # weighted sum over layers, of the first s tokens only: those the heads read


def initial_state(batch: int, num_tokens: int, num_special: int, embed_dim: int) -> HaltingState:
    """The state before layer 1: all tokens active, nothing accumulated."""
    return HaltingState(
        cumulative_halting=jnp.zeros((batch, num_tokens)),
        remainder=jnp.ones((batch, num_tokens)),
        active=jnp.ones((batch, num_tokens), bool),
        token_depth=jnp.zeros((batch, num_tokens), jnp.int32),
        ponder_cost=jnp.zeros((batch, num_tokens)),
        output=jnp.zeros((batch, num_special, embed_dim)),
    )


def drop_halted(tokens: Float[Array, "b n d"], active: Bool[Array, "b n"]) -> Float[Array, "b n d"]:
    """Tokens with the halted ones set to zero; a choice, not a product, because 0 * NaN is NaN."""
    return jnp.where(active[..., None], tokens, 0)


def advance(
    state: HaltingState,
    tokens: Float[Array, "b n d"],
    *,
    gate_scale: float,
    gate_center: float,
    halt_epsilon: float,
    is_last: Bool[Array, ""] | bool,
) -> tuple[HaltingState, Float[Array, "b n"]]:
    """One layer of the rule: the state after it, and the layer's halting scores.

    h = sigmoid(gate_scale * x[..., 0] - gate_center) for active tokens, 0 for halted ones; a token goes on while the
    sum of its h stays below 1 - halt_epsilon; every token stops at the last layer. The token of a layer weighs h where
    the token goes on, the remainder 1 - (sum of earlier h) where it stops.
    """
    active = state.active
    gate_input = jnp.where(active, tokens[..., 0], 0)
    halting_score = jnp.where(active, jax.nn.sigmoid(gate_scale * gate_input - gate_center), 0)
    effective = jnp.where(is_last, active.astype(halting_score.dtype), halting_score)
    cumulative = state.cumulative_halting + effective
    goes_on = active & (cumulative < 1 - halt_epsilon)
    stops = active & ~goes_on
    weight = jnp.where(goes_on, effective, jnp.where(stops, state.remainder, 0))
    num_special = state.output.shape[1]
    special = drop_halted(tokens[:, :num_special], active[:, :num_special])
    new_state = HaltingState(
        cumulative_halting=cumulative,
        remainder=jnp.where(goes_on, state.remainder - effective, state.remainder),
        active=goes_on,
        token_depth=state.token_depth + active,
        ponder_cost=state.ponder_cost + active + jnp.where(stops, state.remainder, 0),
        output=state.output + weight[:, :num_special, None] * special,
    )
    return new_state, halting_score
