"""Which part of a picture is seen: a random resized crop and a flip in training, the middle in evaluation."""

import dataclasses
import math
from typing import Any

import grain
import numpy as np
from PIL import Image

from avit_jax.data.preprocessing import RESAMPLING

ATTEMPTS = 10  # crops that are drawn before the middle is taken, as in torchvision


@dataclasses.dataclass(frozen=True)
class RandomResizedCrop(grain.transforms.RandomMap):
    """A rectangle of random area, shape and place, resized (GoogLeNet's augmentation, arXiv 1409.4842)."""

    image_shape: tuple[int, int]  # (height, width) of the result
    scale: tuple[float, ...]  # share of the picture's area, uniform
    ratio: tuple[float, ...]  # width / height, uniform in its logarithm
    interpolation: str = "bicubic"

    def random_map(self, element: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        """The element with its picture cropped and resized."""
        picture = element["image"]
        box = random_box(picture.size, self.scale, self.ratio, rng)
        height, width = self.image_shape
        # Cropped before it is resized (antialiased): with resize(box=...) the filter would see beyond the box.
        cropped = picture.crop(box)
        return element | {"image": cropped.resize((width, height), RESAMPLING[self.interpolation])}


def random_box(
    size: tuple[int, int], scale: tuple[float, ...], ratio: tuple[float, ...], rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of a random crop of a picture of (width, height).

    Where ten draws do not fit, the largest middle part with an allowed ratio.
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
    """Left for right, with a probability."""

    probability: float = 0.5

    def random_map(self, element: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        """The element with its picture flipped, or as it was."""
        if rng.uniform() >= self.probability:
            return element
        return element | {"image": element["image"].transpose(Image.Transpose.FLIP_LEFT_RIGHT)}
