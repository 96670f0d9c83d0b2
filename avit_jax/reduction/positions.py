"""Depth by position: every patch stops after a layer that is the same in all images, as a control for halting rules."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from avit_jax.model.rule import Keys
from avit_jax.model.seen import Seen
from avit_jax.reduction.groups import Groups, Place, Reduction
from avit_jax.runtime.files import shown_value
from avit_jax.runtime.numbers import is_real

_MOST = 1e6  # layers


@dataclasses.dataclass(frozen=True)
class PositionDepths(Reduction):
    """Patch n runs through round(clip(depths[n] + shift, 1, L)) of the model's L layers, the same in every image.

    Special tokens run through all layers. A patch of depth d takes part in layers 1 to d as a whole, as under a halting
    rule; layer d + 1 no longer has it. With the depths of a halting rule (`position_depths`), both rules do about the
    same mean work, and their difference in accuracy is what it is worth to look at the image. No parameters.

    depths: in layers, one number for each patch, row by row, or a single number; halves are rounded to the even whole
    number. shift: layers added to all of them, to change the work.

    Raises ValueError unless depths are numbers from 0 to 10^6 and shift is a number from -10^6 to 10^6.
    """

    depths: float | tuple[float, ...]
    shift: float = 0.0

    name: ClassVar[str] = "positions"
    label: ClassVar[str] = "positions"
    sweeps: ClassVar[tuple[str, ...]] = ("shift",)
    neutral: ClassVar[Mapping[str, Any] | None] = {"depths": _MOST}  # clipped to the model's layers
    reads: ClassVar[frozenset[str]] = frozenset({"size"})
    place: ClassVar[Place] = "before the layer"
    by_cell: ClassVar[bool] = True

    def __post_init__(self) -> None:
        depths: Any = tuple(self.depths) if isinstance(self.depths, list) else self.depths  # from JSON
        for depth in depths if isinstance(depths, tuple) and depths else (depths,):
            if not is_real(depth, 0, _MOST):
                raise ValueError(
                    f"PositionDepths has a depth of {shown_value(depth)}: give a number from 0 to 10^6, or one for "
                    "each patch"
                )
        if not is_real(self.shift, -_MOST, _MOST):
            raise ValueError(f"PositionDepths' shift is {shown_value(self.shift)}: give a number from -10^6 to 10^6")
        plain = tuple(map(float, depths)) if isinstance(depths, tuple) else float(depths)
        object.__setattr__(self, "depths", plain)  # JSON has no NumPy numbers
        object.__setattr__(self, "shift", float(self.shift))

    def describe(self) -> str:
        """The settings, such as "depth by position, 2.1 to 9.4 layers, shift 0.5"."""
        low, high = np.min(self.depths), np.max(self.depths)
        shift = f", shift {self.shift:g}" if self.shift else ""
        return f"depth by position, {low:.3g} to {high:.3g} layers{shift}"

    def counts(self, config: Any) -> tuple[int, ...]:
        """Tokens in each layer, special ones included.

        Raises ValueError unless there is a depth for each patch, and if a head that reads patches would have none.
        """
        patches = config.num_tokens - config.num_special
        if isinstance(self.depths, tuple) and len(self.depths) != patches:
            raise ValueError(
                f"PositionDepths has {len(self.depths)} depths and the model {patches} patches: give one for each"
            )
        whole = self._whole(patches)
        left = tuple(int((whole > layer).sum()) for layer in range(config.depth))
        if config.pool != "token" and not left[-1]:
            raise ValueError(
                "under PositionDepths no patch reaches the last layer and the model's head reads the patches: "
                "give larger depths or a larger shift"
            )
        return tuple(config.num_special + count for count in left)

    def levels(self, model: Any, images: Float[Array | np.ndarray, "b h w c"]) -> Callable[[float], "PositionDepths"]:
        """Level changes shift. At level 0 all patches stop after layer 1, and at level 1 none stops before the last.

        If the head reads patches, the deepest ones run through all layers at level 0 too. Patches of equal depth stop
        together.
        """
        config = model.config
        lowest = 1 if config.pool == "token" else config.depth - 0.499  # the latter is rounded up
        least = lowest - float(np.max(self.depths))
        most = config.depth - float(np.min(self.depths))

        def at(level: float) -> PositionDepths:
            return dataclasses.replace(self, shift=least + level * (most - least))

        return at

    def groups(
        self, seen: Seen, *, layer: int, num_special: int, draw: Keys | None = None, module: Any = None
    ) -> Groups | None:
        """The tokens that go on into a layer (from 0); None if all do. The indices are constants."""
        size = seen.size
        if size is None:
            raise ValueError("PositionDepths needs size of a layer: compute what its `reads` names")
        whole = self._whole(size.shape[1] - num_special)
        stays = np.concatenate([np.ones(num_special, bool), whole[whole >= layer] > layer])
        if stays.all():
            return None
        leader = np.flatnonzero(stays)
        into = np.where(stays, np.cumsum(stays) - 1, len(leader))
        of_images = [jnp.broadcast_to(jnp.asarray(x), (len(size), len(x))) for x in (into, leader, leader[:0])]
        return Groups(of_images[0], jnp.ones_like(size), of_images[1], of_images[2], size[:, leader], mean=False)

    def _whole(self, patches: int) -> np.ndarray:
        """The last layer of each patch, from 1; numbers above the model's layers mean its last layer.

        patches: how many depths a single number stands for.
        """
        depths = np.array(self.depths) if isinstance(self.depths, tuple) else np.full(patches, self.depths)
        return np.rint(np.maximum(depths + self.shift, 1))


def position_depths(model: Any, images: Float[Array | np.ndarray, "b h w c"]) -> tuple[float, ...]:
    """The mean depth of each patch position over images, in layers, under the model's halting rule.

    images: normalised, as the model takes them. Raises ValueError for a model without a halting rule.
    """
    if model.config.halting is None:
        raise ValueError("position_depths measures a halting rule and the model has none: give it one, or start_gate")
    depth = np.asarray(model(images).token_depth, np.float64)[:, model.config.num_special :]
    return tuple(depth.mean(0).tolist())
