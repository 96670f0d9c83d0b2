"""Random resized crops and flips of training pictures."""

import dataclasses
import math
from typing import Any

import grain
import numpy as np
from PIL import Image

from avit_jax.data.preprocessing import RESAMPLING

ATTEMPTS = 10  # random crops tried before the centre is taken, as in torchvision


@dataclasses.dataclass(frozen=True)
class RandomResizedCrop(grain.transforms.RandomMap):
    """A rectangle of random area, aspect ratio and position, resized (GoogLeNet's augmentation, arXiv 1409.4842)."""

    image_shape: tuple[int, int]  # (height, width) of the result
    scale: tuple[float, ...]  # least and most fraction of the picture's area; uniform
    ratio: tuple[float, ...]  # least and most width / height; uniform in its logarithm
    interpolation: str = "bicubic"

    def random_map(self, element: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        """The element with its picture cropped and resized."""
        picture = element["image"]
        box = random_box(picture.size, self.scale, self.ratio, rng)
        height, width = self.image_shape
        # Crop first, then resize: with resize(box=...) the antialiasing filter would read pixels outside the box.
        cropped = picture.crop(box)
        return element | {"image": cropped.resize((width, height), RESAMPLING[self.interpolation])}


def random_box(
    size: tuple[int, int], scale: tuple[float, ...], ratio: tuple[float, ...], rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of a random crop, in pixels.

    size: the picture's (width, height). scale, ratio: as in RandomResizedCrop. If none of ten random crops fits into
    the picture, the result is the largest centre crop with an allowed ratio.
    """
    width, height = size
    for _ in range(ATTEMPTS):
        area = width * height * rng.uniform(scale[0], scale[1])
        shape = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return left, top, left + w, top + h
    w, h = width, height
    if width / height < ratio[0]:
        h = max(1, round(width / ratio[0]))
    elif width / height > ratio[1]:
        w = max(1, round(height * ratio[1]))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


@dataclasses.dataclass(frozen=True)
class RandomFlip(grain.transforms.RandomMap):
    """A flip from left to right, with a probability."""

    probability: float = 0.5

    def random_map(self, element: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        """The element with its picture flipped or unchanged."""
        if rng.uniform() >= self.probability:
            return element
        return element | {"image": element["image"].transpose(Image.Transpose.FLIP_LEFT_RIGHT)}
