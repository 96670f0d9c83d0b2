"""From pictures to what the model takes."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from avit_jax import AViTConfig, Preprocessing, preprocess
from avit_jax.data.preprocessing import RESAMPLING, resize_and_crop

RGB = AViTConfig(image_size=32, patch_size=16)
GREY = AViTConfig(
    image_size=28, patch_size=4, in_channels=1, preprocessing=Preprocessing((0.13,), (0.31,), crop_fraction=1.0)
)


def picture(height: int, width: int) -> Image.Image:
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3)).astype(np.uint8))


def test_images_of_the_right_size_are_only_normalised() -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, 28, 28, 1)).astype(np.uint8)
    found = preprocess(images, GREY)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, (images / 255 - 0.13) / 0.31, atol=1e-5)
    np.testing.assert_array_equal(preprocess(images[..., 0], GREY), found)
    np.testing.assert_array_equal(preprocess(images[0], GREY), found[:1])
    np.testing.assert_array_equal(preprocess(list(images), GREY), found)
    many = dataclasses.replace(GREY, in_channels=5, preprocessing=Preprocessing((0.5,) * 5, (0.5,) * 5, 1.0))
    assert preprocess(np.zeros((28, 28, 5), np.uint8), many).shape == (1, 28, 28, 5)


@pytest.mark.parametrize(("height", "width"), [(50, 80), (80, 50), (20, 20), (37, 37)])
def test_resize_and_crop_are_pillows(height: int, width: int) -> None:
    """Shorter side to 36 (32 / 0.875) with Pillow's bicubic on the RGB image, then the middle 32, as torchvision."""
    image = picture(height, width)
    short = min(height, width)
    size = (max(36, width * 36 // short), max(36, height * 36 // short))
    resized = np.asarray(image.resize(size, Image.Resampling.BICUBIC))
    top, left = (round((side - 32) / 2.0) for side in resized.shape[:2])
    crop = resized[top : top + 32, left : left + 32] / 255
    expected = (crop - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
    np.testing.assert_allclose(preprocess(image, RGB)[0], expected, atol=1e-5)


@pytest.mark.parametrize("size", [(375, 500), (500, 375), (256, 700), (301, 957), (1105, 340), (823, 331), (100, 180)])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "nearest"])
def test_what_is_left_out_changes_no_pixel(size: tuple[int, int], interpolation: str) -> None:
    """Shorter side to 256, then the middle 224: the model's usual size, and Pillow's order of passes."""
    settings = dataclasses.replace(RGB.preprocessing, interpolation=interpolation, crop_fraction=0.875)
    image, short = picture(*size), min(size)
    rows, columns = (256 * side // short for side in size)
    top, left = (round((side - 224) / 2) for side in (rows, columns))
    expected = image.resize((columns, rows), RESAMPLING[interpolation]).crop((left, top, left + 224, top + 224))
    found = resize_and_crop(image, AViTConfig(preprocessing=settings))
    np.testing.assert_array_equal(np.asarray(found), np.asarray(expected))


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1", "LA"])
def test_any_mode_of_picture_is_taken(mode: str) -> None:
    image = picture(40, 40).convert("L").convert(mode) if mode == "LA" else picture(40, 40).convert(mode)
    assert preprocess(image, RGB).shape == (1, 32, 32, 3)
    assert preprocess([image, image], GREY).shape == (2, 28, 28, 1)


def test_rectangular_models_are_covered() -> None:
    config = dataclasses.replace(RGB, image_size=(48, 16))
    assert preprocess([picture(30, 90), picture(90, 30)], config).shape == (2, 48, 16, 3)


@pytest.mark.parametrize(
    ("images", "reason"),
    [
        (np.zeros((32, 32, 3), np.float32), "float32: give uint8"),
        (np.zeros((2, 32, 32, 2), np.uint8), r"\(32, 32, 2\): the model takes \[height, width, 3\]"),
        (np.zeros(5, np.uint8), r"shape \(5,\)"),
        ([], "the sequence is empty"),
    ],
)
def test_other_things_are_refused(images: object, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        preprocess(images, RGB)


def test_whatever_holds_a_picture_is_taken(tmp_path: Path) -> None:
    image, file = picture(40, 50), tmp_path / "a.png"
    image.save(file)
    expected = preprocess(image, RGB)
    for given in (np.asarray(image), str(file), file, file.read_bytes(), [str(file)], [file], [np.asarray(image)]):
        np.testing.assert_array_equal(preprocess(given, RGB), expected)
    torch = pytest.importorskip("torch")
    np.testing.assert_array_equal(preprocess(torch.tensor(np.array(image)), RGB), expected)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (
            (np.zeros((32, 32, 3), np.uint8),),
            r"configuration, but config is missing: preprocess\(images, model.config\)",
        ),
        ((np.zeros((32, 32, 3), np.uint8), "tiny"), r"config is a str: preprocess\(images, model.config\)"),
        ((["nowhere.jpg"], RGB), r"nowhere.jpg cannot be read \(No such file or directory\)"),
        ((np.zeros((40, 50), np.uint8), RGB), r"shape \(40, 50\): .*np.repeat\(image\[..., None\], 3, axis=-1\)"),
        ((np.zeros((3, 40, 50), np.uint8), RGB), r"shape \(3, 40, 50\): .*channels come last: np.moveaxis"),
        ((np.zeros((0, 32, 32, 3), np.uint8), RGB), r"there is no image .* shape \(0, 32, 32, 3\)"),
        (([np.zeros((0, 5, 3), np.uint8)], RGB), r"an image has shape \(0, 5, 3\)"),
        ((None, RGB), "an image is a NoneType: give uint8"),
        (([[1, 2], [3]], RGB), "images are int64: give uint8|inhomogeneous"),
        ((b"no picture", RGB), "an image of 10 bytes is not an image that Pillow can read"),
    ],
)
def test_each_mistake_has_its_sentence(arguments: tuple[object, ...], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        preprocess(*arguments)


def test_a_picture_in_colour_is_no_batch_for_a_grey_model() -> None:
    config = AViTConfig(
        image_size=8, patch_size=4, in_channels=1, embed_dim=8, num_heads=2, preprocessing=Preprocessing((0.5,), (0.5,))
    )
    for channels in (3, 4):
        with pytest.raises(ValueError, match="one picture in colour"):
            preprocess(np.zeros((30, 40, channels), np.uint8), config)
    assert preprocess(np.zeros((30, 8, 8), np.uint8), config).shape == (30, 8, 8, 1)
