"""What a rule can see of a layer."""

import dataclasses

import jax
from jaxtyping import Array, Bool, Float, Shaped

# Fields of Seen that attention computes, for a rule whose `reads` names them.
FROM_ATTENTION = frozenset({"class_attention", "attention_received", "key_mean", "value_norm"})
# Fields of Seen that exist only if a layer computes all its tokens, not just those that the heads read.
WHOLE_LAYER = FROM_ATTENTION | {"before"}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Seen:
    """One layer as a rule sees it. A block computes only what the rule's `reads` names; the rest is None.

    A halting rule looks after the block, and always has outputs, gate and active. A reduction rule looks between
    attention and MLP. Special tokens come first.
    """

    outputs: Float[Array, "b s d"] | None = None  # of the tokens after the block, the first s, which the heads read
    gate: Float[Array, "b n"] | None = None  # channel 0 of the tokens after the block
    tokens: Float[Array, "b n d"] | None = None  # after the block, or between attention and MLP
    before: Float[Array, "b n d"] | None = None  # as they entered the block
    class_attention: Float[Array, "b n"] | None = None  # attention from class (and distillation) token; mean over heads
    attention_received: Float[Array, "b n"] | None = None  # mean over heads and queries
    key_mean: Float[Array, "b n c"] | None = None  # mean of the keys over heads
    value_norm: Float[Array, "b n"] | None = None  # length of the values of all heads as one vector
    logits: Float[Array, "heads b k"] | None = None  # of each head, for this layer's tokens
    size: Float[Array, "b n"] | None = None  # patches a token stands for
    active: Bool[Array, "b n"] | None = None  # the tokens that this layer computed


def of_attention(reads: frozenset[str]) -> frozenset[str]:
    """The part of `reads` that attention has to compute."""
    return reads & FROM_ATTENTION


def of_tokens(tokens: Float[Array, "b n d"], outputs: int) -> "Facts":
    """What a halting rule may see of all tokens after a block. outputs: the first tokens, which the heads read."""
    return {"tokens": tokens, "outputs": tokens[:, :outputs], "gate": tokens[..., 0]}


Facts = dict[str, Shaped[Array, "b ..."]]
