"""Preprocessing: from files, PIL images and uint8 arrays to the model's input."""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from avit_jax.data.decode import decode
from avit_jax.model.config import AViTConfig

AnyArray = TypeVar("AnyArray", np.ndarray, jax.Array)
RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}
LARGEST_RESIZED = 2**24  # pixels of a whole resized picture; 224-pixel models reach it at an aspect ratio of 1 to 256


def preprocess(images: Any, config: AViTConfig | Any = None) -> Float[np.ndarray, "b h w c"]:
    """Images as `model(images)` takes them: resized, centre-cropped, scaled to 0..1, normalised by mean and std.

    images: one image or a sequence of them, each a path, the bytes of a file, a PIL image or uint8 [H, W] or [H, W, C];
    or uint8 [B, H, W] or [B, H, W, C]. config: model.config. Files are turned upright by their EXIF tag. Raises
    ValueError for any other type or number of channels, BadImage (a ValueError) for a file that cannot be read.
    """
    if not isinstance(config, AViTConfig):
        given = "config is missing" if config is None else f"config is a {type(config).__name__}"
        raise ValueError(f"preprocess needs the model's configuration, but {given}: preprocess(images, model.config)")
    channels = config.in_channels
    cut = [_cut(_checked(image, channels), config) for image in _as_sequence(images, channels)]
    return normalize(np.stack(cut), config)


def normalize(images: UInt8[AnyArray, "b h w c"], model_config: AViTConfig) -> Float[AnyArray, "b h w c"]:
    """(image / 255 - mean) / std for each channel, in float32, for NumPy arrays and, inside jit, JAX arrays.

    Raises ValueError if config.preprocessing has no mean for every channel.
    """
    if len(model_config.preprocessing.mean) != model_config.in_channels:
        raise ValueError(
            f"preprocessing has a mean for {len(model_config.preprocessing.mean)} channels and the model takes "
            f"{model_config.in_channels}: give Preprocessing(mean=..., std=...) one value for each channel"
        )
    mean, std = (
        np.asarray(v, np.float32) * 255 for v in (model_config.preprocessing.mean, model_config.preprocessing.std)
    )
    pixels = images.astype(np.float32)
    pixels -= mean  # in place, which takes a third of the time; JAX makes new arrays
    pixels /= std
    return pixels


def denormalize(images: Float[np.ndarray, "b h w c"], model_config: AViTConfig) -> UInt8[np.ndarray, "b h w c"]:
    """The inverse of normalize: the picture that the model saw."""
    mean, std = (
        np.asarray(v, np.float32) * 255 for v in (model_config.preprocessing.mean, model_config.preprocessing.std)
    )
    return (images * std + mean).round().clip(0, 255).astype(np.uint8)


def _as_sequence(images: Any, channels: int) -> Sequence[Any]:
    if isinstance(images, (Image.Image, str, bytes, os.PathLike)):
        return [images]
    if isinstance(images, (list, tuple)):
        if not images:
            raise ValueError("there is no image to preprocess: the sequence is empty")
        return images
    array = _as_array(images)
    if array.ndim not in (2, 3, 4):
        raise ValueError(f"images have shape {array.shape}: give [H, W], [H, W, C] or [B, H, W, C]")
    if not len(array):
        raise ValueError(f"there is no image to preprocess: the array has shape {array.shape}")
    if array.ndim == 3 and channels == 1 and array.shape[-1] in (3, 4) and len(array) > 4:
        raise ValueError(
            f"images have shape {array.shape}, which looks like one picture in colour, and the model takes grey ones: "
            "give Image.fromarray(image), or [batch, height, width]"
        )
    is_one = array.ndim == 2 or (array.ndim == 3 and (array.shape[-1] == channels or channels != 1))
    return [array] if is_one else list(array)


def _as_array(image: Any) -> np.ndarray:
    try:
        array = np.asarray(image)
    except Exception as error:  # a ragged list, or a tensor on another device: each library raises its own error
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"a {type(image).__name__} cannot be made an array ({reason}): give uint8 arrays") from None
    if array.dtype != np.uint8:
        what = f"images are {array.dtype}" if array.dtype != object else f"an image is a {type(image).__name__}"
        raise ValueError(
            f"{what}: give uint8 0..255, PIL images or paths (or pass normalised float32 to the model itself)"
        )
    return array


