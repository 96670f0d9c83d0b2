"""Decoding of image files to RGB pictures; a file that cannot be decoded is refused in one sentence that says why."""

import io
import os
import re
import stat
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageFile

from avit_jax.runtime.files import shown

# Pillow only warns about pictures above 89 megapixels and decodes them anyway. Here that is an error.
warnings.simplefilter("error", Image.DecompressionBombWarning)

# Pillow warns about every damaged tag, which can be megabytes of text. Only the picture itself matters here.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")

# No other format is tried, whatever the file's name: Pillow passes EPS to Ghostscript and has forty rare decoders.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
MAX_FILE_SIZE = 256_000_000  # bytes
MAX_SIDE = 1_000_000  # pixels; Pillow keeps a pointer for each row
MAX_SCANNED_PIXELS = 2_000_000_000  # of all scans of a JPEG together: libjpeg processes the whole picture in each
MAX_HEADER_READS = 100_000  # reads that Pillow makes, in Python, before it knows the size of the picture
MAX_JPEG_HEADER = 2**24  # bytes before the picture; Pillow copies all of them again for each segment
MAX_TILES = 100_000  # strips of a TIFF, which Pillow reads one by one in Python
FREE_MEMORY = 190_000_000  # bytes that any picture may take while it is decoded
MEMORY_PER_BYTE = 200  # and this many more for each byte of its file: photographs take far less, bombs up to a million
MAX_SLOW_PIXELS = 4_000_000  # of a run-length encoded BMP, which Pillow decodes in Python, at 10 million a second
MAX_SLOWEST_PIXELS = 1_000_000  # of a PPM whose largest value is not 255: Pillow decodes each pixel in Python
MAX_SLOW_BYTES = 4_000_000  # of a plain-text PPM, which it also decodes in Python; twice as many for such a BMP


class BadData(ValueError):
    """Something in the data that cannot be used; the message gives its name and the reason."""


class BadImage(BadData):
    """An image that cannot be decoded; on_bad_image = "skip" skips it."""


class _Refused(Exception):
    """A file that is not read, or a picture that would take too much time or memory."""


