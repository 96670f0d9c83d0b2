"""Scattered items: every item here is a square of its own grey, so a picture's pixels say what is in it."""

import dataclasses
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest

import avit_jax
from avit_jax import Preprocessing
from avit_jax.commands.config_files import load_config
from avit_jax.commands.typed_config import parse
from avit_jax.data.account import check_data, data_account
from avit_jax.data.open import open_dataset
from avit_jax.data.pipeline import evaluation_batches, evaluation_images, training_batches
from avit_jax.data.scattered import Placement, ScatteredSplit, Scene
from avit_jax.data.settings import AugmentSettings, DataSettings
from avit_jax.data.sources import Dataset, Split
from avit_jax.train.start import initial_model
from tests.harness.builders import small_config
from tests.test_account import begun
from tests.test_pipeline import idx_folder

CLASSES = 3
COUNTS = {"train": 60, "t10k": 9}
GREYS = {"train": 20 + 3 * np.arange(60), "t10k": 201 + 3 * np.arange(9)}  # no grey twice, none as dark as background
RECORDED = 875078116  # CRC-32 of the test pictures


def idx(values: np.ndarray) -> bytes:
    """An array as an idx file has it."""
    return bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}i", *values.shape) + values.tobytes()


def squares(folder: Path, side: int = 28, count: int | None = None) -> Path:
    """An idx folder of items that are filled with one grey each; their classes are 0, 1, 2, 0, 1, 2, ..."""
    files = {}
    for purpose, greys in GREYS.items():
        greys = greys[:count]
        files[f"{purpose}_images_idx3"] = idx(np.repeat(greys, side * side).reshape(-1, side, side).astype(np.uint8))
        files[f"{purpose}_labels_idx1"] = idx((np.arange(len(greys)) % CLASSES).astype(np.uint8))
    return idx_folder(folder, compressed=True, **files)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return squares(tmp_path_factory.mktemp("scattered") / "idx")


def opened(folder: Path, **settings: object) -> Dataset[ScatteredSplit]:
    return open_dataset(DataSettings(source="scattered", path=str(folder), **settings))


def pictures(split: ScatteredSplit) -> np.ndarray:
    return np.stack([split[index]["image"] for index in range(len(split))])


def many(count: int = 600) -> ScatteredSplit:
    """A split of so many items, for what is said of scenes alone."""
    items = Split(np.full((count, 28, 28, 1), 200, np.uint8), np.zeros(count, np.int32))
    return ScatteredSplit(items, 0, "many", DataSettings())


def greys_in(split: ScatteredSplit) -> set[int]:
    return set(np.unique(pictures(split)).tolist()) - {0}


def test_a_picture_is_the_same_whoever_makes_it_and_when(folder: Path) -> None:
    first, second = opened(folder), opened(folder)
    backwards = [second.test[index]["image"] for index in reversed(range(9))]
    np.testing.assert_array_equal(pictures(first.test), backwards[::-1])
    # The same in every process and version. Squares of one grey do not depend on how Pillow resizes.
    assert zlib.crc32(pictures(first.test).tobytes()) == RECORDED
    assert len({image.tobytes() for image in pictures(many(50))}) == 50


def test_every_split_has_pictures_of_its_own_items_alone(folder: Path) -> None:
    dataset = opened(folder)
    assert [len(split) for split in (dataset.train, dataset.val, dataset.test)] == [54, 6, 9]
    train, val, test = map(greys_in, (dataset.train, dataset.val, dataset.test))
    assert train | val == set(GREYS["train"].tolist()) and not train & val
    assert test == set(GREYS["t10k"].tolist())
    scales = [split.scene(0).items[-1].scale for split in (dataset.train, dataset.val, dataset.test)]
    assert len(set(scales)) == 3, "splits have seeds of their own"


def test_the_label_is_that_of_the_largest_item(folder: Path) -> None:
    """The grey of most pixels says it, because nothing covers the largest item."""
    dataset = opened(folder)
    for split, greys in ((dataset.train, GREYS["train"]), (dataset.test, GREYS["t10k"])):
        for index in range(len(split)):
            element = split[index]
            pixels = np.bincount(element["image"].ravel(), minlength=256)
            pixels[0] = 0
            assert element["label"] == list(greys).index(pixels.argmax()) % CLASSES
            assert element["label"] == split.labels[index]
            items = split.scene(index).items
            largest = max(items, key=lambda placed: placed.width * placed.height)
            assert largest is items[-1] and largest.item == index