def _checked(image: Any, channels: int) -> np.ndarray | Image.Image:
    """The image as uint8 [H, W, channels] or as a PIL picture with this many channels; files are opened."""
    if isinstance(image, (str, os.PathLike)):
        image = decode(Path(image), os.fspath(image), upright=True)
    elif isinstance(image, bytes):
        image = decode(image, f"an image of {len(image)} bytes", upright=True)
    if isinstance(image, Image.Image):
        if channels not in (1, 3):
            raise ValueError(f"the model takes {channels} channels: give arrays, because a PIL image has 1 or 3")
        mode = "L" if channels == 1 else "RGB"
        return image if image.mode == mode else image.convert(mode)
    array = _as_array(image)
    given = array.shape
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.shape[-1] != channels or not array.size:
        hint = ""
        if array.ndim == 3 and array.shape[-1] == 1 and channels == 3:
            hint = "; a grey array becomes three channels with np.repeat(image[..., None], 3, axis=-1)"
            hint = hint if len(given) == 2 else hint.replace("[..., None]", "")
        elif array.ndim == 3 and array.shape[0] == channels:
            hint = "; channels come last: np.moveaxis(image, 0, -1)"
        raise ValueError(f"an image has shape {given}: the model takes [height, width, {channels}]{hint}")
    return array


def resize_and_crop(picture: Image.Image, model_config: AViTConfig) -> Image.Image:
    """A picture resized so that the model's size is crop_fraction of its shorter side, then cropped at the centre.

    Sizes are rounded as torchvision and timm round them: down when resizing, to the nearest pixel (half to even) when
    cropping. Bicubic and bilinear are Pillow's, antialiased. If the resized picture would have more than 16 megapixels,
    because it is long and thin, it is cropped first; its pixels may then differ by one or two of 255 levels.
    """
    height, width = model_config.image_shape
    rows, columns = (int(side / model_config.preprocessing.crop_fraction) for side in (height, width))
    if rows / picture.height >= columns / picture.width:
        columns = max(int(rows * picture.width / picture.height), width)
    else:
        rows = max(int(columns * picture.height / picture.width), height)
    top, left = round((rows - height) / 2), round((columns - width) / 2)
    method = RESAMPLING[model_config.preprocessing.interpolation]
    if rows * columns > max(LARGEST_RESIZED, 4 * height * width):
        return _middle(picture, (rows, columns), (top, left), (height, width), method)
    upper, lower = (edge * picture.height / rows for edge in (top, top + height))
    if (
        picture.width < picture.height
        or picture.width * rows < picture.height * columns
        or method == Image.Resampling.NEAREST
        or any(float(np.float32(edge)) != edge for edge in (upper, lower))
    ):
        return picture.resize((columns, rows), method).crop((left, top, left + width, top + height))
    # Pillow resizes a wide picture row by row, then column by column. What the crop leaves out is removed before and
    # between the two passes, which gives the same pixels for less work. (Pillow may resize a tall picture in the other
    # order.) Pillow's box is float32, which holds the edges exactly if the shorter side is resized to 256.
    first, last, box = _reach(picture.height, rows, top, height)
    picture = picture.crop((0, first, picture.width, last))
    picture = picture.resize((columns, last - first), method).crop((left, 0, left + width, last - first))
    return picture.resize((width, height), method, box=(0, box[0], width, box[1]))


def _middle(
    picture: Image.Image,
    resized: tuple[int, int],
    corner: tuple[int, int],
    size: tuple[int, int],
    method: Image.Resampling,
) -> Image.Image:
    """The part of size `size` at `corner` of the picture resized to `resized`; all are (height, width).

    It reads only the pixels that the part needs, and makes no larger picture.
    """
    first, last, rows = _reach(picture.height, resized[0], corner[0], size[0])
    start, stop, columns = _reach(picture.width, resized[1], corner[1], size[1])
    needed = picture.crop((start, first, stop, last))
    return needed.resize((size[1], size[0]), method, box=(columns[0], rows[0], columns[1], rows[1]))


def _reach(length: int, resized: int, start: int, size: int) -> tuple[int, int, tuple[float, float]]:
    """Along one side: the range of pixels that a part of the resized picture needs, and the part's box within them.

    The side has `length` pixels and is resized to `resized`. The part has `size` of these, from `start` on.
    """
    near, far = (edge * length / resized for edge in (start, start + size))
    reach = math.ceil(2 * max(length / resized, 1)) + 1  # pixels that a filter reads beyond the edge
    first, last = max(math.floor(near) - reach, 0), min(math.ceil(far) + reach, length)
    return first, last, (near - first, far - first)


def _cut(
    image: UInt8[np.ndarray, "h w c"] | Image.Image, model_config: AViTConfig
) -> UInt8[np.ndarray, "height width c"]:
    """The result of resize_and_crop as an array. Arrays without three channels are resized channel by channel."""
    if isinstance(image, np.ndarray) and image.shape[-1] != 3:
        planes = [Image.fromarray(plane) for plane in np.moveaxis(image, -1, 0)]
        return np.stack([np.asarray(resize_and_crop(plane, model_config)) for plane in planes], axis=-1)
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    found = np.asarray(resize_and_crop(picture, model_config))
    return found if found.ndim == 3 else found[..., None]
