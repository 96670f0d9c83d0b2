"""Where tokens lie between the stages of planned execution, and how they move; gradients move back the same way."""

import dataclasses
import itertools
import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

from avit_jax.halting.rule import State


@dataclasses.dataclass(frozen=True)
class Layout:
    """The places of tokens: for each group of images in turn, image by image, `capacities[group]` places.

    An array has an axis for all places. If there is one group, it has an axis for images and one for the places of each
    instead: cutting the one into the other moves every number on a TPU.
    """

    images: tuple[int, ...]  # of each group
    capacities: tuple[int, ...]

    @classmethod
    def of(cls, group_size: int, capacities: Sequence[int]) -> "Layout":
        """Groups of one size; neighbours with the same capacity are one group, which is one program less to compile."""
        runs = [(capacity, len(list(run))) for capacity, run in itertools.groupby(capacities)]
        return cls(tuple(group_size * length for _, length in runs), tuple(capacity for capacity, _ in runs))

    @property
    def sizes(self) -> tuple[int, ...]:
        """Places of each group."""
        return tuple(map(operator.mul, self.images, self.capacities))

    def of_rows(self) -> tuple[Int[np.ndarray, " b"], Int[np.ndarray, " b"]]:
        """For each image, in the order of the layout: its first place, and its number of places."""
        capacities = np.repeat(self.capacities, self.images)
        return np.concatenate([[0], np.cumsum(capacities)[:-1]]), capacities

    def groups(self, values: Any) -> list[Any]:
        """The values of each group's images, from arrays with one for each image."""
        ends = np.cumsum(self.images).tolist()
        return [
            jax.tree.map(lambda v, first=end - count, end=end: v[first:end], values)
            for end, count in zip(ends, self.images, strict=True)
        ]

    def of_tokens(self, values: Shaped[Array, "b n ..."]) -> Shaped[Array, "..."]:
        """The values of the places, from one for each token of each image."""
        return self.joined(self.cut(values))

    def cut(self, values: Shaped[Array, "b n ..."]) -> list[Shaped[Array, "_ _ ..."]]:
        """The values of each group's places, from one for each token of each image."""
        return [part[:, :places] for part, places in zip(self.groups(values), self.capacities, strict=True)]

    def slots(self, parts: Sequence[Shaped[Array, "_ _ ..."]], width: int) -> Shaped[Array, "b w ..."]:
        """The first `width` tokens of each image, from the values of each group's places; zeros where there is none."""
        return jnp.concatenate([_widened(part, width) for part in parts])

    def first(self, values: Shaped[Array, "..."], width: int) -> Shaped[Array, "b w ..."]:
        """The first `width` tokens of each image, from the values of all places; zeros for an image without a place.

        Every other image has `width` places or more.
        """
        if len(self.images) == 1:
            return values[:, :width]
        first, capacities = self.of_rows()
        some = first[capacities > 0]
        # One row for each token: a TPU would cut whole groups and then take their first tokens.
        found = values[(some[:, None] + np.arange(width)).reshape(-1)].reshape(len(some), width, *values.shape[1:])
        return jnp.concatenate([jnp.zeros((len(first) - len(some), *found.shape[1:]), found.dtype), found])

    def joined(self, parts: list[Shaped[Array, "_ _ ..."]]) -> Shaped[Array, "..."]:
        """The inverse of `split`."""
        return parts[0] if len(parts) == 1 else jnp.concatenate([part.reshape(-1, *part.shape[2:]) for part in parts])

    def split(self, values: Shaped[Array, "..."]) -> list[Shaped[Array, "_ _ ..."]]:
        """The values of each group, image by image. (lax.split, because the gradient of slices is a sum of arrays.)"""
        if len(self.images) == 1:
            return [values]
        parts = jax.lax.split(values, self.sizes)
        return [
            part.reshape(count, capacity, *part.shape[1:])
            for part, count, capacity in zip(parts, self.images, self.capacities, strict=True)
        ]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Move:
    """A new order of images, and of the tokens in each, with its inverse."""

    rows: Int[Array, " b"]  # the old row of each new one
    slots: Int[Array, "b n"]  # the old slot of each new one, for each new row
    old_rows: Int[Array, " b"]  # the new row of each old one
    old_slots: Int[Array, "b n"]  # the new slot of each old one, for each new row

    @classmethod
    def packing(cls, needed: Bool[Array, "b n"]) -> "Move":
        """Images by rising number of needed tokens, and in each image the needed tokens first, in order."""
        rows = jnp.argsort(needed.sum(1))
        needed = needed[rows]
        # Where each token goes: the number of needed ones before it, or all of them and the others before it.
        count = needed.sum(1, keepdims=True)
        places = jnp.where(needed, jnp.cumsum(needed, 1) - 1, count + jnp.cumsum(~needed, 1) - 1)
        return cls(rows, needed_first(needed), jnp.argsort(rows), places)

    def apply(self, values: Shaped[Array, "b n ..."]) -> Shaped[Array, "b n ..."]:
        """One value for each token, moved."""
        return _permuted(values, self.rows, self.slots, self.old_rows, self.old_slots)

    def apply_rows(self, values: Shaped[Array, "b ..."]) -> Shaped[Array, "b ..."]:
        """One value for each image, moved."""
        return _rows_permuted(values, self.rows, self.old_rows)

    def state(self, state: State) -> State:
        """The state, moved."""
        return state.mapped(self.apply, self.apply_rows)

    def tokens(self, x: Float[Array, "*t d"], before: Layout, after: Layout) -> Float[Array, "*u d"]:
        """The tokens of a layout in the next one; places that no token takes are zero."""
        first, capacity = map(jnp.asarray, before.of_rows())
        new_first, new_capacity = map(jnp.asarray, after.of_rows())
        forth = after.of_tokens(first[self.rows][:, None] + self.slots)
        there = after.of_tokens(self.slots < capacity[self.rows][:, None])
        back_rows = self.old_slots[self.old_rows]  # for each old row
        back = before.of_tokens(new_first[self.old_rows][:, None] + back_rows)
        stays = before.of_tokens(back_rows < new_capacity[self.old_rows][:, None])
        return _moved(x, jnp.where(there, forth, 0), there, jnp.where(stays, back, 0), stays)


