"""The steps from a stored image to a row of a batch: decoding, checks, cropping, conversion to an array."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import grain
import numpy as np
from PIL import Image

from avit_jax.data.crop import RandomResizedCrop
from avit_jax.data.decode import BadData, BadImage, decode
from avit_jax.data.preprocessing import resize_and_crop
from avit_jax.data.sources import Images
from avit_jax.model.config import AViTConfig
from avit_jax.runtime.files import shown


@dataclasses.dataclass(frozen=True)
class Numbered:
    """A split whose elements carry their own index, for error messages and for counting bad images."""

    split: Images

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.split[index] | {"index": index}


@dataclasses.dataclass(frozen=True)
class EvaluationRows:
    """The rows of every batch that belong to one process. An image of None pads the last batch."""

    split: Images
    batch_size: int  # of all processes together
    process_index: int
    process_count: int

    def __len__(self) -> int:
        return -(-len(self.split) // self.batch_size) * (self.batch_size // self.process_count)

    def __getitem__(self, row: int) -> dict[str, Any]:
        own = self.batch_size // self.process_count
        batch, offset = divmod(row, own)
        index = batch * self.batch_size + self.process_index * own + offset
        if index >= len(self.split):
            return {"image": None, "label": 0, "index": -1}
        return self.split[index] | {"index": index}


@dataclasses.dataclass(frozen=True)
class BadImages:
    """What happens to an unusable image: a black image with weight 0 takes its slot, or BadImage is raised."""

    split: Images
    model_config: AViTConfig
    skip: bool

    def blank(self) -> Image.Image:
        """The black picture that takes the place of a bad or missing one."""
        height, width = self.model_config.image_shape
        return Image.new("L" if self.model_config.in_channels == 1 else "RGB", (width, height))

    def cut(self, element: dict[str, Any], cut: Callable[[Image.Image], Image.Image]) -> dict[str, Any]:
        """The element after `cut` of its picture. Raises BadImage for any error, unless bad images are skipped."""
        try:
            return element | {"image": cut(element["image"])}
        except Exception as error:
            if self.skip:
                return element | {"image": self.blank(), "weight": np.float32(0)}
            name = shown(self.split.name(element["index"]))
            reason = shown(str(error).strip()) or type(error).__name__
            raise BadImage(f"{name} cannot be resized ({reason}): replace the file") from error


@dataclasses.dataclass(frozen=True)
class Decode(grain.transforms.Map):
    """Turns a file, bytes or an array into a picture. Its weight is 0 for padding and for bad images, else 1."""

    bad: BadImages

    def map(self, element: dict[str, Any]) -> dict[str, Any]:
        """The decoded element. Raises BadImage unless bad images are skipped, BadData for a label out of range."""
        split, classes = self.bad.split, self.bad.model_config.num_classes
        image, label, weight = element["image"], int(element["label"]), np.float32(1)
        if image is not None and not 0 <= label < classes:
            raise BadData(
                f"{shown(split.name(element['index']))} has label {label} and the model has {classes} "
                "classes: labels must be 0..num_classes - 1"
            )
        try:
            if isinstance(image, np.ndarray):
                image = as_picture(image)
            elif image is not None:
                image = decode(image, functools.partial(split.name, element["index"]))
        except BadImage:
            if not self.bad.skip:
                raise
            image = None
        if image is None:
            image, weight = self.bad.blank(), np.float32(0)
        mode = "L" if self.bad.model_config.in_channels == 1 else "RGB"
        if image.mode != mode:
            image = image.convert(mode)
        return element | {"image": image, "label": np.int32(label), "weight": weight}


@dataclasses.dataclass(frozen=True)
class EvaluationCrop(grain.transforms.Map):
    """The centre crop of the resized picture, as preprocess(images, config) makes it."""

    bad: BadImages

    def map(self, element: dict[str, Any]) -> dict[str, Any]:
        """The element with its picture cropped."""
        return self.bad.cut(element, lambda picture: resize_and_crop(picture, self.bad.model_config))


@dataclasses.dataclass(frozen=True)
class TrainingCrop(grain.transforms.RandomMap):
    """A random part of a picture, resized."""

    crop: RandomResizedCrop
    bad: BadImages

    def random_map(self, element: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        """The element with its picture cropped."""
        return self.bad.cut(element, lambda picture: self.crop.random_map({"image": picture}, rng)["image"])


@dataclasses.dataclass(frozen=True)
class ToArray(grain.transforms.Map):
    """Turns a picture into uint8 [height, width, channels]."""

    def map(self, element: dict[str, Any]) -> dict[str, Any]:
        """The element with an array in place of its picture."""
        return element | {"image": as_array(element["image"])}


def as_picture(image: np.ndarray) -> Image.Image:
    """uint8 [height, width, 1 or 3] as a picture. Raises ValueError for another number of channels."""
    if image.shape[-1] not in (1, 3):
        raise ValueError(f"images of {image.shape[-1]} channels cannot be augmented as pictures: 1 or 3 can")
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)


def as_array(picture: Image.Image) -> np.ndarray:
    """A picture as uint8 [height, width, channels]: the inverse of as_picture."""
    array = np.asarray(picture)
    return array[..., None] if array.ndim == 2 else array
