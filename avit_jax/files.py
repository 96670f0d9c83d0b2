"""Small files that are whole or not there (JSON written beside and renamed), and folders for them."""

import contextlib
import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# What a disk answers, and what mends it.
DISK_ERRORS = {
    errno.ENOSPC: "make space there",
    errno.EDQUOT: "make space there",
    errno.EROFS: "make it writable",
    errno.EACCES: "make it writable",
    errno.EPERM: "make it writable",
    errno.EIO: "see whether the disk is sound",
    errno.ENOTDIR: "a file is in the way of a folder",
    errno.EEXIST: "a file is in the way of a folder",
}


class CannotWrite(ValueError):
    """The disk is full or read-only; the message names the folder and what to do."""


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raises CannotWrite where the disk under `path` is full or does not let us write.

    Libraries tell that in errors of many kinds, some of them only in the text. All other errors pass.
    """
    try:
        yield
    except Exception as error:
        number = None if isinstance(error, CannotWrite) else _disk_error(error)
        if number is None:
            raise
        raise CannotWrite(
            f"{path.name} cannot be written to the folder {path.parent} ({os.strerror(number)}): "
            f"{DISK_ERRORS[number]}; the same command goes on from the last checkpoint"
        ) from error


def _disk_error(error: BaseException) -> int | None:
    if isinstance(error, OSError) and error.errno in DISK_ERRORS:
        return error.errno
    return next((number for number in DISK_ERRORS if os.strerror(number) in str(error)), None)


def replace_text(path: Path, text: str) -> None:
    """Replace the content of `path` in one step, so that a killed process leaves no half of it."""
    partial = path.with_name(path.name + ".partial")
    with writing(path):
        partial.write_text(text)
        os.replace(partial, path)


def write_json(path: Path, content: Any) -> None:
    """Replace a JSON file as replace_text does."""
    replace_text(path, json.dumps(content, indent=2) + "\n")


def read_json(path: Path) -> Any:
    """The content of a JSON file. Raises ValueError, naming the file, where it is missing or damaged."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def writable_folder(path: str | Path) -> Path:
    """The folder, made where it is missing. Raises ValueError where nothing can be written into it."""
    folder = Path(path)
    probe = folder / ".writable"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(f"{folder} cannot be written to ({error.strerror}): give another folder") from error
    return folder
