"""A fingerprint of a data set, which shows whether a resumed run still has the data it started with."""

import hashlib
import stat
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from avit_jax.checkpoints.model_folder import checkpoint_steps
from avit_jax.data.folder import FolderSplit
from avit_jax.data.scattered import ScatteredSplit
from avit_jax.data.sources import Dataset, Split
from avit_jax.runtime.files import read_json

SAMPLED_FILES = 256
SAMPLED_BYTES = 65536


def data_account(dataset: Dataset) -> dict[str, Any]:
    """The fingerprint of a data set, as plain JSON: sizes, class names and checksums. It does not depend on the path.

    For images in memory, and for the items that pictures are made of, the checksums cover all pixels and labels. For
    image folders, they cover all relative paths and labels, and the first bytes of some training files, because two
    class folders with the same file names may have swapped names.
    """
    splits = {"training": dataset.train, "validation": dataset.val, "test": dataset.test}
    account: dict[str, Any] = {f"{purpose} images": len(split) for purpose, split in splits.items()}
    account |= {"classes": len(dataset.class_names), "class names": list(dataset.class_names)}
    if isinstance(dataset.train, Split):
        account["checksum"] = _pixels(dataset.train)
        account["checksums of validation and test"] = [_pixels(dataset.val), _pixels(dataset.test)]
    if isinstance(dataset.train, ScatteredSplit):
        account["checksums of items"] = [_pixels(split.items) for split in splits.values()]
    if isinstance(dataset.train, FolderSplit):
        account["checksums of files and labels"] = [_names(split) for split in splits.values()]
        account["checksum of some training files"] = _sample(dataset.train)
    return account


def check_data(account: dict[str, Any], workdir: Path) -> None:
    """Check that the run in workdir started with the same data; otherwise its image order or labels would change.

    account: data_account of the data set that was given now. Raises ValueError, naming the first difference, if the
    data differ, and if the run's record of its data is damaged.
    """
    if not checkpoint_steps(workdir / "checkpoints"):
        return
    origin = read_json(workdir / "train_config.json")
    there = origin.get("data", {}) if isinstance(origin, dict) else None
    if not isinstance(there, dict):
        raise ValueError(f"{workdir / 'train_config.json'} is damaged: it does not describe the data")
    for name, value in account.items():
        before = there.get(name, value)  # an older run that did not record this value can be resumed
        if before != value:
            raise ValueError(
                f"config.data.path names different data from those that the run in {workdir} started with: "
                f"{_difference(name, before, value)}; give the same data, or another --workdir"
            )


def _difference(name: str, before: Any, now: Any) -> str:
    if name == "class names" and isinstance(before, list):
        for label, (old, new) in enumerate(zip(before, now, strict=False)):
            if old != new:
                return f"class {label} is {new!r}, not {old!r}"
    if "checksum" in name:
        return f"the {name} {'differ' if 'checksums' in name else 'differs'}"
    return f"{name} {now}, not {before}"


def _pixels(split: Any) -> int:
    labels, images = map(np.ascontiguousarray, (split.labels, split.images))
    return zlib.crc32(labels.data, zlib.crc32(images.data))


def _names(split: Any) -> str:
    found = hashlib.sha256(b"\0".join(split.files.tolist()))
    found.update(np.ascontiguousarray(split.labels, "<i4").data)
    return found.hexdigest()


def _sample(split: FolderSplit) -> str:
    """A digest of the sizes and first bytes of files, spaced evenly over the set, which is sorted by class."""
    found = hashlib.sha256()
    for index in np.linspace(0, len(split) - 1, min(SAMPLED_FILES, len(split))).astype(int):
        path = Path(split.name(int(index)))
        try:
            status = path.stat()
            begin = b""
            if stat.S_ISREG(status.st_mode):  # opening a pipe would wait for a writer
                with path.open("rb") as file:
                    begin = file.read(SAMPLED_BYTES)
        except OSError:  # the pipeline reports the problem when it reads the file
            continue
        found.update(f"{status.st_size} {len(begin)} ".encode() + begin)
    return found.hexdigest()
