"""Random affine changes to training images, one image at a time on the host."""

import dataclasses
import math
from typing import Any

import grain
import numpy as np
from jaxtyping import UInt8
from PIL import Image


@dataclasses.dataclass(frozen=True)
class RandomAffine(grain.transforms.RandomMap):
    """Rotation, scaling, shear and shift, uniform within the limits; bilinear, black outside."""

    rotate: float = 0.0  # degrees, in either direction
    scale: float = 0.0  # fraction: 0.1 means 0.9..1.1
    shear: float = 0.0  # how far the top moves sideways, as a fraction of the height
    translate: float = 0.0  # pixels, in either direction

    def random_map(self, element: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        """The element with its image changed."""
        angle, scale, shear, dx, dy = rng.uniform(-1, 1, 5)
        return element | {
            "image": affine(
                element["image"],
                rotate=angle * self.rotate,
                scale=1 + scale * self.scale,
                shear=shear * self.shear,
                translate=(dx * self.translate, dy * self.translate),
            )
        }


def affine(
    image: UInt8[np.ndarray, "h w c"], *, rotate: float, scale: float, shear: float, translate: tuple[float, float]
) -> UInt8[np.ndarray, "h w c"]:
    """The image rotated, scaled and sheared about its centre, then shifted; bilinear, black outside.

    rotate: degrees counter-clockwise. scale: factor by which the content grows. shear: how far the top moves sideways,
    as a fraction of the height. translate: pixels to the right and down.
    """
    height, width, _ = image.shape
    cos, sin = math.cos(math.radians(rotate)) / scale, math.sin(math.radians(rotate)) / scale
    # Pillow maps output pixels to input pixels, so this is the inverse transformation, about the centre.
    linear = np.array([[cos, -sin], [sin, cos]]) @ np.array([[1.0, shear], [0.0, 1.0]])
    center = np.array([width / 2, height / 2])
    offset = center - linear @ (center + np.array(translate))
    data = (*linear[0], offset[0], *linear[1], offset[1])
    planes = [
        np.asarray(
            Image.fromarray(plane).transform((width, height), Image.Transform.AFFINE, data, Image.Resampling.BILINEAR)
        )
        for plane in np.moveaxis(image, -1, 0)
    ]
    return np.stack(planes, axis=-1)
