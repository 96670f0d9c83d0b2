"""The protocol of reduction rules: which tokens of a layer merge and which are dropped; and the sum that does it.

Groups can describe every rule with a fixed number of tokens that we know of:

- top-k and random drop: the kept tokens lead, none join, the others are dropped; weights are 1.
- EViT: as top-k, with one more slot: a dropped token leads it and the other dropped tokens join it, weighted by their
  class attention; `mean` is False.
- ToMe, PiToMe: every slot has a leader, r tokens join; weights are sizes, `mean` is True.
- MCTF: r1 even and r2 odd tokens join. If an odd token that others join itself joins an even one, all of them go into
  the slot of the even one. Weights are size times received attention. The place is before the values: the same groups
  also reduce the attention matrix, queries by their weighted mean and keys by their sum.
- DynamicViT at inference: as top-k, decided before the layer.
- DiffRate: the first M of the sorted tokens lead, P - M join, the others are dropped; weights are 1, `mean` is True;
  sizes are the rule's own.
"""

import abc
import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from avit_jax.halting.rule import Halting
from avit_jax.model.rule import Keys, Rule
from avit_jax.model.seen import Seen


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Groups:
    """How n tokens become k: slot j of the shorter sequence is the weighted sum of the tokens that go into it.

    Every slot has one token that leads it. The other tokens of the slot join it; `joins` lists them, so that the sum
    costs little if few tokens join. Tokens that go into no slot are dropped. `mean` divides the sum by the sum of its
    weights.
    """

    into: Int[Array, "b n"]  # each token's slot; k: dropped
    weight: Float[Array, "b n"]
    leader: Int[Array, "b k"]  # the token that leads each slot
    joins: Int[Array, "b r"]  # the tokens that go into a slot that another token leads
    size: Float[Array, "b k"]  # patches that each slot stands for
    mean: bool = dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pass:
    """What a pass of training ends with, for rules whose loss compares two of them."""

    head_logits: Float[Array, "heads b k"]
    features: Float[Array, "heads b f"]  # what each head reads, such as the class token after the final LayerNorm


Place = Literal["before the layer", "before the values", "before the MLP"]


@runtime_checkable
class Reduction(Rule, Protocol):
    """A rule under which all images have the same number of tokens, known for each layer: a dataclass of settings.

    It is static under jit, so it must be frozen and hashable. Special tokens (class, distillation, registers) come
    first before and after every reduction, and no rule drops or merges them. A rule names this class as its base and
    inherits every member that it does not define.
    """

    # Where in a layer tokens are reduced. Before the values: the queries and keys of all tokens give the attention that
    # `groups` sees; then tokens and attention are reduced, and the values are those of the shorter sequence (MCTF).
    place: ClassVar[Place] = "before the MLP"
    by_cell: ClassVar[bool] = False  # whether patches have settings of their own, by their cell of the grid

    @property
    def proportional(self) -> bool:
        """Whether attention weights each key by its size."""
        return False

    @abc.abstractmethod
    def counts(self, config: Any) -> tuple[int, ...]:
        """Tokens after each layer of a model with this configuration, special ones included.

        Raises ValueError if the rule does not fit the model.
        """
        ...

    def acts_in(self, config: Any) -> tuple[int, ...]:
        """The layers that reduce tokens, from 0. Here: those after which there are fewer than before."""
        counts = self.counts(config)
        return tuple(layer for layer, before in enumerate((config.num_tokens, *counts[:-1])) if counts[layer] < before)

    @abc.abstractmethod
    def groups(
        self, seen: Seen, *, layer: int, num_special: int, draw: Keys | None = None, module: Any = None
    ) -> Groups | None:
        """How the tokens of a layer are reduced; None: not at all. Called only for the layers that `acts_in` names.

        layer: counted from 0. num_special: the first tokens, which are never dropped or merged. draw: a random key for
        each image if `draws`, another one in every layer. module: the rule's own parameters.
        """
        ...

    def in_training(self, config: Any) -> Halting | None:
        """The halting rule that training runs instead, with masks; None: training drops and merges tokens too."""
        return None

    def second_pass(self, config: Any, settings: Any) -> "SecondPass | None":
        """The second pass of a training step, if the loss compares two of them. Here: none.

        settings: of the type loss_settings. A rule with a second pass must leave `in_training` as it is.
        """
        return None

    def extra_macs(self, config: Any) -> int:
        """Multiply-adds for one image that the rule adds and that papers count, such as predictors."""
        return 0

    def matching_macs(self, config: Any) -> tuple[int, ...]:
        """Multiply-adds of each layer's choice for one image, such as ToMe's matching; papers leave them out."""
        return (0,) * config.depth


