"""The protocol of halting rules: after every layer, a rule decides which tokens of each image stop."""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from avit_jax.model.rule import Keys, Rule
from avit_jax.model.seen import WHOLE_LAYER, Seen


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

    def mapped(self, by_token: Callable[[Array], Array], by_image: Callable[[Array], Array]) -> "State":
        """The state with by_token(values) for what tokens have, and by_image(values) for what images have.

        An output of only the first tokens is the images': it stays in front when tokens move.
        """
        whole = self.output.shape[1] == self.active.shape[1]
        return State(
            active=by_token(self.active),
            token_depth=by_token(self.token_depth),
            output=(by_token if whole else by_image)(self.output),
            of_tokens={name: by_token(values) for name, values in self.of_tokens.items()},
            of_images={name: by_image(values) for name, values in self.of_images.items()},
        )


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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Teacher:
    """What the teacher of a run makes of a batch, for rules whose loss compares more than logits."""

    logits: Float[Array, "b k"]
    tokens: Float[Array, "b n d"]  # after its last layer and final LayerNorm


def first_state(batch: int, num_tokens: int, num_outputs: int, embed_dim: int) -> State:
    """The state before layer 1, without a rule's own fields: all tokens active, nothing accumulated."""
    return State(
        active=jnp.ones((batch, num_tokens), bool),
        token_depth=jnp.zeros((batch, num_tokens), jnp.int32),
        output=jnp.zeros((batch, num_outputs, embed_dim)),
    )


def drop_halted(tokens: Float[Array, "*b d"], active: Bool[Array, "*b"]) -> Float[Array, "*b d"]:
    """Tokens with the halted ones set to zero; not by a product, because 0 * NaN is NaN."""
    return jnp.where(active[..., None], tokens, 0)


def keep_last(state: State, seen: Seen, goes_on: Bool[Array, "b n"], own: dict[str, Array] | None = None) -> State:
    """The state after a layer under a rule that reads each token as it is when it stops, without weights over layers.

    goes_on: tokens for the next layer, a part of state.active. own: the rule's fields of images; None: unchanged.
    """
    assert seen.outputs is not None
    outputs = state.output.shape[1]
    return dataclasses.replace(
        state,
        active=goes_on,
        token_depth=state.token_depth + state.active,
        output=jnp.where(state.active[:, :outputs, None], seen.outputs, state.output),
        of_images=state.of_images if own is None else own,
    )


@runtime_checkable
class Halting(Rule, Protocol):
    """A rule under which each image keeps its own number of tokens: a frozen dataclass of settings, static in jit.

    A rule names this class as its base and inherits every member that it does not define.
    """

    masks_in_training: ClassVar[bool] = True  # False: training computes every token in every layer
    # Whether a key without mass is still visible to its own query: DynamicViT's masked training.
    self_visible: ClassVar[bool] = False
    advice: ClassVar[str] = "choose settings under which tokens halt earlier"  # if no token halts

    @property
    def reads_last_layer(self) -> bool:
        """Whether it needs all of the last layer, not just the tokens of the heads. Here: if it reads attention."""
        return bool(self.reads & WHOLE_LAYER)

    def check(self, config: Any) -> None:
        """Raises ValueError if the rule does not fit a model of this configuration. Here: it fits every model."""
        return None

    def initial(self, batch: int, config: Any, draw: Keys | None = None) -> State:
        """The state before layer 1 of a model with this configuration. draw: a random key for each image if `draws`."""
        return first_state(batch, config.num_tokens, config.num_outputs, config.embed_dim)

    @abc.abstractmethod
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

    def mass(self, state: State) -> Bool[Array, "b n"] | Float[Array, "b n"]:
        """The mass of each key in attention if tokens are masked. Here: active tokens, all the same."""
        return state.active

    def finish(self, state: State, images: Bool[Array, "b 1"]) -> State:
        """The state after these images stop early, because no token that the logits read is active in them."""
        return dataclasses.replace(state, active=state.active & ~images)

    def head_logits(self, state: State) -> Float[Array, "heads b k"] | None:
        """The logits of each head if the rule has them already; None if the model's heads read state.output."""
        return None

    def losses(
        self,
        trace: Trace,
        state: State,
        head_logits: Float[Array, "heads b k"],
        *,
        classify: Classify,
        settings: Any,
        image_weight: Float[Array, " b"] | None = None,
        teacher: Teacher | None = None,
    ) -> dict[str, Float[Array, ""]]:
        """Every term of the objective by name, weighted; their sum is minimised.

        trace: of all layers, stacked. state: after the last layer. classify: see Classify. settings: of the type
        loss_settings. image_weight: 0 for images that do not count. teacher: given if `teacher_tokens`.
        """
        return {"classification": classify(head_logits)}

    def extra_macs(self, config: Any, token_depth: Int[Array, "b n"]) -> Float[Array, " b"]:
        """Multiply-adds that the rule itself adds to each image."""
        return jnp.zeros(len(token_depth))
