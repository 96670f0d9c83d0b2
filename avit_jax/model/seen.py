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

    A halting rule looks after the block, a reduction rule between attention and MLP. Special tokens come first.
    """

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


Facts = dict[str, Shaped[Array, "b ..."]]
