"""The output of a model for a batch."""

import dataclasses
from typing import Any

import jax
import jax.export
from jaxtyping import Array, Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AViTOutput:
    """The output of a model for a batch; along N, the special tokens come first."""

    logits: Float[Array, "b c"]  # mean of the heads; with num_classes 0, the features that they would read
    head_logits: Float[Array, "heads b c"]  # class head, then distillation head
    token_depth: Int[Array, "b n"]  # layers that processed the token, 1..L
    ponder_cost: Float[Array, "b n"]  # layers + remainder
    halting_scores: Float[Array, "l b n"]  # 0 for a token that had halted


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GatedOutput(AViTOutput):
    """The output of a model with gates: also what each layer computed, 1 or 0.

    token_depth counts the layers in which a token was on and attention or MLP ran; that may be any of the layers.
    """

    token_gates: Float[Array, "l b n"]
    head_gates: Float[Array, "l b h"]
    sublayer_gates: Float[Array, "l b 2"]  # attention, MLP

    @property
    def computed(self) -> Float[Array, "l b"]:
        """Tokens of each image that each layer computes: those that are on, where attention or MLP runs."""
        return self.token_gates.sum(-1) * self.sublayer_gates.max(-1)


# Fields whose images are on the second axis.
IMAGES_SECOND = ("head_logits", "halting_scores", "token_gates", "head_gates", "sublayer_gates")


def _exportable(kind: type[AViTOutput]) -> None:
    """What jax.export needs for a program that returns this kind of output."""

    def from_children(aux_data: Any, children: Any) -> AViTOutput:
        # jax.export builds the output from shapes, which the type check of the constructor would refuse.
        output = object.__new__(kind)
        for field, child in zip(dataclasses.fields(kind), children, strict=True):
            object.__setattr__(output, field.name, child)
        return output

    jax.export.register_pytree_node_serialization(
        kind,
        serialized_name=f"avit_jax.{kind.__name__}",
        serialize_auxdata=lambda _: b"",
        deserialize_auxdata=lambda _: (),
        from_children=from_children,
    )


_exportable(AViTOutput)
_exportable(GatedOutput)
