"""What a halting rule is: it says after every layer which tokens of each image stop."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from avit_jax.model.seen import Seen


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """What is remembered between two layers; N counts the special tokens first.

    A rule keeps its own fields in of_tokens and of_images, so that an execution can reorder tokens and images without
    knowing the rule.
    """

    active: Bool[Array, "b n"]  # True while the token is computed
    token_depth: Int[Array, "b n"]  # layers that processed the token
    output: Float[Array, "b s d"]  # final values so far, of the first s tokens only: those that the heads read
    of_tokens: dict[str, Shaped[Array, "b n ..."]] = dataclasses.field(default_factory=dict)
    of_images: dict[str, Shaped[Array, "b ..."]] = dataclasses.field(default_factory=dict)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Trace:
    """What one layer leaves for the losses and for the output; lax.scan stacks the layers on a first axis."""

    of_tokens: dict[str, Shaped[Array, "*l b n"]] = dataclasses.field(default_factory=dict)
    of_images: dict[str, Shaped[Array, "*l b ..."]] = dataclasses.field(default_factory=dict)


def first_state(batch: int, num_tokens: int, num_outputs: int, embed_dim: int) -> State:
    """The state before layer 1, without fields of a rule: all tokens active, nothing accumulated."""
    return State(
        active=jnp.ones((batch, num_tokens), bool),
        token_depth=jnp.zeros((batch, num_tokens), jnp.int32),
        output=jnp.zeros((batch, num_outputs, embed_dim)),
    )


def drop_halted(tokens: Float[Array, "b n d"], active: Bool[Array, "b n"]) -> Float[Array, "b n d"]:
    """Tokens with the halted ones set to zero; a choice, not a product, because 0 * NaN is NaN."""
    return jnp.where(active[..., None], tokens, 0)


class Halting(Protocol):
    """A rule by which every image keeps its own number of tokens: a frozen dataclass of settings, static under jit."""

    name: ClassVar[str]  # in config.json
    reads: frozenset[str]  # the fields of Seen that it wants
    masks_in_training: bool  # False: training computes every token in every layer
    sweeps: ClassVar[tuple[str, ...]]  # its settings that may change at test time

    def initial(self, batch: int, config: Any, draw: Any = None) -> State:
        """The state before layer 1 of a model with this configuration; draw: a random key for each image, or None."""
        ...

    def advance(
        self, state: State, seen: Seen, *, layer: Int[Array, ""] | int, is_last: Bool[Array, ""] | bool
    ) -> tuple[State, Trace]:
        """The state after a layer (from 0), and what it leaves for the losses."""
        ...

    def finish(self, state: State, images: Bool[Array, "b 1"]) -> State:
        """The state where these images stop now: nothing that the logits read is left in them."""
        ...

    def losses(
        self, trace: Trace, state: State, settings: Any, image_weight: Float[Array, " b"] | None
    ) -> Mapping[str, Float[Array, ""]]:
        """The rule's own terms of the objective by name, weighted."""
        ...