def needed_first(needed: Bool[Array, "b n"]) -> Int[Array, "b n"]:
    """The slots of each image, the needed ones first, each part in its order."""
    slots = jnp.arange(needed.shape[1])
    # What a stable argsort of ~needed gives, six times as fast on a CPU.
    return jnp.sort(jnp.where(needed, slots, slots + len(slots)), axis=1) % len(slots)


@jax.custom_vjp
def _moved(x: Array, forth: Array, there: Array, back: Array, stays: Array) -> Array:
    return jnp.where(there[..., None], x.reshape(-1, x.shape[-1])[forth], 0)


def _moved_forward(x: Array, *where: Array) -> tuple[Array, Any]:
    return _moved(x, *where), where


def _moved_backward(where: Any, gradient: Array) -> tuple[Array | None, ...]:
    # A gather again: the gradient that JAX derives is a scatter, which is slow everywhere.
    _, _, back, stays = where
    flat = gradient.reshape(-1, gradient.shape[-1])
    return jnp.where(stays[..., None], flat[back], 0), None, None, None, None


_moved.defvjp(_moved_forward, _moved_backward)


def _widened(values: Shaped[Array, "b n ..."], width: int) -> Shaped[Array, "b w ..."]:
    return jnp.pad(values, ((0, 0), (0, width - values.shape[1]), *[(0, 0)] * (values.ndim - 2)))


def gathered(values: Shaped[Array, "b n ..."], slots: Int[Array, "b n"]) -> Shaped[Array, "b n ..."]:
    """values[i, slots[i, j]] for all i and j."""
    return jnp.take_along_axis(values, slots.reshape(*slots.shape, *[1] * (values.ndim - 2)), axis=1)


def sorted_by(values: Shaped[Array, "b n"], inverse: Int[Array, "b n"]) -> Shaped[Array, "b n"]:
    """The same, from the inverse of each row of slots."""
    return jax.lax.sort((inverse, values), dimension=1, num_keys=1, is_stable=False)[1]


def _along(values: Array, slots: Array, inverse: Array) -> Array:
    if values.ndim > 2:
        return gathered(values, slots)
    # A TPU gathers single numbers one after the other, and sorts them a hundred times faster.
    return jax.lax.platform_dependent(
        values,
        slots,
        inverse,
        tpu=lambda values, _, inverse: sorted_by(values, inverse),
        default=lambda values, slots, _: gathered(values, slots),
    )


@jax.custom_vjp
def _permuted(values: Array, rows: Array, slots: Array, old_rows: Array, old_slots: Array) -> Array:
    return _along(values[rows], slots, old_slots)


def _permuted_forward(values: Array, *where: Array) -> tuple[Array, Any]:
    return _permuted(values, *where), where


def _permuted_backward(where: Any, gradient: Array) -> tuple[Array | None, ...]:
    _, slots, old_rows, old_slots = where
    return _along(gradient, old_slots, slots)[old_rows], None, None, None, None


_permuted.defvjp(_permuted_forward, _permuted_backward)


@jax.custom_vjp
def _rows_permuted(values: Array, rows: Array, old_rows: Array) -> Array:
    return values[rows]


def _rows_permuted_forward(values: Array, rows: Array, old_rows: Array) -> tuple[Array, Array]:
    return values[rows], old_rows


def _rows_permuted_backward(old_rows: Array, gradient: Array) -> tuple[Array | None, ...]:
    return gradient[old_rows], None, None


_rows_permuted.defvjp(_rows_permuted_forward, _rows_permuted_backward)
