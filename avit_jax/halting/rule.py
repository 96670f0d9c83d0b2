"""The protocol of halting rules: after every layer, a rule decides which tokens of each image stop."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from avit_jax.model.seen import Seen
from avit_jax.runtime.settings import Settings


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """What is kept between two layers; along N, the special tokens come first.

    A rule keeps its own fields in of_tokens and of_images, so that an execution can reorder tokens and images without
    knowing the rule. If there is a "ponder_cost" in of_tokens, it becomes AViTOutput.ponder_cost.
    """

    active: Bool[Array, "b n"]  # True while the token is computed
    token_depth: Int[Array, "b n"]  # layers that processed the token
    output: Float[Array, "b s d"]  # final values so far, only of the first s tokens, which the heads read
    of_tokens: dict[str, Shaped[Array, "b n ..."]] = dataclasses.field(default_factory=dict)
    of_images: dict[str, Shaped[Array, "b ..."]] = dataclasses.field(default_factory=dict)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Trace:
    """What one layer records for the losses and the output; lax.scan stacks the layers along a first axis.

    If there is a "halting_score" in of_tokens, it becomes AViTOutput.halting_scores.
    """

    of_tokens: dict[str, Shaped[Array, "*l b n"]] = dataclasses.field(default_factory=dict)
    of_images: dict[str, Shaped[Array, "..."]] = dataclasses.field(default_factory=dict)  # [b ...], stacked [l b ...]


# classify(head_logits [heads b k], share=None): the mean classification loss of logits against the batch's targets,
# distillation included. share: [b], a factor for the loss of each image; PonderNet's is the probability of a layer.
Classify = Callable[..., Float[Array, ""]]


def first_state(batch: int, num_tokens: int, num_outputs: int, embed_dim: int) -> State:
    """The state before layer 1, without a rule's own fields: all tokens active, nothing accumulated."""
    return State(
        active=jnp.ones((batch, num_tokens), bool),
        token_depth=jnp.zeros((batch, num_tokens), jnp.int32),
        output=jnp.zeros((batch, num_outputs, embed_dim)),
    )


def drop_halted(tokens: Float[Array, "b n d"], active: Bool[Array, "b n"]) -> Float[Array, "b n d"]:
    """Tokens with the halted ones set to zero; not by a product, because 0 * NaN is NaN."""
    return jnp.where(active[..., None], tokens, 0)


@runtime_checkable
class Halting(Protocol):
    """A rule under which each image keeps its own number of tokens: a frozen dataclass of settings, static in jit."""

    name: ClassVar[str]  # in config.json, and in front of the settings in "NAME(setting=value)"
    label: ClassVar[str]  # in tables
    masks_in_training: ClassVar[bool]  # False: training computes every token in every layer
    sweeps: ClassVar[tuple[str, ...]]  # settings that a sweep can change without training
    advice: ClassVar[str]  # what to do if no token halts
    loss_settings: ClassVar[type[Settings] | None]  # the keys of config.loss that the rule adds; None: no keys
    learning_rate_factors: ClassVar[Mapping[str, float]]  # the factor for each part of a parameter's path

    @property
    def reads(self) -> frozenset[str]:
        """The fields of Seen that the rule needs in addition to tokens and active."""
        ...

    def describe(self) -> str:
        """The rule and its settings in a few words, for messages and tables."""
        ...

    def check(self, config: Any) -> None:
        """Raises ValueError if the rule does not fit a model of this configuration."""
        ...

    def module(self, model: Any) -> Any:
        """The rule's own parameters, an nnx.Module made from an AViT's norm and heads; None if there are none.

        The model keeps it as model.rule_module.
        """
        ...

    def initial(self, batch: int, config: Any, draw: Any = None) -> State:
        """The state before layer 1 of a model with this configuration; draw: a random key for each image, or None."""
        ...

    def advance(
        self,
        state: State,
        seen: Seen,
        *,
        layer: Int[Array, ""] | int,
        is_last: Bool[Array, ""] | bool,
        module: Any = None,
    ) -> tuple[State, Trace]:
        """The state after a layer, and what the layer records for losses and output.

        seen: what the rule reads of the layer. layer: counted from 0. module: the rule's own parameters.
        """
        ...

    def finish(self, state: State, images: Bool[Array, "b 1"]) -> State:
        """The state after these images stop early, because no token that the logits read is active in them."""
        ...

    def head_logits(self, state: State) -> Float[Array, "heads b k"] | None:
        """The logits of each head if the rule has them already; None if the model's heads read state.output."""
        ...

    def losses(
        self,
        trace: Trace,
        state: State,
        head_logits: Float[Array, "heads b k"],
        *,
        classify: Classify,
        settings: Any,
        image_weight: Float[Array, " b"] | None = None,
    ) -> dict[str, Float[Array, ""]]:
        """Every term of the objective by name, weighted; their sum is minimised.

        trace: of all layers, stacked. state: after the last layer. classify: see Classify. settings: of the type
        loss_settings. image_weight: 0 for images that do not count.
        """
        ...

    def extra_macs(self, config: Any, token_depth: Int[Array, "b n"]) -> Float[Array, " b"]:
        """Multiply-adds that the rule itself adds to each image."""
        ...
