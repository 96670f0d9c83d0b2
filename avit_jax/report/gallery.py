"""A few images with what the model did to them; a picture and its map of depths are two layers of one frame.

Images are chosen by their place in the evaluation, and read by their index in the data.
"""

import base64
import dataclasses
import io
from collections.abc import Sequence

import matplotlib
import numpy as np
from jaxtyping import Bool, Int, UInt8
from PIL import Image

from avit_jax.config import AViTConfig
from avit_jax.data.pipeline import evaluation_images
from avit_jax.data.sources import Images
from avit_jax.evaluation import Evaluation, predict
from avit_jax.model import AViT
from avit_jax.preprocessing import normalize
from avit_jax.report.pictures import depth_map

SHOWN = 8  # images in a gallery
_LONGEST = 224  # pixels of a picture in the page
_HALTED = (126, 126, 126, 225)  # over the patches that are gone: their place stays faintly visible


def easiest(result: Evaluation, count: int = SHOWN) -> Int[np.ndarray, " k"]:
    """The images of the lowest mean depth."""
    return np.argsort(result.image_depths, kind="stable")[:count]


def hardest(result: Evaluation, count: int = SHOWN) -> Int[np.ndarray, " k"]:
    """The images of the highest mean depth."""
    return np.argsort(-result.image_depths, kind="stable")[:count]


def confidently_wrong(result: Evaluation, count: int = SHOWN) -> Int[np.ndarray, " k"]:
    """The wrong answers of the highest confidence."""
    wrong = np.flatnonzero(result.per_image.rank > 1)
    confidence = np.nan_to_num(result.per_image.confidence[wrong])
    return wrong[np.argsort(-confidence, kind="stable")][:count]


def spread(result: Evaluation, count: int) -> Int[np.ndarray, " k"]:
    """Images from the easiest to the hardest, in equal steps of rank by mean depth."""
    order = np.argsort(result.image_depths, kind="stable")
    return order[np.linspace(0, len(order) - 1, min(count, len(order))).round().astype(int)]


def disagreeing(ours: Evaluation, theirs: Evaluation, count: int = SHOWN) -> Int[np.ndarray, " k"]:
    """Images that two models answer differently, those first of which the two are surest together."""
    a, b = ours.per_image, theirs.per_image
    differ = np.flatnonzero(a.prediction != b.prediction)
    surety = np.nan_to_num(a.confidence[differ]) + np.nan_to_num(b.confidence[differ])
    return differ[np.argsort(-surety, kind="stable")][:count]


@dataclasses.dataclass(frozen=True)
class Frame:
    """A picture of the page; both layers are data: URIs, the map has a pixel for each patch."""

    photo: str
    map: str


def frames(model: AViT, split: Images, indices: Sequence[int]) -> dict[int, Frame]:
    """These images run again, alone; nothing of them was kept."""
    wanted = sorted({int(index) for index in indices})
    if not wanted:
        return {}
    images = evaluation_images(split, wanted, model.config)
    depths = np.asarray(predict(model, normalize(images, model.config)).token_depth)
    return {
        index: Frame(photo_uri(image), map_uri(depth, model.config))
        for index, image, depth in zip(wanted, images, depths, strict=True)
    }


def token_depths(model: AViT, split: Images, indices: Sequence[int]) -> Int[np.ndarray, "k n"]:
    """The depths of these images' tokens."""
    images = evaluation_images(split, indices, model.config)
    return np.asarray(predict(model, normalize(images, model.config)).token_depth)


def alive(token_depth: Int[np.ndarray, " n"], config: AViTConfig) -> list[int]:
    """The tokens, special ones included, that go on after each layer."""
    return [int((token_depth > layer).sum()) for layer in range(1, config.depth + 1)]


def covers(token_depth: Int[np.ndarray, " n"], config: AViTConfig) -> list[str]:
    """For each layer a data: URI that covers the patches which do not go on after it."""
    depths = depth_map(token_depth, config)
    return [png_uri(_cover(depths > layer)) for layer in range(1, config.depth + 1)]


def _cover(going: Bool[np.ndarray, "rows columns"]) -> UInt8[np.ndarray, "rows columns 4"]:
    return np.where(going[..., None], np.uint8(0), np.array(_HALTED, np.uint8))


def coloured(token_depth: Int[np.ndarray, " n"], config: AViTConfig) -> UInt8[np.ndarray, "rows columns 3"]:
    """The patches' depths in viridis: layer 1 dark blue, the last layer yellow."""
    shares = (depth_map(token_depth, config) - 1) / max(1, config.depth - 1)
    return matplotlib.colormaps["viridis"](shares, bytes=True)[..., :3]


def map_uri(token_depth: Int[np.ndarray, " n"], config: AViTConfig) -> str:
    """The map of depths, one pixel a patch."""
    return png_uri(coloured(token_depth, config))


def overlay(
    image: UInt8[np.ndarray, "h w c"], token_depth: Int[np.ndarray, " n"], config: AViTConfig, opacity: float = 0.55
) -> Image.Image:
    """The picture, and beside it the same under its map of depths; small ones enlarged."""
    shown = picture(image).convert("RGB")
    factor = -(-_LONGEST // max(shown.size))
    shown = shown.resize((factor * shown.width, factor * shown.height), Image.Resampling.NEAREST)
    depths = Image.fromarray(coloured(token_depth, config)).resize(shown.size, Image.Resampling.NEAREST)
    both = Image.new("RGB", (2 * shown.width + 8, shown.height), "white")
    both.paste(shown, (0, 0))
    both.paste(Image.blend(shown, depths, opacity), (shown.width + 8, 0))
    return both


def picture(image: UInt8[np.ndarray, "h w c"]) -> Image.Image:
    """As a person sees it: colours where there are three channels, else the first one in grey."""
    return Image.fromarray(image if image.shape[-1] == 3 else image[..., 0])


def photo_uri(image: UInt8[np.ndarray, "h w c"]) -> str:
    """A picture for the page: small ones as they are (PNG), larger ones reduced (JPEG)."""
    shown = picture(image)
    if max(shown.size) <= 64:
        return png_uri(np.asarray(shown))
    shown.thumbnail((_LONGEST, _LONGEST))
    stream = io.BytesIO()
    shown.save(stream, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}"


def png_uri(pixels: UInt8[np.ndarray, "..."]) -> str:
    """Pixels as a data: URI."""
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"
