"""What rules of both kinds have: their members, checks of their layers, and random keys for those that draw."""

import abc
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Protocol, Self, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from avit_jax.runtime.files import shown_value
from avit_jax.runtime.numbers import is_whole
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
        """The fields of Seen that the rule needs; a halting rule always has outputs, gate and active too."""
        return frozenset()

    @abc.abstractmethod
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


def plain_layers(rule: str, layers: Any, *, least: int = 0, some: bool = True) -> tuple[int, ...]:
    """The setting `layers` of a rule, counted from 0, as plain integers. some: whether there must be one.

    Raises ValueError, naming the rule, unless they are whole numbers from `least` in ascending order.
    """
    given = tuple(layers) if isinstance(layers, tuple | list) else (None,)
    whole = all(is_whole(layer, least) for layer in given)
    if not whole or list(given) != sorted(set(given)) or (some and not given):
        raise ValueError(
            f"{rule}'s layers are {shown_value(layers)}: give whole numbers from {least} in ascending order, such as "
            "(3, 6, 9)"
        )
    return tuple(map(int, given))


def check_layers(rule: str, layers: tuple[int, ...], depth: int, *, least: int = 0) -> None:
    """Raises ValueError if a rule names a layer that a model of this depth does not have. least: see plain_layers."""
    if layers and layers[-1] >= depth:
        fitting = tuple(sorted({max(depth * quarter // 4, least) for quarter in (1, 2, 3)}))
        raise ValueError(
            f"{rule}'s layers are {layers} and the model's last layer is {depth - 1}: give layers that the model has, "
            f"such as layers={fitting}"
        )


def check_class_attention(rule: str, config: Any) -> None:
    """Raises ValueError if a rule reads the attention of a class token and the model has none."""
    if not config.class_token:
        raise ValueError(
            f"{rule} reads the class token's attention and the model has no class token: choose another rule, such as "
            "RandomDrop or ToMe"
        )


def image_keys(images: Float[Array, "b h w c"]) -> Keys:
    """A random key for each image from its own pixels, so that it depends neither on the batch nor on the execution."""
    bits = jax.lax.bitcast_convert_type(images.astype(jnp.float32), jnp.uint32)
    bits = bits.reshape(len(images), math.prod(images.shape[1:]))
    # Two sums with odd factors that differ from pixel to pixel, modulo 2^32.
    place = jnp.arange(bits.shape[1], dtype=jnp.uint32)
    factors = jnp.stack([(2 * place + 1) * jnp.uint32(0x9E3779B1), (2 * place + 1) * jnp.uint32(0x85EBCA6B) ^ place])
    mixed = (bits ^ (bits >> 15))[:, None] * (factors | 1)
    sums = (mixed ^ (mixed >> 13)).sum(-1, dtype=jnp.uint32)
    return jax.random.wrap_key_data(sums, impl="threefry2x32")
