"""What tells a data set from another one, so that a stopped run goes on with the data it began with."""

import hashlib
import stat
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from avit_jax.checkpoints.model_folder import checkpoint_steps
from avit_jax.data.folder import FolderSplit
from avit_jax.data.sources import Dataset, Split
from avit_jax.runtime.files import read_json

SAMPLED_FILES = 256
SAMPLED_BYTES = 65536


def data_account(dataset: Dataset) -> dict[str, Any]:
    """What tells a data set from another one at the same or another path; plain JSON.

    Of images in memory their checksums; of image folders checksums of all relative paths and labels, and of the
    beginning of some training files, because two class folders that change their names may hold the same file names.
    """
    splits = {"training": dataset.train, "validation": dataset.val, "test": dataset.test}
    account: dict[str, Any] = {f"{purpose} images": len(split) for purpose, split in splits.items()}
    account |= {"classes": len(dataset.class_names), "class names": list(dataset.class_names)}
    if isinstance(dataset.train, Split):
        account["checksum"] = _pixels(dataset.train)
        account["checksums of validation and test"] = [_pixels(dataset.val), _pixels(dataset.test)]
    if isinstance(dataset.train, FolderSplit):
        account["checksums of files and labels"] = [_names(split) for split in splits.values()]
        account["checksum of some training files"] = _sample(dataset.train)
    return account


def check_data(account: dict[str, Any], workdir: Path) -> None:
    """Raises ValueError where the run in workdir began with other data: its order, or its labels, would be others."""
    if not checkpoint_steps(workdir / "checkpoints"):
        return
    origin = read_json(workdir / "train_config.json")
    there = origin.get("data", {}) if isinstance(origin, dict) else None
    if not isinstance(there, dict):
        raise ValueError(f"{workdir / 'train_config.json'} is damaged: it does not say what the data were")
    for name, value in account.items():
        before = there.get(name, value)  # runs from before there was this key go on
        if before != value:
            raise ValueError(
                f"config.data.path names other data than the run in {workdir} began with: "
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
    """Sizes and first bytes of files evenly over the set, which is sorted by class."""
    found = hashlib.sha256()
    for index in np.linspace(0, len(split) - 1, min(SAMPLED_FILES, len(split))).astype(int):
        path = Path(split.name(int(index)))
        try:
            status = path.stat()
            begin = b""
            if stat.S_ISREG(status.st_mode):  # a pipe would wait for its writer
                with path.open("rb") as file:
                    begin = file.read(SAMPLED_BYTES)
        except OSError:  # the pipeline says what is wrong with it when it reads it
            continue
        found.update(f"{status.st_size} {len(begin)} ".encode() + begin)
    return found.hexdigest()