def test_a_picture_shows_its_scene(folder: Path) -> None:
    """Against a loop over pixels: each has the grey of the last thing that was put there."""
    split = opened(folder).train
    for index in range(0, len(split), 5):
        scene, expected = split.scene(index), np.zeros((56, 56), np.uint8)
        for placed in (*scene.pieces, *scene.items):
            for row in range(placed.top, placed.top + placed.height):
                for column in range(placed.left, placed.left + placed.width):
                    expected[row, column] = split.items.images[placed.item, 0, 0, 0]
        np.testing.assert_array_equal(split[index]["image"], expected[..., None])


def test_items_are_whole_and_upright_and_their_background_hides_nothing() -> None:
    """Items are black on the left and get brighter from column 8 on and from top to bottom."""
    item = np.zeros((28, 28), np.uint8)
    item[:, 8:] = np.arange(100, 100 + 28 * 5, 5)[:, None]
    split = ScatteredSplit(Split(np.stack([item] * 40)[..., None], np.zeros(40, int)), 0, "", DataSettings())
    covered = 0
    for index in range(40):
        picture, scene = split[index]["image"][..., 0], split.scene(index)
        *below, largest = scene.items
        shown = picture[largest.top : largest.top + largest.height, largest.left : largest.left + largest.width]
        bright = shown[:, largest.width // 2 :].astype(int)
        assert (np.diff(bright, axis=0) >= 0).all() and (np.ptp(bright, axis=1) == 0).all()
        assert bright[0, 0] <= 110 and bright[-1, 0] >= 225
        before = dataclasses.replace(scene, items=tuple(below))
        black = slice(largest.left, largest.left + largest.width // 5)
        there = split.paint(before)[largest.top : largest.top + largest.height, black]
        np.testing.assert_array_equal(shown[:, : there.shape[1]], there[..., 0])
        covered += bool(there.any())
    assert covered > 5, "something was seen through the background"
    piece = split.scene(0).pieces[0]
    alone = split.paint(Scene((piece,), ()))[..., 0]
    left, top, right, bottom = piece.box
    cut = alone[piece.top : piece.top + piece.height, piece.left : piece.left + piece.width]
    np.testing.assert_array_equal(cut, item[top:bottom, left:right])


def test_numbers_and_scales_of_items() -> None:
    split = many()
    scenes = [split.scene(index).items for index in range(len(split))]
    shares = np.bincount([len(items) for items in scenes]) / len(split)
    np.testing.assert_allclose(shares, [0, 1 / 3, 1 / 3, 1 / 3], atol=0.08)  # four deviations
    alone = [items[0].scale for items in scenes if len(items) == 1]
    assert 0.5 <= min(alone) < 0.52 and 1.48 < max(alone) <= 1.5
    for *others, largest in scenes:
        assert not others or largest.scale >= 0.5 / 0.7
        for placed in others:
            assert 0.5 <= placed.scale <= 0.7 * largest.scale
            assert placed.item != largest.item
        assert {(placed.width, placed.height) for placed in (*others, largest)} == {
            (round(28 * placed.scale),) * 2 for placed in (*others, largest)
        }


def test_every_picture_has_clutter() -> None:
    split = many()
    pieces = [split.scene(index).pieces for index in range(len(split))]
    assert {len(found) for found in pieces} == {4, 5, 6, 7, 8}
    assert {placed.width for found in pieces for placed in found} == {6, 7, 8, 9, 10}
    for index, found in enumerate(pieces):
        for placed in found:
            left, top, right, bottom = placed.box
            assert placed.width == placed.height == right - left == bottom - top
            assert min(placed.box) >= 7 and max(placed.box) <= 21
            assert placed.item != index


def test_things_are_anywhere_in_the_picture_and_wholly_inside() -> None:
    split = many()
    scenes = [split.scene(index) for index in range(len(split))]
    gaps = [free(placed) for scene in scenes for placed in (*scene.pieces, *scene.items)]
    assert np.min(gaps) == 0
    assert (np.equal(gaps, 0).sum(axis=0) > 20).all(), "things reach every edge of the picture"
    lefts = np.array([scene.items[-1].left / (56 - scene.items[-1].width) for scene in scenes])
    np.testing.assert_allclose(np.quantile(lefts, [0.25, 0.5, 0.75]), [0.25, 0.5, 0.75], atol=0.08)


def free(placed: Placement) -> tuple[int, int, int, int]:
    """The pixels to the picture's left, top, right and bottom."""
    return placed.left, placed.top, 56 - placed.left - placed.width, 56 - placed.top - placed.height


@pytest.mark.parametrize("index", [9, -10])
def test_there_are_as_many_pictures_as_items(folder: Path, index: int) -> None:
    split = opened(folder).test
    with pytest.raises(IndexError):
        split[index]
    np.testing.assert_array_equal(split[8]["image"], split[-1]["image"])
    assert split.name(8) == f"test items of {folder}, picture 8"


def test_evaluation_sees_the_pictures_as_they_are(folder: Path) -> None:
    split = opened(folder, crop_fraction=1.0).test
    for channels in (1, 3):
        half = (0.5,) * channels
        preprocessing = Preprocessing(half, half, crop_fraction=1.0)
        config = small_config(image_size=56, in_channels=channels, preprocessing=preprocessing)
        expected = np.repeat(pictures(split), channels, axis=-1)
        images = np.concatenate([batch["image"] for batch in evaluation_batches(split, config, 3)])
        np.testing.assert_array_equal(images, expected)
        np.testing.assert_array_equal(evaluation_images(split, range(9), config), expected)


def test_training_batches_are_the_same_with_and_without_worker_processes(folder: Path) -> None:
    preprocessing = Preprocessing((0.5,), (0.5,), crop_fraction=1.0)
    config = small_config(image_size=56, in_channels=1, preprocessing=preprocessing)

    def first(**settings: int) -> dict[str, np.ndarray]:
        split = opened(folder, **settings).train
        batches = training_batches(split, config, batch_size=54, seed=0, augment=AugmentSettings())
        batch = next(batches)
        batches.close()
        return batch

    here, there = first(), first(workers=1)
    np.testing.assert_array_equal(here["image"], there["image"])
    own = pictures(opened(folder).train)
    assert sorted(image.tobytes() for image in here["image"]) == sorted(image.tobytes() for image in own)


def test_folders_that_cannot_be_used_are_refused_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing' is not a folder: give the one with train-images"):
        opened(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty has no train-images-idx3-ubyte or train-images-idx3-ubyte.gz"):
        opened(tmp_path / "empty")
    small = squares(tmp_path / "small", side=7)
    with pytest.raises(ValueError, match=r"small has images of 7x7 pixels: scattered items need at least 8x8$"):
        opened(small)
    few = squares(tmp_path / "few", count=9)
    with pytest.raises(ValueError, match=r"few has too few images for validation, \d: a picture needs at least 2"):
        opened(few)
    assert opened(squares(tmp_path / "least", side=8)).test[0]["image"].shape == (16, 16, 1)


def test_a_run_does_not_go_on_with_other_items(tmp_path: Path, folder: Path) -> None:
    run = begun(tmp_path / "run", data_account(opened(folder)))
    check_data(data_account(opened(folder)), run)
    with pytest.raises(ValueError, match="the checksums of items differ"):
        check_data(data_account(opened(squares(tmp_path / "other", side=8))), run)


def test_the_config_starts_from_fashion_mnists_model_with_resized_positions(
    folder: Path, capsys: pytest.CaptureFixture
) -> None:
    config = load_config("scattered:dense")
    config.data.path = str(folder)
    settings = parse(config)
    model = initial_model(settings, open_dataset(settings.data))
    start = avit_jax.load(config.init_from)
    assert (start.config.num_tokens, model.config.num_tokens) == (50, 197)
    assert "pos_embed was resized from 7x7 to 14x14 patches" in capsys.readouterr().out
    np.testing.assert_array_equal(model.patch_embed.proj.kernel[...], start.patch_embed.proj.kernel[...])
    assert model.config.preprocessing == Preprocessing((0.1555,), (0.2903,), crop_fraction=1.0)
    known = "dense, static, layers, avit, avit_hidden, positions, tome, evit"
    with pytest.raises(ValueError, match=f"'act' is not one of {known}"):
        load_config("scattered:act")