class _Header(io.BytesIO):
    """A picture's file in memory. While `counting` is True, it limits how much Pillow may read."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self.counting = True
        self._reads_left = MAX_HEADER_READS
        self._bytes_left = MAX_JPEG_HEADER if data.startswith(b"\xff\xd8") else sys.maxsize

    def read(self, size: int | None = -1) -> bytes:
        """At most `size` bytes. Raises _Refused if the header is far larger than any picture needs."""
        found = super().read(size)
        if self.counting:
            self._reads_left -= 1
            self._bytes_left -= len(found)
            if self._reads_left < 0 or self._bytes_left < 0:
                raise _Refused("has a header far larger than a picture needs: save it again")
        return found


def decode(source: bytes | Path, name: str | Callable[[], str], *, upright: bool = False) -> Image.Image:
    """Decode a picture to RGB as PyTorch's loader does: drop alpha, convert CMYK, take the first of several.

    source: a file's path or its content. name: what the error calls the picture, or a function that returns that.
    upright: turn the picture as its EXIF tag says, which PyTorch's loader does not do. Raises BadImage if the file is
    not a JPEG, PNG, WebP, GIF, BMP, TIFF or PPM picture, is damaged or truncated, is not a regular file, or is too
    large (89 megapixels, 256 MB).
    """
    try:
        data = source if isinstance(source, bytes) else read_file(source)
        header = _Header(data)
        with Image.open(header, formats=FORMATS) as picture:
            header.counting = False
            _check_cost(picture, data)
            picture.load()
            rgb = as_rgb(picture)
            return _upright(rgb) if upright else rgb
    except _Refused as error:
        raise BadImage(f"{_called(name)} {error}") from None
    except Image.UnidentifiedImageError:
        what = f"is not an image that Pillow can read as {', '.join(FORMATS)}" if data else "is empty"
        raise BadImage(f"{_called(name)} {what}: remove it or replace it") from None
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        limit = (Image.MAX_IMAGE_PIXELS or 0) / 1e6
        raise BadImage(
            f"{_called(name)} has more than {limit:.0f} megapixels, which may be a decompression bomb: make it smaller"
        ) from None
    except Exception as error:  # Pillow's formats raise OSError, SyntaxError, struct.error and others
        reason = getattr(error, "strerror", None) or shown(str(error).strip()) or type(error).__name__
        raise BadImage(f"{_called(name)} cannot be read ({reason}): replace the file") from error


def read_file(path: Path) -> bytes:
    """The content of a regular file of at most 256 MB. Raises _Refused for any other file, without waiting for it."""
    # Without O_NONBLOCK, opening a pipe that nobody writes to would wait forever.
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    with os.fdopen(descriptor, "rb") as stream:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise _Refused("is not a regular file: remove it")
        if found.st_size <= MAX_FILE_SIZE:
            data = stream.read(MAX_FILE_SIZE + 1)  # some file systems report a size of 0
            if len(data) <= MAX_FILE_SIZE:
                return data
    raise _Refused(f"is larger than {MAX_FILE_SIZE / 1e6:.0f} MB, too large for one picture: make it smaller")


def _check_cost(picture: ImageFile.ImageFile, data: bytes) -> None:
    """Raises _Refused if decoding would take far more time or memory than the file suggests; decodes nothing."""
    width, height = picture.size
    if Image.MAX_IMAGE_PIXELS and width * height > Image.MAX_IMAGE_PIXELS:
        raise Image.DecompressionBombError  # in case the program has reset the warning filters
    if max(width, height) > MAX_SIDE:
        raise _Refused(f"is {width} x {height} pixels, and a side may have at most {MAX_SIDE:,}: make it smaller")
    needed = width * height * _bytes_a_pixel(picture)
    if needed > FREE_MEMORY + MEMORY_PER_BYTE * len(data):
        raise _Refused(
            f"takes about {needed / 1e6:.0f} MB to decode and its file has {len(data) / 1e6:.1f} MB, which may be a "
            "decompression bomb: make it smaller"
        )
    if picture.format in ("JPEG", "MPO"):
        scans = _count_scans(data)
        if scans * width * height > MAX_SCANNED_PIXELS and scans > 4:  # 4: one for each component
            raise _Refused(f"is a JPEG of {scans} scans, too many for {width} x {height} pixels: save it again")
    if len(picture.tile) > MAX_TILES:
        raise _Refused(f"has its pixels in {len(picture.tile):,} strips, more than {MAX_TILES:,}: save it again")
    if picture.format == "PPM" and width * height > MAX_SLOWEST_PIXELS and picture.tile[0][0] == "ppm":
        raise _Refused(f"is a PPM of unusual depth and more than {MAX_SLOWEST_PIXELS:,} pixels: save it as PNG")
    slow = width * height > MAX_SLOW_PIXELS or len(data) > 2 * MAX_SLOW_BYTES
    if picture.format == "BMP" and slow and picture.tile[0][0] == "bmp_rle":
        raise _Refused(
            f"is a run-length encoded BMP of more than {MAX_SLOW_PIXELS:,} pixels or {2 * MAX_SLOW_BYTES / 1e6:.0f} MB"
            ": save it as PNG"
        )
    if picture.format == "PPM" and len(data) > MAX_SLOW_BYTES and picture.tile[0][0] == "ppm_plain":
        raise _Refused(f"is a PPM in plain text of more than {MAX_SLOW_BYTES / 1e6:.0f} MB: save it as PNG")


def _bytes_a_pixel(picture: ImageFile.ImageFile) -> int:
    """Peak memory of decoding to RGB, in bytes a pixel: measured with Pillow 13, rounded up."""
    if picture.format == "WEBP":  # libwebp's animation reader holds several canvases
        return 16
    return 5 if picture.mode in ("1", "L", "P", "RGB") else 9


def _count_scans(data: bytes) -> int:
    """The number of scans of the first picture in a JPEG file, without thumbnails and anything after the picture."""
    scans, place = 0, 2
    # A marker is ff and another byte. Inside a scan, ff followed by 00 or d0 to d7 is part of the scan.
    while marker := _MARKER.search(data, place):
        place = marker.end()
        kind = data[place - 1]
        if kind == 0xD9:  # the end of the picture
            break
        scans += kind == 0xDA
        if kind not in (0x01, 0xD8):  # all other markers have a length
            place += int.from_bytes(data[place : place + 2], "big")
    return scans


_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")


# The EXIF orientation tag, and the transposition that turns a picture stored that way upright.
_TURNED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _upright(picture: Image.Image) -> Image.Image:
    """The picture turned upright by its EXIF tag; ImageOps.exif_transpose rewrites all tags and fails on bad ones."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            turn = _TURNED.get(picture.getexif().get(ExifTags.Base.Orientation) or 1)
    except Exception:  # a damaged tag is ignored
        turn = None
    return picture if turn is None else picture.transpose(turn)


def _called(name: str | Callable[[], str]) -> str:
    return shown(name if isinstance(name, str) else name(), 400)


def as_rgb(picture: Image.Image) -> Image.Image:
    """A picture of any Pillow mode as RGB. Grey with more than 8 bits is scaled down, not clipped at 255."""
    if picture.mode == "RGB":
        return picture
    if picture.mode.startswith("I"):  # 16 bits, which Pillow widens to 32 for some formats
        picture = _high_bytes(picture)
    elif picture.mode == "P" and "transparency" in picture.info:
        picture = picture.convert("RGBA")  # Pillow warns if it converts straight to RGB, for the same colours
    return picture.convert("RGB")


def _high_bytes(picture: Image.Image) -> Image.Image:
    """16-bit grey as 8-bit grey, a few rows at a time because NumPy makes several copies."""
    grey, rows = Image.new("L", picture.size), max(1, 2**22 // picture.width)
    for top in range(0, picture.height, rows):
        levels = np.asarray(picture.crop((0, top, picture.width, min(top + rows, picture.height))))
        grey.paste(Image.fromarray((np.clip(levels, 0, 65535) // 256).astype(np.uint8)), (0, top))
    return grey
