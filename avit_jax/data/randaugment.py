"""RandAugment (arXiv 1909.13719) with timm's magnitudes, and colour jitter, which can take its place; done by Pillow.

The notation is timm's, as in DeiT's recipe. rand-m9-mstd0.5-inc1 draws two of fifteen operations and applies each with
probability 0.5, at magnitude 9 of 10 with a standard deviation of 0.5. With inc1, every operation gets stronger as the
magnitude grows.
"""

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any

import grain
import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from avit_jax.data.preprocessing import RESAMPLING
from avit_jax.runtime.hints import nearest

FULL = 10.0  # the magnitude at which an operation is at its strongest
PROBABILITY = 0.5  # of each chosen operation
Colour = int | tuple[int, ...]

_OPTIONS = {
    "m": "magnitude, 0 to 10",
    "n": "number of operations",
    "mstd": "standard deviation of the magnitude",
    "p": "probability of each operation",
    "inc": "1 for the increasing set",
}


@dataclasses.dataclass(frozen=True)
class RandAugment(grain.transforms.RandomMap):
    """Random operations on a picture, drawn with replacement. from_string reads timm's notation."""

    magnitude: float = FULL
    operations: int = 2
    deviation: float = 0.0  # standard deviation of the magnitude; above 100: uniform from 0 to the magnitude
    probability: float = PROBABILITY
    fill: tuple[int, ...] = (124, 116, 104)  # colour of the pixels that come in from outside: the mean
    interpolation: str = "bicubic"

    @classmethod
    def from_string(cls, text: str, *, fill: tuple[int, ...], interpolation: str = "bicubic") -> "RandAugment":
        """RandAugment from timm's notation: rand-m9-mstd0.5-inc1, optionally with n (operations) and p (probability).

        fill, interpolation: as the fields. Raises ValueError naming the part that is not understood.
        """
        head, *parts = text.split("-")
        if head != "rand":
            raise ValueError(
                f"config.augment.randaugment is {text!r}: it must start with rand-, as in rand-m9-mstd0.5-inc1"
            )
        found: dict[str, float] = {}
        for part in parts:
            match = re.fullmatch(r"([a-z]+)(\d+(?:\.\d+)?)", part)
            if match is None or match[1] not in _OPTIONS:
                known = ", ".join(f"{name} ({meaning})" for name, meaning in _OPTIONS.items())
                raise ValueError(f"config.augment.randaugment {text!r}: {part!r} is not understood; known: {known}")
            if match[1] in found:
                raise ValueError(f"config.augment.randaugment {text!r} gives {match[1]} twice: leave one out")
            found[match[1]] = float(match[2])
        for name, good, rule in (
            ("m", 0 <= found.get("m", FULL) <= FULL, "from 0 to 10"),
            ("n", found.get("n", 2) in range(1, 16), "a whole number from 1 to 15"),
            ("p", found.get("p", PROBABILITY) <= 1, "at most 1"),
            ("inc", found.get("inc", 0) == 1, "given as 1: there is only the increasing set"),
        ):
            if not good:
                raise ValueError(f"config.augment.randaugment {text!r}: {name} must be {rule}")
        return cls(
            magnitude=found.get("m", FULL),
            operations=int(found.get("n", 2)),
            deviation=found.get("mstd", 0.0),
            probability=found.get("p", PROBABILITY),
            fill=fill,
            interpolation=interpolation,
        )

    def random_map(self, element: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        """The element with its picture changed."""
        picture = element["image"]
        for chosen in rng.integers(len(OPERATIONS), size=self.operations):
            if rng.uniform() >= self.probability:
                continue
            level = (
                rng.uniform(0, self.magnitude) if self.deviation > 100 else rng.normal(self.magnitude, self.deviation)
            )
            picture = operate(
                picture,
                _NAMES[chosen],
                min(max(level, 0.0), FULL),
                1 if rng.uniform() < 0.5 else -1,
                fill=self.fill,
                interpolation=self.interpolation,
            )
        return element | {"image": picture}


def operate(
    picture: Image.Image, name: str, level: float, sign: int, *, fill: tuple[int, ...], interpolation: str = "bicubic"
) -> Image.Image:
    """The picture after one operation.

    picture: mode RGB or L. name: a key of OPERATIONS. level: 0 to 10. sign: 1 or -1, the direction if the operation has
    one. fill: the colour outside, one value per channel. Raises ValueError for an unknown name.
    """
    if name not in OPERATIONS:
        raise ValueError(f"there is no operation {name!r}: {nearest(name, OPERATIONS)}")
    colour = fill if picture.mode == "RGB" else fill[0]
    return OPERATIONS[name](picture, level / FULL, sign, colour, RESAMPLING[interpolation])


def _affine(
    picture: Image.Image, matrix: tuple[int | float, ...], fill: Colour, resample: Image.Resampling
) -> Image.Image:
    return picture.transform(picture.size, Image.Transform.AFFINE, matrix, resample, fillcolor=fill)


def _enhance(kind: Callable[[Image.Image], Any], picture: Image.Image, amount: float, sign: int) -> Image.Image:
    return kind(picture).enhance(max(0.1, 1 + 0.9 * amount * sign))


def _posterize(picture: Image.Image, bits: int) -> Image.Image:
    """The highest `bits` bits of every level; 0 bits are black, which Pillow 13 refuses to make."""
    return ImageOps.posterize(picture, bits) if bits else Image.new(picture.mode, picture.size)


def _solarize_add(picture: Image.Image, add: int) -> Image.Image:
    """Levels below 128 raised by `add`, up to 255."""
    table = [min(255, level + add) if level < 128 else level for level in range(256)]
    return picture.point(table * len(picture.getbands()))


# name -> (picture, level / 10, direction, colour outside, resampling). At level 10: 30 degrees, all 4 bits of
# posterize's range, every level solarized, 110 levels added, factors of 0.1 or 1.9, a shear of 0.3, a shift by 45 %.
OPERATIONS: dict[str, Callable[[Image.Image, float, int, Colour, Image.Resampling], Image.Image]] = {
    "AutoContrast": lambda p, x, s, f, r: ImageOps.autocontrast(p),
    "Equalize": lambda p, x, s, f, r: ImageOps.equalize(p),
    "Invert": lambda p, x, s, f, r: ImageOps.invert(p),
    "Rotate": lambda p, x, s, f, r: p.rotate(s * 30 * x, r, fillcolor=f),
    "Posterize": lambda p, x, s, f, r: _posterize(p, 4 - int(4 * x)),
    "Solarize": lambda p, x, s, f, r: ImageOps.solarize(p, 256 - int(256 * x)),
    "SolarizeAdd": lambda p, x, s, f, r: _solarize_add(p, int(110 * x)),
    "Color": lambda p, x, s, f, r: _enhance(ImageEnhance.Color, p, x, s),
    "Contrast": lambda p, x, s, f, r: _enhance(ImageEnhance.Contrast, p, x, s),
    "Brightness": lambda p, x, s, f, r: _enhance(ImageEnhance.Brightness, p, x, s),
    "Sharpness": lambda p, x, s, f, r: _enhance(ImageEnhance.Sharpness, p, x, s),
    "ShearX": lambda p, x, s, f, r: _affine(p, (1, s * 0.3 * x, 0, 0, 1, 0), f, r),
    "ShearY": lambda p, x, s, f, r: _affine(p, (1, 0, 0, s * 0.3 * x, 1, 0), f, r),
    "TranslateX": lambda p, x, s, f, r: _affine(p, (1, 0, s * 0.45 * x * p.width, 0, 1, 0), f, r),
    "TranslateY": lambda p, x, s, f, r: _affine(p, (1, 0, 0, 0, 1, s * 0.45 * x * p.height), f, r),
}
_NAMES = tuple(OPERATIONS)


@dataclasses.dataclass(frozen=True)
class ColorJitter(grain.transforms.RandomMap):
    """Brightness, contrast and saturation in random order, each by a factor of 1 - amount to 1 + amount."""

    amount: float

    def random_map(self, element: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        """The element with its picture changed."""
        factors = rng.uniform(max(0.0, 1 - self.amount), 1 + self.amount, 3)
        return element | {"image": adjust(element["image"], rng.permutation(3).tolist(), factors.tolist())}


def adjust(picture: Image.Image, order: Sequence[int], factors: Sequence[float]) -> Image.Image:
    """The picture with brightness (0), contrast (1) and saturation (2) multiplied by factors[0..2], in this order."""
    kinds = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    for kind in order:
        picture = kinds[kind](picture).enhance(factors[kind])
    return picture
