"""A few images and what the model did to them: each picture, and beside it its map of depths.

Images are chosen by their place in the evaluation, and read by their index in the data.
"""

import base64
import dataclasses
import io
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int, UInt8
from PIL import Image, ImageDraw, ImageFont

from avit_jax.data.pipeline import evaluation_images
from avit_jax.data.preprocessing import normalize
from avit_jax.data.sources import Images
from avit_jax.evaluate.figures import Evaluation
from avit_jax.execution.compiled import predict
from avit_jax.model.config import AViTConfig
from avit_jax.model.vit import AViT
from avit_jax.report.depth_colours import coloured, ticks
from avit_jax.report.pictures import depth_map

SHOWN = 8  # images in a gallery
_LONGEST = 224  # pixels of a picture in the page
_GAP = 8  # pixels between a picture and its map
_HALTED = (126, 126, 126, 225)  # over patches that have halted, which stay faintly visible


def shallowest(result: Evaluation, count: int = SHOWN) -> Int[np.ndarray, " k"]:
    """The images with the lowest mean depth, by their place in the evaluation."""
    return np.argsort(result.image_depths, kind="stable")[:count]


def deepest(result: Evaluation, count: int = SHOWN) -> Int[np.ndarray, " k"]:
    """The images with the highest mean depth, by their place in the evaluation."""
    return np.argsort(-result.image_depths, kind="stable")[:count]


def confidently_wrong(result: Evaluation, count: int = SHOWN) -> Int[np.ndarray, " k"]:
    """The wrong answers with the highest confidence, by their place in the evaluation."""
    wrong = np.flatnonzero(result.per_image.rank > 1)
    confidence = np.nan_to_num(result.per_image.confidence[wrong])
    return wrong[np.argsort(-confidence, kind="stable")][:count]


def spread(result: Evaluation, count: int) -> Int[np.ndarray, " k"]:
    """Images from the lowest mean depth to the highest, in equal steps of rank, by their place in the evaluation."""
    order = np.argsort(result.image_depths, kind="stable")
    return order[np.linspace(0, len(order) - 1, min(count, len(order))).round().astype(int)]


def disagreeing(ours: Evaluation, theirs: Evaluation, count: int = SHOWN) -> Int[np.ndarray, " k"]:
    """Images that two models answer differently, those with the highest sum of confidences first, by their place."""
    a, b = ours.per_image, theirs.per_image
    differ = np.flatnonzero(a.prediction != b.prediction)
    surety = np.nan_to_num(a.confidence[differ]) + np.nan_to_num(b.confidence[differ])
    return differ[np.argsort(-surety, kind="stable")][:count]


@dataclasses.dataclass(frozen=True)
class Frame:
    """A picture of the page and its map of depths, which has a pixel for each patch; both are data: URIs."""

    photo: str
    map: str


def frames(model: AViT, split: Images, indices: Sequence[int]) -> dict[int, Frame]:
    """The frames of these images, by index in the data. They are run again, because nothing of them was kept."""
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
    """The token depths of these images, by index in the data."""
    images = evaluation_images(split, indices, model.config)
    return np.asarray(predict(model, normalize(images, model.config)).token_depth)


def alive(token_depth: Int[np.ndarray, " n"], model_config: AViTConfig) -> list[int]:
    """The number of tokens, special ones included, that go on after each layer."""
    return [int((token_depth > layer).sum()) for layer in range(1, model_config.depth + 1)]


def covers(token_depth: Int[np.ndarray, " n"], model_config: AViTConfig) -> list[str]:
    """For each layer a data: URI that covers the patches which do not go on after it."""
    depths = depth_map(token_depth, model_config)
    return [png_uri(_cover(depths > layer)) for layer in range(1, model_config.depth + 1)]


def _cover(going: Bool[np.ndarray, "rows columns"]) -> UInt8[np.ndarray, "rows columns 4"]:
    return np.where(going[..., None], np.uint8(0), np.array(_HALTED, np.uint8))


def map_uri(token_depth: Int[np.ndarray, " n"], model_config: AViTConfig) -> str:
    """The map of depths, one pixel a patch, in the colours of depth_colours."""
    return png_uri(coloured(depth_map(token_depth, model_config), model_config.depth))


def side_by_side(
    image: UInt8[np.ndarray, "h w c"], token_depth: Int[np.ndarray, " n"], model_config: AViTConfig
) -> Image.Image:
    """The picture, its map of depths, and the colours of the layers, side by side; small pictures are enlarged."""
    shown = picture(image).convert("RGB")
    factor = -(-_LONGEST // max(shown.size))
    shown = shown.resize((factor * shown.width, factor * shown.height), Image.Resampling.NEAREST)
    depths = Image.fromarray(coloured(depth_map(token_depth, model_config), model_config.depth))
    key = _key(model_config.depth, shown.height)
    found = Image.new("RGB", (2 * shown.width + 2 * _GAP + key.width, shown.height), "white")
    found.paste(shown, (0, 0))
    found.paste(depths.resize(shown.size, Image.Resampling.NEAREST), (shown.width + _GAP, 0))
    found.paste(key, (2 * shown.width + 2 * _GAP, 0))
    return found


def _key(depth: int, height: int) -> Image.Image:
    """The colours of the layers with their numbers, the last layer at the top."""
    colours = coloured(np.arange(depth, 0, -1)[:, None], depth)
    bar = Image.fromarray(colours).resize((14, height), Image.Resampling.NEAREST)
    found = Image.new("RGB", (14 + 26, height), "white")
    found.paste(bar, (0, 0))
    pen, size = ImageDraw.Draw(found), min(13, max(6, height // 4))
    # Only as many numbers as fit.
    layers = ticks(depth) if height >= 2 * size * len(ticks(depth)) else sorted({1, depth})
    for layer in layers:
        middle = height * (depth - layer + 0.5) / depth
        top = min(max(middle - size / 2, 0), height - size)
        pen.text((18, top), str(layer), fill="black", font=ImageFont.load_default(size))
    return found


def picture(image: UInt8[np.ndarray, "h w c"]) -> Image.Image:
    """The image for people: in colour if there are three channels, otherwise the first one in grey."""
    return Image.fromarray(image if image.shape[-1] == 3 else image[..., 0])


def photo_uri(image: UInt8[np.ndarray, "h w c"]) -> str:
    """A picture for the page as a data: URI: small ones unchanged (PNG), larger ones reduced (JPEG)."""
    shown = picture(image)
    if max(shown.size) <= 64:
        return png_uri(np.asarray(shown))
    shown.thumbnail((_LONGEST, _LONGEST))
    stream = io.BytesIO()
    shown.save(stream, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}"


def png_uri(pixels: UInt8[np.ndarray, "..."]) -> str:
    """Pixels as a PNG in a data: URI."""
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"
