"""Images in one folder per class, train/CLASS/*.JPEG and val/CLASS/*.JPEG: the layout of PyTorch's ImageFolder."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from avit_jax.data.folder_index import EXTENSIONS, cache_file, read_index, write_index
from avit_jax.data.folder_index import list_files as _list_files
from avit_jax.data.settings import DataSettings
from avit_jax.data.sources import Dataset, class_parts
from avit_jax.runtime.files import expanded, shown

PURPOSES = ("train", "training", "val", "valid", "validation", "test", "testing")


@dataclasses.dataclass(frozen=True)
class FolderSplit:
    """The image files of one split with their labels. An element holds the file's path."""

    root: Path
    files: np.ndarray  # bytes [n]: paths below root; one array is cheap to send to another process
    labels: Int[np.ndarray, " n"]
    settings: DataSettings

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": Path(self.name(index)), "label": self.labels[index]}

    def name(self, index: int) -> str:
        """The path of file number `index`."""
        return os.path.join(self.root, os.fsdecode(self.files[index]))


def load_folder(settings: DataSettings) -> Dataset:
    """The images under settings.path: train/ for training, val/ for validation, and test/, or else val/, for the test.

    Classes are sorted by name. A folder that has class folders but no train/ and val/ is split: 72 %, 8 % and 20 % of
    each class, the same every time. The list of files is made once and kept in avit_jax/ in the cache folder
    ($XDG_CACHE_HOME or ~/.cache); it is made again when a folder has changed. Raises ValueError naming the folder or
    file that is missing, empty or out of place.
    """
    root = expanded(settings.path)
    if not settings.path or not root.is_dir():
        raise ValueError(
            f"config.data.path {settings.path!r} is not a folder: give one with train/CLASS/ and val/CLASS/ in it"
        )
    if _has_only_classes(root):
        return _split_classes(root, settings)
    for purpose in ("train", "val"):
        if not (root / purpose).is_dir():
            raise ValueError(_hint(root, purpose))
    class_names, train = _indexed(root / "train", None, settings)
    _, val = _indexed(root / "val", class_names, settings)
    test = _indexed(root / "test", class_names, settings)[1] if (root / "test").is_dir() else val
    return Dataset(train, val, test, class_names)


def _has_only_classes(root: Path) -> bool:
    """Whether there are class folders with images directly in them, and no folders such as train/ and val/."""
    folders = [path for path in root.iterdir() if path.is_dir() and path.name[0] != "."]
    if not folders or any(folder.name.lower() in PURPOSES for folder in folders):
        return False
    return all(any(name.lower().endswith(EXTENSIONS) for name in os.listdir(folder)) for folder in folders)


def _split_classes(root: Path, settings: DataSettings) -> Dataset:
    """Raises ValueError where there are too few images for three sets."""
    class_names, everything = _indexed(root, None, settings)
    indices = [np.sort(part) for part in class_parts(everything.labels, len(class_names))]
    if not all(len(index) for index in indices):
        raise ValueError(f"{root} has too few images to split: give at least 20 for each class, or train/ and val/")
    print(
        f"{root} has no train/ and val/: {len(indices[0])} images are for training, {len(indices[1])} for validation "
        f"and {len(indices[2])} for the test, drawn from each class, the same every time"
    )
    train, val, test = (
        FolderSplit(root, everything.files[index], everything.labels[index], settings) for index in indices
    )
    return Dataset(train, val, test, class_names)


def _hint(root: Path, purpose: str) -> str:
    """The message for a missing train/ or val/, with the likely reason."""
    if any(root.glob("*.tfrecord*")) or any(root.glob("*.array_record*")) or (root / "dataset_info.json").exists():
        return f"{shown(root)} holds a TFDS data set and no folder {purpose}/: use config.data.source='tfds'"
    archives = sorted(file.name for file in root.glob("*.tar*"))
    if archives:
        return (
            f"{shown(root)} has no folder {purpose}/ and {shown(archives[0])} is still packed: unpack it into "
            f"{purpose}/CLASS/"
        )
    return f"{shown(root)} has no folder {purpose}/: images must be in {purpose}/CLASS/"


def _indexed(
    folder: Path, class_names: tuple[str, ...] | None, settings: DataSettings
) -> tuple[tuple[str, ...], FolderSplit]:
    """The folder's classes and files, from the cache if it is still valid; class_names: those of train/."""
    cache = cache_file(folder)
    index = read_index(cache, folder) if cache else None
    if index is None:
        index = _list_files(folder)
        if cache:
            write_index(cache, index)
    names, files, own_labels = index["class_names"], index["files"], index["labels"]
    if index["ignored"]:
        print(
            f"{shown(folder)}: {len(index['ignored'])} files are left out, because their names are not those of "
            f"images; the first: {shown(index['ignored'][0])}"
        )
    if class_names is None:
        return names, FolderSplit(folder, files, own_labels, settings)
    extra = sorted(set(names) - set(class_names))
    if extra:
        raise ValueError(
            f"{shown(folder / extra[0])} is a class that {shown(folder.parent / 'train')} lacks: both must have the "
            "same class names"
        )
    positions = np.asarray([class_names.index(name) for name in names], np.int32)
    return class_names, FolderSplit(folder, files, positions[own_labels], settings)
