"""What a reduction rule is: it says in every layer which tokens become one, or are dropped."""

import dataclasses
from typing import Any, ClassVar, Protocol, runtime_checkable

import jax
from jaxtyping import Array, Float, Int

from avit_jax.model.seen import Seen


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Groups:
    """How n tokens become k: slot j of the shorter sequence is a sum over the tokens that go into it.

    `mean` divides that sum by the sum of its weights.
    """

    into: Int[Array, "b n"]  # slot in the shorter sequence; k: nowhere
    weight: Float[Array, "b n"]
    size: Float[Array, "b k"]  # patches that each slot stands for
    leader: Int[Array, "b k"]  # the old token whose place the slot takes
    mean: bool = dataclasses.field(metadata={"static": True})


@runtime_checkable
class Reduction(Protocol):
    """A rule by which every image has the same number of tokens, known per layer: a frozen dataclass of settings."""

    name: ClassVar[str]  # in config.json
    reads: ClassVar[frozenset[str]]  # the fields of Seen that it wants
    proportional: bool  # whether attention weighs a key by its size
    ahead: bool  # whether tokens are reduced before the block's values exist (MCTF)
    sweeps: ClassVar[tuple[str, ...]]  # its settings that may change at test time

    def counts(self, config: Any) -> tuple[int, ...]:
        """Tokens after each layer of a model with this configuration, special ones included."""
        ...

    def groups(self, seen: Seen, *, layer: int, draw: Any = None) -> Groups | None:
        """How the tokens of a layer (from 0) are reduced; None: not at all."""
        ...
