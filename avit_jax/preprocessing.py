"""From what a person has (uint8 arrays, PIL images) to what the model takes."""

import math
from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from avit_jax.config import AViTConfig

AnyArray = TypeVar("AnyArray", np.ndarray, jax.Array)
RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}


def preprocess(images: Any, config: AViTConfig) -> Float[np.ndarray, "b h w c"]:
    """Images as `model(images)` takes them: resized, centre-cropped, scaled to 0..1, normalised by mean and std.

    images: a PIL image or a sequence of them, or uint8 [H, W], [H, W, C] or [B, H, W, C] (grey without C too).
    Raises ValueError for any other type or number of channels.
    """
    arrays = [_to_array(image, config.in_channels) for image in _as_sequence(images, config.in_channels)]
    return normalize(np.stack([_cut(array, config) for array in arrays]), config)


def normalize(images: UInt8[AnyArray, "b h w c"], config: AViTConfig) -> Float[AnyArray, "b h w c"]:
    """(image / 255 - mean) / std for each channel, in float32; of NumPy or, inside jit, of JAX."""
    if len(config.preprocessing.mean) != config.in_channels:
        raise ValueError(
            f"preprocessing has a mean for {len(config.preprocessing.mean)} channels and the model takes "
            f"{config.in_channels}: give Preprocessing(mean=..., std=...) one value for each channel"
        )
    mean, std = (np.asarray(v, np.float32) * 255 for v in (config.preprocessing.mean, config.preprocessing.std))
    pixels = images.astype(np.float32)
    pixels -= mean  # in place, which takes a third of the time; JAX makes new arrays
    pixels /= std
    return pixels


def denormalize(images: Float[np.ndarray, "b h w c"], config: AViTConfig) -> UInt8[np.ndarray, "b h w c"]:
    """The inverse of normalize: what the model was shown, as a picture."""
    mean, std = (np.asarray(v, np.float32) * 255 for v in (config.preprocessing.mean, config.preprocessing.std))
    return (images * std + mean).round().clip(0, 255).astype(np.uint8)


def _as_sequence(images: Any, channels: int) -> Sequence[Any]:
    if isinstance(images, Image.Image):
        return [images]
    if isinstance(images, (list, tuple)):
        if not images:
            raise ValueError("there is no image to preprocess: the sequence is empty")
        return images
    array = np.asarray(images)
    if array.ndim not in (2, 3, 4):
        raise ValueError(f"images have shape {array.shape}: give [H, W], [H, W, C] or [B, H, W, C]")
    is_one = array.ndim == 2 or (array.ndim == 3 and array.shape[-1] == channels)
    return [array] if is_one else list(array)


def _to_array(image: Any, channels: int) -> np.ndarray:
    """uint8 [H, W, channels]; PIL images are converted, arrays must have the right channels."""
    if isinstance(image, Image.Image):
        if channels not in (1, 3):
            raise ValueError(f"the model takes {channels} channels: give arrays, a PIL image has 1 or 3")
        array = np.asarray(image.convert("L" if channels == 1 else "RGB"))
    else:
        array = np.asarray(image)
        if array.dtype != np.uint8:
            raise ValueError(
                f"images are {array.dtype}: give uint8 0..255 (or pass normalised float32 to the model itself)"
            )
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.shape[-1] != channels:
        raise ValueError(f"an image has shape {array.shape}: the model takes [height, width, {channels}]")
    return array


def resize_and_crop(picture: Image.Image, config: AViTConfig) -> Image.Image:
    """Resized so that the model's size is crop_fraction of its shorter side, then cropped in the middle.

    Sizes are rounded as torchvision and timm round them: down when resizing, to the nearest pixel (half to even) when
    cropping. Bicubic and bilinear are Pillow's, antialiased.
    """
    height, width = config.image_shape
    rows, columns = (int(side / config.preprocessing.crop_fraction) for side in (height, width))
    if rows / picture.height >= columns / picture.width:
        columns = max(int(rows * picture.width / picture.height), width)
    else:
        rows = max(int(columns * picture.height / picture.width), height)
    top, left = round((rows - height) / 2), round((columns - width) / 2)
    method = RESAMPLING[config.preprocessing.interpolation]
    upper, lower = (edge * picture.height / rows for edge in (top, top + height))
    if (
        picture.width < picture.height
        or picture.width * rows < picture.height * columns
        or method == Image.Resampling.NEAREST
        or any(float(np.float32(edge)) != edge for edge in (upper, lower))
    ):
        return picture.resize((columns, rows), method).crop((left, top, left + width, top + height))
    # Pillow resizes a wide picture row by row, then column by column: what the crop leaves out can go before and
    # between the two, with the same pixels for less work. (A tall one it may take the other way round.) Its box is in
    # float32, which a shorter side of 256 suits.
    reach = math.ceil(2 * max(picture.height / rows, 1)) + 1  # pixels that a filter sees beyond the edge
    first, last = max(math.floor(upper) - reach, 0), min(math.ceil(lower) + reach, picture.height)
    picture = picture.crop((0, first, picture.width, last))
    picture = picture.resize((columns, last - first), method).crop((left, 0, left + width, last - first))
    return picture.resize((width, height), method, box=(0, upper - first, width, lower - first))


def _cut(image: UInt8[np.ndarray, "h w c"], config: AViTConfig) -> UInt8[np.ndarray, "height width c"]:
    """resize_and_crop of an array, channel by channel unless they are red, green and blue."""
    if image.shape[-1] == 3:
        return np.asarray(resize_and_crop(Image.fromarray(image), config))
    planes = [Image.fromarray(plane) for plane in np.moveaxis(image, -1, 0)]
    return np.stack([np.asarray(resize_and_crop(plane, config)) for plane in planes], axis=-1)
