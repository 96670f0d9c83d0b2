"""The list of a folder's images, made by walking through it once and kept in a cache, which is checked before use."""

import hashlib
import json
import os
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from avit_jax.runtime.files import shown

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".gif")

_Id = tuple[int, int]  # device and inode, which identify a folder whatever path leads to it


def list_files(folder: Path) -> dict[str, Any]:
    """All images below the class folders, sorted, and the modification times of all folders visited.

    Returns class_names, files (bytes [n], paths below `folder`), labels (int32 [n]), ignored (files that are not
    images) and stamps (nanoseconds, by folder). Symbolic links are followed; each real folder is read once for a class.
    Raises ValueError if a class is empty, a folder cannot be read, or a link leads into another class's folder.
    """
    names = tuple(sorted(entry.name for entry in _scanned(folder) if _is_folder(entry) and entry.name[0] != "."))
    if not names:
        raise ValueError(f"{shown(folder)} holds no class folders: images must be in {shown(folder.name)}/CLASS/")
    walk = _Walk(folder, names)
    files: list[bytes] = []
    labels: list[int] = []
    for label, name in enumerate(names):
        before = len(files)
        files.extend(walk.images(label))
        labels.extend([label] * (len(files) - before))
        if len(files) == before:
            raise ValueError(f"the class folder {shown(folder / name)} holds no images: fill it or remove it")
    if walk.left_out:
        print(
            f"{shown(folder)}: {len(walk.left_out)} links to folders that were already read, or files that are not "
            f"regular files, are left out; the first: {shown(walk.left_out[0])}"
        )
    return {
        "class_names": names,
        "files": np.asarray(files),
        "labels": np.asarray(labels, np.int32),
        "ignored": walk.ignored,
        "stamps": walk.stamps,
    }


class _Walk:
    """A walk through class folders that remembers which real folders it has visited."""

    def __init__(self, folder: Path, names: tuple[str, ...]) -> None:
        self.folder, self.names = folder, names
        self.ignored: list[str] = []  # files whose names are not those of images
        self.left_out: list[str] = []  # links to folders that were already read, pipes and devices
        status = os.stat(folder)
        self.stamps = {".": status.st_mtime_ns}
        # A link to one of these leads back up, or to the images of another split.
        around = [folder, *folder.resolve().parents, *(folder.parent / purpose for purpose in ("train", "val", "test"))]
        self._around = {_identity(os.stat(place)) for place in around if place.exists()}
        self._owners: dict[_Id, int] = {}
        for label, name in enumerate(names):
            found = _identity(os.stat(folder / name))
            other = self._owners.setdefault(found, label)
            if other != label or found in self._around:
                what = f"the same folder as {shown(names[other])}" if other != label else "a folder that contains it"
                raise ValueError(f"the class folder {shown(folder / name)} is a link to {what}: remove it")

    def images(self, label: int) -> Iterator[bytes]:
        """The images of a class as paths below the folder, in the order of os.walk with sorted names."""
        seen: set[_Id] = set()
        waiting = [os.path.join(self.folder, self.names[label])]
        while waiting:
            place = waiting.pop()
            status = os.stat(place)
            found = _identity(status)
            if found in seen or found in self._around:
                self.left_out.append(place)
                continue
            owner = self._owners.setdefault(found, label)
            if owner != label:
                raise ValueError(
                    f"{shown(place)} leads to images of the class {shown(self.names[owner])}: an image can have only "
                    "one class, so remove the link"
                )
            seen.add(found)
            below = os.path.relpath(place, self.folder)
            self.stamps[below] = status.st_mtime_ns
            inner = []
            for entry in sorted(_scanned(place), key=lambda entry: entry.name):
                name = os.path.join(below, entry.name)
                if _is_folder(entry):
                    inner.append(entry.path)
                elif entry.name[0] == ".":
                    continue
                elif not entry.name.lower().endswith(EXTENSIONS):
                    self.ignored.append(name)
                # A broken link is listed, so that reading it reports a missing image.
                elif not os.path.exists(entry.path) or entry.is_file():
                    yield os.fsencode(name)
                else:
                    self.left_out.append(name)
            waiting.extend(reversed(inner))


def _identity(status: os.stat_result) -> _Id:
    return status.st_dev, status.st_ino


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _scanned(folder: str | Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        raise ValueError(f"the folder {shown(folder)} cannot be read: {error.strerror}") from error


def cache_file(folder: Path) -> Path | None:
    """The file in which the list of a folder is kept; None if there is no home folder."""
    try:
        caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:
        return None
    key = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:16]
    return caches / "avit_jax" / f"folder-{key}.npz"


def read_index(cache: Path, folder: Path) -> dict[str, Any] | None:
    """The cached list; None if it is missing or malformed, or if a folder has changed since.

    cache: the file that write_index wrote. folder: the folder that the list is of.
    """
    try:
        if not cache.is_file():
            return None
        with cache.open("rb") as stream:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in zipfile.ZipFile(stream).infolist()):
                return None  # write_index does not compress, so no list is larger than its file
            stream.seek(0)
            with np.load(stream) as file:
                about = json.loads(str(file["about"]))
                index = {"files": file["files"], "labels": file["labels"], "ignored": about["ignored"]}
        index |= {"class_names": tuple(about["class_names"]), "stamps": about["stamps"]}
        if not _is_sound(index):
            return None
        if any(os.stat(folder / place).st_mtime_ns != stamp for place, stamp in index["stamps"].items()):
            return None
    except Exception:  # whatever a damaged file makes zipfile, NumPy and json raise
        return None
    return index


def _is_sound(index: dict[str, Any]) -> bool:
    """Whether a list has the types and values of list_files, and no path leads out of the folder."""
    files, labels, names = index["files"], index["labels"], index["class_names"]
    places = index["stamps"]
    letters = files.view(np.uint8).reshape(len(files), files.itemsize) if files.dtype.kind == "S" else None
    return (
        letters is not None
        and files.ndim == labels.ndim == 1
        and 0 < len(files) == len(labels)
        and labels.dtype == np.int32
        and labels.min() >= 0
        and labels.max() < len(names)
        and all(isinstance(name, str) and "/" not in name for name in names)
        and all(isinstance(name, str) for name in index["ignored"])
        and all(isinstance(stamp, int) for stamp in places.values())
        and not any(place.startswith("/") or ".." in place.split("/") for place in places)
        and not (letters[:, 0] == ord("/")).any()
        and not (letters[:, :3] == np.frombuffer(b"../", np.uint8)).all(axis=1).any()
        and b"/../" not in files.tobytes()
    )


def write_index(cache: Path, index: dict[str, Any]) -> None:
    """Write the cache in one step, so that several processes may do it at once. Prints a line if it cannot be written.

    index: the result of list_files.
    """
    about = {name: index[name] for name in ("class_names", "ignored", "stamps")}
    partial = None
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=cache.parent, delete=False) as stream:
            partial = stream.name
            np.savez(stream, files=index["files"], labels=index["labels"], about=np.asarray(json.dumps(about)))
        os.replace(partial, cache)
    except OSError as error:
        print(f"the list of images could not be kept and will be made again next time: {error}")
        if partial is not None:
            Path(partial).unlink(missing_ok=True)
