"""Sources, augmentation, and batches that count every image once."""

import gzip
import struct
from pathlib import Path

import jax
import numpy as np
import pytest

from avit_jax.data.augment import affine
from avit_jax.data.device import DeviceBatches
from avit_jax.data.pipeline import evaluation_batches, training_batches
from avit_jax.data.settings import AugmentSettings
from avit_jax.data.sources import Dataset, Split, load_dataset
from tests.harness.builders import small_config, toy_arrays


@pytest.fixture(scope="module")
def mnist() -> Dataset:
    return load_dataset("mnist")


def numbered(count: int) -> Split:
    """Images that tell their own index."""
    images = np.zeros((count, 12, 8, 2), np.uint8)
    images[:] = np.arange(count)[:, None, None, None]
    return Split(images, np.arange(count))


def stream(split: Split, seed: int = 0, batch_size: int = 4, **augment: float) -> object:
    config = small_config(preprocessing=grey_preprocessing())
    return training_batches(split, config, batch_size=batch_size, seed=seed, augment=AugmentSettings(**augment))


def grey_preprocessing() -> object:
    from avit_jax import Preprocessing

    return Preprocessing((0.0, 0.0), (1.0, 1.0))


def test_mnist_is_split_for_ever(mnist: Dataset) -> None:
    assert [len(part) for part in (mnist.train, mnist.val, mnist.test)] == [3600, 400, 1000]
    for part, each in ((mnist.train, 360), (mnist.val, 40), (mnist.test, 100)):
        assert np.bincount(part.labels).tolist() == [each] * 10
        assert part.images.dtype == np.uint8
        assert part.images.shape[1:] == (28, 28, 1)
    images = np.concatenate([part.images for part in (mnist.train, mnist.val, mnist.test)])
    assert len(np.unique(images.reshape(5000, -1), axis=0)) == 5000, "no image is in two parts"
    # Sums of all test pixels and of the first test image: a changed split would move them.
    assert int(mnist.test.images.sum(dtype=np.int64)) == 26_396_458
    assert int(mnist.test.images[0].sum(dtype=np.int64)) == 15_777


def test_an_epoch_holds_every_image_once() -> None:
    batches = stream(numbered(12))
    epochs = [np.concatenate([next(batches)["label"] for _ in range(3)]) for _ in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(12))
    assert epochs[0].tolist() != epochs[1].tolist() != list(range(12))


def test_the_seed_decides_order_and_augmentation() -> None:
    first, same, other = (stream(numbered(12), seed, rotate=30.0) for seed in (0, 0, 1))
    a, b, c = (next(batches) for batches in (first, same, other))
    np.testing.assert_array_equal(a["image"], b["image"])
    np.testing.assert_array_equal(a["label"], b["label"])
    assert a["label"].tolist() != c["label"].tolist()


def test_the_stream_goes_on_from_its_state() -> None:
    batches = stream(numbered(12), translate=2.0)
    for _ in range(4):
        next(batches)
    state = batches.get_state()
    expected = [next(batches) for _ in range(3)]
    resumed = stream(numbered(12), translate=2.0)
    resumed.set_state(state)
    for batch in expected:
        np.testing.assert_array_equal(next(resumed)["image"], batch["image"])


def test_batches_placed_ahead_are_the_same_and_go_on_exactly() -> None:
    plain, placed = stream(numbered(12)), []
    batches = DeviceBatches(stream(numbered(12)), lambda batch: placed.append(1) or jax.device_put(batch), ahead=3)
    for _ in range(4):
        np.testing.assert_array_equal(next(batches)["image"], next(plain)["image"])
    assert len(placed) == 4 + 2
    assert isinstance(next(batches)["image"], jax.Array)
    next(plain)
    assert batches.get_state() == plain.get_state()
    resumed = DeviceBatches(stream(numbered(12)), jax.device_put)
    next(resumed)
    resumed.set_state(batches.get_state())
    np.testing.assert_array_equal(next(resumed)["image"], next(plain)["image"])


def test_a_batch_larger_than_the_data_is_refused() -> None:
    with pytest.raises(ValueError, match="config.batch_size 13 is larger than the 12 training images"):
        stream(numbered(12), batch_size=13)


