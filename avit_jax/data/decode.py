"""From the bytes of a file to an RGB picture, or one sentence that says why not."""

import io
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

# Pillow only warns of pictures above 89 megapixels, and goes on to decode them: here that is an error.
warnings.simplefilter("error", Image.DecompressionBombWarning)


class BadData(ValueError):
    """Something in the data that cannot be used: its name, and the reason."""


class BadImage(BadData):
    """An image that cannot be decoded; on_bad_image = "skip" lets it pass."""


def decode(source: bytes | Path, name: str | Callable[[], str]) -> Image.Image:
    """The picture in mode RGB, as PyTorch's loader has it: alpha is dropped, CMYK converted, EXIF rotation left alone.

    source: a file or its content; name: what an error calls it, or makes that. Raises BadImage for what is no image, is
    cut off or has more than 89 megapixels.
    """
    try:
        data = source if isinstance(source, bytes) else source.read_bytes()
        with Image.open(io.BytesIO(data)) as picture:
            picture.load()
            return as_rgb(picture)
    except Image.UnidentifiedImageError:
        what = "is no image that Pillow can read" if data else "is empty"
        raise BadImage(f"{_called(name)} {what}: remove it or replace it") from None
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        limit = (Image.MAX_IMAGE_PIXELS or 0) / 1e6
        raise BadImage(
            f"{_called(name)} has more than {limit:.0f} megapixels, which may be a decompression bomb: make it smaller"
        ) from None
    except Exception as error:  # Pillow's formats raise OSError, SyntaxError, struct.error and others
        reason = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
        raise BadImage(f"{_called(name)} cannot be read ({reason}): replace the file") from error


def _called(name: str | Callable[[], str]) -> str:
    return name if isinstance(name, str) else name()


def as_rgb(picture: Image.Image) -> Image.Image:
    """Any mode of Pillow as RGB; grey of more than 8 bits is scaled down, not cut off at 255."""
    if picture.mode == "RGB":
        return picture
    if picture.mode.startswith("I"):  # 16 bits, also where Pillow widens them to 32
        levels = np.asarray(picture)
        picture = Image.fromarray((np.clip(levels, 0, 65535) // 256).astype(np.uint8))
    elif picture.mode == "P" and "transparency" in picture.info:
        picture = picture.convert("RGBA")  # straight to RGB Pillow warns, and gives the same colours
    return picture.convert("RGB")
