"""Patches dropped at random, as a control for rules that choose: in some layers, or before the first one."""

import dataclasses
from typing import ClassVar

import jax
from jaxtyping import Array, Float

from avit_jax.model.rule import Keys
from avit_jax.model.seen import Seen
from avit_jax.reduction.groups import Place
from avit_jax.reduction.topk import TopK
from avit_jax.runtime.files import shown_value
from avit_jax.runtime.numbers import is_whole


@dataclasses.dataclass(frozen=True)
class RandomDrop(TopK):
    """TopK with uniform random numbers for class attention: what it is worth to choose.

    At inference the numbers follow from the image's pixels, the layer and `seed`, so an image has the same draw in
    every batch. The mean over several seeds is the mean over draws.

    Raises ValueError unless seed is a whole number from 0 and below 2^31, and as TopK does.
    """

    seed: int = 0

    name: ClassVar[str] = "random"
    label: ClassVar[str] = "random drop"
    reads: ClassVar[frozenset[str]] = frozenset({"size"})
    draws: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_whole(self.seed, 0):
            raise ValueError(
                f"RandomDrop's seed is {shown_value(self.seed)}: give a whole number from 0 and below 2^31"
            )
        object.__setattr__(self, "seed", int(self.seed))

    def _scores(self, seen: Seen, draw: Keys | None) -> Float[Array, "b n"]:
        if draw is None:
            raise ValueError("RandomDrop needs a random key for each image: pass draw")
        assert seen.size is not None
        tokens = seen.size.shape[1]
        return jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, self.seed), (tokens,)))(draw)


@dataclasses.dataclass(frozen=True)
class RandomPatches(RandomDrop):
    """Only a random part of the patches of the grid enters the first layer: what a model can do with fewer tokens.

    It is random_views with the law "grid" and one view, as a rule, so that it can be compared with others. The patches
    are drawn as RandomDrop does, ceil(keep_rate * n) of n.

    Raises ValueError for layers other than (0,), and as RandomDrop does.
    """

    layers: tuple[int, ...] = (0,)

    name: ClassVar[str] = "patches"
    label: ClassVar[str] = "fewer random patches"
    place: ClassVar[Place] = "before the layer"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers != (0,):
            raise ValueError(f"RandomPatches' layers are {self.layers}: leave them out, it acts before layer 0 alone")