def test_evaluation_counts_every_image_once_with_a_short_last_batch() -> None:
    batches = list(evaluation_batches(numbered(10), small_config(preprocessing=grey_preprocessing()), 4))
    assert [batch["image"].shape for batch in batches] == [(4, 12, 8, 2)] * 3
    weight = np.concatenate([batch["weight"] for batch in batches])
    labels = np.concatenate([batch["label"] for batch in batches])
    assert labels[weight > 0].tolist() == list(range(10))
    assert weight.sum() == 10


def spot(row: int, column: int) -> np.ndarray:
    image = np.zeros((21, 21, 1), np.uint8)
    image[row, column] = 255
    return image


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, (5, 10)),
        ({"translate": (3.0, 1.0)}, (6, 13)),
        ({"rotate": 90.0}, (10, 5)),  # counter-clockwise: the top goes to the left
        ({"scale": 2.0}, (0, 10)),
        ({"shear": 0.4}, (5, 12)),
    ],
)
def test_affine_moves_a_spot_where_it_should(change: dict[str, object], expected: tuple[int, int]) -> None:
    found = affine(spot(5, 10), **({"rotate": 0.0, "scale": 1.0, "shear": 0.0, "translate": (0.0, 0.0)} | change))
    assert found.shape == (21, 21, 1)
    assert np.unravel_index(found.argmax(), (21, 21)) == expected


def test_npz_with_names_and_its_own_test_set(tmp_path: Path) -> None:
    arrays = toy_arrays(60)
    path = tmp_path / "mine.npz"
    more = toy_arrays(9, seed=1)
    names = np.array(["top", "middle", "bottom"])
    np.savez(path, class_names=names, test_images=more["images"], test_labels=more["labels"], **arrays)
    dataset = load_dataset("npz", str(path))
    assert dataset.class_names == ("top", "middle", "bottom")
    np.testing.assert_array_equal(dataset.test.images, more["images"])
    assert len(dataset.train) + len(dataset.val) == 60
    assert set(dataset.val.labels) == {0, 1, 2}


def test_npz_without_a_test_set_is_split(tmp_path: Path) -> None:
    np.savez(tmp_path / "mine.npz", images=toy_arrays(75)["images"][..., 0], labels=toy_arrays(75)["labels"])
    dataset = load_dataset("npz", str(tmp_path / "mine.npz"))
    assert [len(part) for part in (dataset.train, dataset.val, dataset.test)] == [54, 6, 15]
    assert dataset.class_names == ("0", "1", "2")
    assert dataset.train.images.shape[1:] == (8, 8, 1)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"labels": None}, "has no array 'labels': it holds images"),
        ({"images": np.zeros((60, 8, 8, 1), np.float32)}, r"images is float32 \(60, 8, 8, 1\): it must be uint8"),
        (
            {"labels": np.zeros(59, int)},
            r"labels is int64 \(59,\): it must be whole numbers, one for each of 60 images",
        ),
        ({"labels": np.arange(60) % 3 - 1}, "labels go from -1 to 1 for 2 classes: they must be 0..1"),
        ({"class_names": np.array(3)}, r"class_names is int64 \(\): it must be a list of strings"),
        ({"test_labels": np.zeros(3, int)}, "has no array 'test_images'"),
        (
            {"test_images": np.zeros((3, 9, 9), np.uint8), "test_labels": np.zeros(3, int)},
            r"test_images are \(9, 9, 1\) and images \(8, 8, 1\)",
        ),
        ({"class_names": np.array(["a", "b"])}, "labels go from 0 to 2 for 2 classes"),
        ({"images": np.zeros((0, 8, 8), np.uint8), "labels": np.zeros(0, int)}, "images is empty"),
        ({"images": np.zeros((6, 8, 8), np.uint8), "labels": np.arange(6) % 3}, "too few images for a test set"),
    ],
)
def test_npz_that_does_not_hold_what_it_should(tmp_path: Path, change: dict[str, object], reason: str) -> None:
    arrays = {name: value for name, value in (toy_arrays(60) | change).items() if value is not None}
    np.savez(tmp_path / "mine.npz", **arrays)
    with pytest.raises(ValueError, match=reason):
        load_dataset("npz", str(tmp_path / "mine.npz"))


