"""config.data and config.augment: every key, its default and its unit."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy as np

from avit_jax.model.config import INTERPOLATIONS, MIN_CROP_FRACTION, nearest

SOURCES = ("mnist", "npz", "idx", "folder", "tfds")
ON_BAD_IMAGE = ("raise", "skip")

Settings = TypeVar("Settings", bound="_Settings")


class _Settings:
    _section = ""

    @classmethod
    def from_config(cls: type[Settings], section: Mapping[str, Any]) -> Settings:
        """The section of a config, keys that it leaves out by default.

        Raises ValueError for a key that is unknown, and for a value that is not of its field's type, or not finite.
        """
        fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
        for name in section:
            if name not in fields:
                raise ValueError(f"config.{cls._section} has no key {name!r}: {nearest(name, fields)}")
        values = {name: tuple(v) if isinstance(v, list) else v for name, v in section.items()}
        for name, value in values.items():
            is_good, kind = _KINDS[fields[name].type]
            if not is_good(value):
                raise ValueError(f"config.{cls._section}.{name} is {value!r}: it must be {kind}")
        return cls(**values)

    def _check(self, name: str, is_good: bool, rule: str) -> None:
        if not is_good:
            raise ValueError(f"config.{self._section}.{name} is {getattr(self, name)!r}: it must be {rule}")


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_whole(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return _is_whole(value) or (isinstance(value, (float, np.floating)) and math.isfinite(value))


# What a field of a type may hold, and what a sentence calls it.
_KINDS: dict[Any, tuple[Callable[[Any], bool], str]] = {
    str: (_is_text, "text"),
    int: (_is_whole, "a whole number"),
    float: (_is_number, "a finite number"),
    tuple[str, ...]: (lambda v: isinstance(v, tuple) and all(map(_is_text, v)), "a list of names, as ('cat', 'dog')"),
    tuple[float, ...]: (
        lambda v: isinstance(v, tuple) and all(map(_is_number, v)),
        "a list of finite numbers, as (0.5,), or () for the default",
    ),
}


@dataclasses.dataclass(frozen=True)
class DataSettings(_Settings):
    """What is read, and by whom. Raises ValueError for values that cannot be."""

    source: str = "mnist"  # mnist, npz, idx: arrays in memory; folder, tfds: images read when they are needed
    path: str = ""  # npz: the file; idx, folder: the folder; tfds: its data_dir ("": ~/tensorflow_datasets)
    name: str = ""  # tfds: the data set, imagenet2012 or cifar10:3.0.2
    class_names: tuple[str, ...] = ()  # idx: its files carry none
    mean: tuple[float, ...] = ()  # by channel, of 0..1 pixels; (): ImageNet's for images read from disk, else measured
    std: tuple[float, ...] = ()
    crop_fraction: float = 0.875  # folder, tfds: the part of the resized image that evaluation sees (224 of 256)
    interpolation: str = "bicubic"
    workers: int = 0  # processes that read and augment; 0: threads of this one
    threads: int = 0  # threads that do it; 0: one for arrays in memory, else one for each core
    on_bad_image: str = "raise"  # or "skip": the image's slot stays, with weight 0; more than 1 % of them stop the run
    repeated_augmentation: int = 1  # how often each image is in a pass, augmented anew each time

    _section = "data"

    def __post_init__(self) -> None:
        if self.source not in SOURCES:
            raise ValueError(f"config.data.source {self.source!r} is unknown: {nearest(self.source, SOURCES)}")
        self._check("std", not self.std or min(self.std) > 0, "above 0 for every channel")
        good_crop = MIN_CROP_FRACTION <= self.crop_fraction <= 1
        self._check("crop_fraction", good_crop, f"at least {MIN_CROP_FRACTION} and at most 1")
        self._check("interpolation", self.interpolation in INTERPOLATIONS, f"one of {', '.join(INTERPOLATIONS)}")
        self._check("workers", 0 <= self.workers <= 1000, "0 (threads) or a number of processes up to 1,000")
        self._check("threads", 0 <= self.threads <= 1000, "0 (one a core) or a number of threads up to 1,000")
        self._check("on_bad_image", self.on_bad_image in ON_BAD_IMAGE, " or ".join(ON_BAD_IMAGE))
        self._check("repeated_augmentation", self.repeated_augmentation >= 1, "at least 1")


@dataclasses.dataclass(frozen=True)
class AugmentSettings(_Settings):
    """What training images go through, in this order; every default leaves them alone.

    On the host, image by image: crop, flip, RandAugment (or, where it is off, colour jitter), affine changes.
    On the device, in the training step (data/mix.py): erasing, then mixup or cutmix. DeiT's values are in
    configs/imagenet_deit.py. Raises ValueError for values that cannot be.
    """

    crop_scale: tuple[float, ...] = ()  # least and most of the image's area that a crop has; (): evaluation's crop
    crop_ratio: tuple[float, ...] = (3 / 4, 4 / 3)  # least and most width / height of it
    flip: float = 0.0  # probability of left for right
    randaugment: str = ""  # timm's notation: rand-m9-mstd0.5-inc1
    color_jitter: float = 0.0  # where RandAugment is off: brightness, contrast, saturation, each by 1 - x to 1 + x
    rotate: float = 0.0  # degrees, to either side
    scale: float = 0.0  # fraction: 0.1 means 0.9..1.1
    shear: float = 0.0  # fraction of the height that the top moves
    translate: float = 0.0  # pixels, to either side
    erasing: float = 0.0  # probability that a rectangle becomes noise
    mixup: float = 0.0  # a of the Beta(a, a) that the weight of an image is drawn from; 0: no mixup
    cutmix: float = 0.0  # a of the Beta(a, a) that the area kept is drawn from; 0: no cutmix
    mix_switch: float = 0.5  # probability of cutmix where both are on
    mix_probability: float = 1.0  # probability that a pair of images is mixed at all

    _section = "augment"

    def __post_init__(self) -> None:
        for name, limits in (("crop_scale", self.crop_scale), ("crop_ratio", self.crop_ratio)):
            good = len(limits) == 2 and 0 < limits[0] <= limits[1]
            self._check(name, good or (name == "crop_scale" and not limits), "(least, most), both above 0")
        self._check("crop_scale", not self.crop_scale or self.crop_scale[1] <= 1, "at most 1, the whole image")
        for name in ("flip", "erasing", "mix_switch", "mix_probability"):
            self._check(name, 0 <= getattr(self, name) <= 1, "a probability, 0 to 1")
        for name in ("color_jitter", "mixup", "cutmix"):
            self._check(name, getattr(self, name) >= 0, "at least 0")

    @property
    def affine(self) -> dict[str, float]:
        """The limits of RandomAffine."""
        return {name: getattr(self, name) for name in ("rotate", "scale", "shear", "translate")}

    @property
    def needs_pictures(self) -> bool:
        """Whether images pass through Pillow's operations."""
        return bool(self.crop_scale or self.flip or self.randaugment or self.color_jitter)
