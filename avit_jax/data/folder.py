"""Images in folders by class, train/CLASS/*.JPEG and val/CLASS/*.JPEG: the layout that PyTorch's ImageFolder reads."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from avit_jax.data.folder_index import cache_file, read_index, write_index
from avit_jax.data.folder_index import list_files as _list_files
from avit_jax.data.settings import DataSettings, expanded
from avit_jax.data.sources import Dataset
from avit_jax.files import shown


@dataclasses.dataclass(frozen=True)
class FolderSplit:
    """Files of one purpose with their labels; an element holds the file's path."""

    root: Path
    files: np.ndarray  # bytes [n]: paths below root; one array, which costs little to hand to another process
    labels: Int[np.ndarray, " n"]
    settings: DataSettings

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": Path(self.name(index)), "label": self.labels[index]}

    def name(self, index: int) -> str:
        """The file's path."""
        return os.path.join(self.root, os.fsdecode(self.files[index]))


def load_folder(settings: DataSettings) -> Dataset:
    """train/ is learnt from, val/ chosen on and, unless there is a test/, read at the end; classes by sorted name.

    The list of files is made once and kept in the cache folder ($XDG_CACHE_HOME or ~/.cache)/avit_jax; it is made anew
    when a folder has changed. Raises ValueError naming the folder or file that is missing, empty or out of place.
    """
    root = expanded(settings.path)
    if not settings.path or not root.is_dir():
        raise ValueError(
            f"config.data.path {settings.path!r} is not a folder: give one with train/CLASS/ and val/CLASS/ in it"
        )
    for purpose in ("train", "val"):
        if not (root / purpose).is_dir():
            raise ValueError(_hint(root, purpose))
    class_names, train = _indexed(root / "train", None, settings)
    _, val = _indexed(root / "val", class_names, settings)
    test = _indexed(root / "test", class_names, settings)[1] if (root / "test").is_dir() else val
    return Dataset(train, val, test, class_names)


def _hint(root: Path, purpose: str) -> str:
    """Why there is no train/ or val/, as far as one can see."""
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
    """The folder's classes and files, from the cache where that still holds; class_names: those of train/."""
    cache = cache_file(folder)
    index = read_index(cache, folder) if cache else None
    if index is None:
        index = _list_files(folder)
        if cache:
            write_index(cache, index)
    names, files, own_labels = index["class_names"], index["files"], index["labels"]
    if index["ignored"]:
        print(
            f"{shown(folder)}: {len(index['ignored'])} files that are no images by their names are left out, the "
            f"first: {shown(index['ignored'][0])}"
        )
    if class_names is None:
        return names, FolderSplit(folder, files, own_labels, settings)
    extra = sorted(set(names) - set(class_names))
    if extra:
        raise ValueError(
            f"{shown(folder / extra[0])} is a class that {shown(folder.parent / 'train')} lacks: both must name "
            "classes alike"
        )
    positions = np.asarray([class_names.index(name) for name in names], np.int32)
    return class_names, FolderSplit(folder, files, positions[own_labels], settings)