def idx_folder(folder: Path, *, compressed: bool, **changes: bytes | None) -> Path:
    """MNIST-format files written by hand: 60 + 9 images of 8x8."""
    folder.mkdir()
    for purpose, count, seed in (("train", 60, 0), ("t10k", 9, 1)):
        arrays = toy_arrays(count, seed=seed)
        images = b"\0\0\x08\x03" + struct.pack(">3i", count, 8, 8) + arrays["images"].tobytes()
        labels = b"\0\0\x08\x01" + struct.pack(">i", count) + arrays["labels"].astype(np.uint8).tobytes()
        for name, data in ((f"{purpose}-images-idx3-ubyte", images), (f"{purpose}-labels-idx1-ubyte", labels)):
            found = changes.get(name.partition("-ubyte")[0].replace("-", "_"), data)
            if found is not None:
                (folder / (name + ".gz" * compressed)).write_bytes(gzip.compress(found) if compressed else found)
    return folder


@pytest.mark.parametrize("compressed", [False, True])
def test_idx_files(tmp_path: Path, compressed: bool) -> None:
    dataset = load_dataset("idx", str(idx_folder(tmp_path / "idx", compressed=compressed)), ["a", "b", "c"])
    assert [len(part) for part in (dataset.train, dataset.val, dataset.test)] == [54, 6, 9]
    assert dataset.class_names == ("a", "b", "c")
    np.testing.assert_array_equal(dataset.test.images, toy_arrays(9, seed=1)["images"])
    np.testing.assert_array_equal(dataset.test.labels, toy_arrays(9, seed=1)["labels"])
    together = np.concatenate([dataset.train.images, dataset.val.images])
    order = [np.flatnonzero((toy_arrays(60)["images"] == image).all((1, 2, 3)))[0] for image in together]
    assert sorted(order) == list(range(60))
    labels = np.concatenate([dataset.train.labels, dataset.val.labels])
    np.testing.assert_array_equal(labels, toy_arrays(60)["labels"][order])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"train_images_idx3": None}, "has no train-images-idx3-ubyte or train-images-idx3-ubyte.gz"),
        ({"t10k_labels_idx1": b"\0\0\x08\x01\0\0\0\x02ab"}, "9 t10k images and 2 labels"),
        ({"t10k_labels_idx1": b"\0\0\x08\x01\0\0\0\x09abc"}, "holds 3 values: it is truncated or damaged"),
        ({"train_images_idx3": b"\x89PNG"}, "begins with 89504e47"),
        ({"t10k_labels_idx1": b"\0\0\x08\x01\0\0\0\x09" + bytes([7] * 9)}, "t10k labels go up to 7 and there are 3"),
    ],
)
def test_idx_that_does_not_hold_what_it_should(tmp_path: Path, change: dict[str, bytes | None], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        load_dataset("idx", str(idx_folder(tmp_path / "idx", compressed=True, **change)))


def test_idx_without_its_folder_or_with_a_file_that_is_no_gzip(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a folder: .* dataset-fashion-mnist"):
        load_dataset("idx", str(tmp_path / "nothing"))
    folder = idx_folder(tmp_path / "idx", compressed=True)
    (folder / "train-labels-idx1-ubyte.gz").write_text("no gzip")
    with pytest.raises(ValueError, match="train-labels-idx1-ubyte.gz cannot be read"):
        load_dataset("idx", str(folder))


def test_sources_and_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="config.data.source 'mnits' is unknown: did you mean 'mnist'"):
        load_dataset("mnits")
    with pytest.raises(ValueError, match="is not a file: give an .npz"):
        load_dataset("npz", str(tmp_path / "nothing.npz"))
    np.savez(tmp_path / "cut.npz", **toy_arrays(60))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "cut.npz").read_bytes()[:3000])
    (tmp_path / "empty.npz").touch()
    for name in ("cut", "empty"):
        with pytest.raises(ValueError, match=rf"{name}.npz cannot be read as .npz"):
            load_dataset("npz", str(tmp_path / f"{name}.npz"))
    (tmp_path / "text.npz").write_text("no zip")
    with pytest.raises(ValueError, match=r"text.npz cannot be read as .npz"):
        load_dataset("npz", str(tmp_path / "text.npz"))
