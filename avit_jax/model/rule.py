"""What rules of both kinds have, and the random keys that some of them draw from."""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Protocol, Self, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from avit_jax.runtime.settings import Settings

Keys = Key[Array, " b"]  # a random key for each image


@runtime_checkable
class Rule(Protocol):
    """A rule says what happens to tokens between two layers: a frozen dataclass of settings, static under jit.

    Rules name Halting or Reduction as their base and inherit every member that they do not define.
    """

    name: ClassVar[str]  # in config.json, and in front of the settings in "NAME(setting=value)"
    label: ClassVar[str]  # in tables
    sweeps: ClassVar[tuple[str, ...]] = ()  # settings that a sweep can change without training
    neutral: ClassVar[Mapping[str, Any] | None] = None  # settings under which nothing is saved; None: it is trained
    draws: ClassVar[bool] = False  # whether it needs a random key for each image
    loss_settings: ClassVar[type[Settings] | None] = None  # the keys of config.loss that the rule adds; None: no keys
    # Whether its loss compares tokens with the teacher's; in training, the state then has the last tokens as "normed".
    teacher_tokens: ClassVar[bool] = False

    @property
    def reads(self) -> frozenset[str]:
        """The fields of Seen that the rule needs; a halting rule always has tokens and active too."""
        return frozenset()

    def describe(self) -> str:
        """The rule and its settings in a few words, for messages and tables."""
        ...

    def module(self, model: Any) -> Any:
        """The rule's own parameters, an nnx.Module made from an AViT's norm and heads; None if there are none.

        The model keeps it as model.rule_module.
        """
        return None

    def levels(self, model: Any, images: Float[Array | np.ndarray, "b h w c"]) -> Callable[[float], Self]:
        """The rule by how much work it leaves: a function from 0 (as little as it can) to 1 (all of it).

        Between them the work must not fall as the level rises. model: with the weights for which the setting is wanted.
        images: normalised, for rules whose settings depend on what the model computes. Raises ValueError if work
        cannot be chosen without training.
        """
        raise ValueError(f"the rule {self.name} has no setting that changes its work without training")


def image_keys(images: Float[Array, "b h w c"]) -> Keys:
    """A random key for each image from its own pixels, so that it depends neither on the batch nor on the execution."""
    bits = jax.lax.bitcast_convert_type(images.astype(jnp.float32), jnp.uint32).reshape(len(images), -1)
    # Two sums with odd factors that differ from pixel to pixel, modulo 2^32.
    place = jnp.arange(bits.shape[1], dtype=jnp.uint32)
    factors = jnp.stack([(2 * place + 1) * jnp.uint32(0x9E3779B1), (2 * place + 1) * jnp.uint32(0x85EBCA6B) ^ place])
    mixed = (bits ^ (bits >> 15))[:, None] * (factors | 1)
    sums = (mixed ^ (mixed >> 13)).sum(-1, dtype=jnp.uint32)
    return jax.random.wrap_key_data(sums, impl="threefry2x32")