@dataclasses.dataclass(frozen=True)
class SecondPass:
    """A second pass over each batch of training, with the same weights and one of these rules, drawn by chance.

    losses: every term of the objective by name, weighted, from the pass under the model's own rule and the second one:
    (first, second, *, labels, classify, image_weight), as for `Halting.losses`. labels: [b], those of the images.
    """

    rules: tuple[Reduction, ...]
    losses: Callable[..., dict[str, Float[Array, ""]]]


def reduce(x: Float[Array, "b n d"], groups: Groups) -> Float[Array, "b k d"]:
    """The shorter sequence: per slot the sum of weight * x, divided by the sum of the weights if groups.mean.

    Leaders are gathered, and the tokens that join them are added by a small product with a one-hot matrix [k, r]. The
    gradient is a gather too: token n gets the gradient of its slot. (The gradient that JAX derives for a gather is a
    scatter, which is slow everywhere.)
    """
    return _segment_sum(groups.mean, x, groups.weight, groups.into, groups.leader, groups.joins)


def spread(x: Float[Array, "b k d"], groups: Groups) -> Float[Array, "b n d"]:
    """The longer sequence: each token with the value of its slot, and 0 for dropped ones. The inverse of a reduction.

    Its gradient is the sum over each slot, without weights.
    """
    return _spread(x, jnp.ones_like(groups.weight), groups.into, groups.leader, groups.joins)


@jax.custom_vjp
def _spread(x: Array, ones: Array, into: Array, leader: Array, joins: Array) -> Array:
    slot = jnp.minimum(into, x.shape[1] - 1)[..., None]
    return jnp.where((into < x.shape[1])[..., None], jnp.take_along_axis(x, slot, axis=1), 0)


def _spread_forward(x: Array, *groups: Array) -> tuple[Array, tuple[Array, ...]]:
    return _spread(x, *groups), groups


def _spread_backward(groups: tuple[Array, ...], gradient: Array) -> tuple[Array | None, ...]:
    return _sum_and_total(False, gradient, *groups)[0].astype(gradient.dtype), None, None, None, None


_spread.defvjp(_spread_forward, _spread_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _segment_sum(mean: bool, x: Array, weight: Array, into: Array, leader: Array, joins: Array) -> Array:
    return _sum_and_total(mean, x, weight, into, leader, joins)[0]


def _sum_and_total(
    mean: bool, x: Array, weight: Array, into: Array, leader: Array, joins: Array
) -> tuple[Array, Array | None]:
    result = jnp.take_along_axis(x, leader[..., None], axis=1) * jnp.take_along_axis(weight, leader, axis=1)[..., None]
    if joins.shape[1]:
        weights = _joining_weights(weight, into, leader, joins)
        joining = jnp.take_along_axis(x, joins[..., None], axis=1)
        # At default precision, accelerators would round the residual stream.
        result += jnp.matmul(weights, joining, precision=jax.lax.Precision.HIGHEST)
    if not mean:
        return result, None
    total = group_sums(weight, into, leader, joins)
    return result / total[..., None], total


def group_sums(
    values: Float[Array, "b n"], into: Int[Array, "b n"], leader: Int[Array, "b k"], joins: Int[Array, "b r"]
) -> Float[Array, "b k"]:
    """The sum over each slot's tokens of one value per token; the other arguments are fields of Groups."""
    return jnp.take_along_axis(values, leader, axis=1) + _joining_weights(values, into, leader, joins).sum(-1)


def _joining_weights(weight: Array, into: Array, leader: Array, joins: Array) -> Float[Array, "b k r"]:
    """The weight of each joining token, in the row of its slot; 0 elsewhere."""
    slot, share = jnp.take_along_axis(into, joins, axis=1), jnp.take_along_axis(weight, joins, axis=1)
    return jnp.where(jnp.arange(leader.shape[1])[None, :, None] == slot[:, None], share[:, None], 0)


def _forward(mean: bool, x: Array, weight: Array, into: Array, leader: Array, joins: Array) -> tuple[Array, Any]:
    result, total = _sum_and_total(mean, x, weight, into, leader, joins)
    return result, (x, weight, into, result if mean else None, total)


def _backward(mean: bool, saved: Any, gradient: Array) -> tuple[Array | None, ...]:
    x, weight, into, result, total = saved
    if mean:
        gradient = gradient / total[..., None]
    count = gradient.shape[1]
    slot = jnp.minimum(into, count - 1)[..., None]
    own = jnp.where((into < count)[..., None], jnp.take_along_axis(gradient, slot, axis=1), 0)
    offset = x - jnp.take_along_axis(result, slot, axis=1) if mean else x
    return weight[..., None] * own, (offset * own).sum(-1), None, None, None


_segment_sum.defvjp(_forward, _backward)
