"""Small files that are written in one step, reading of JSON, folders, and names in messages."""

import contextlib
import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from avit_jax.runtime.text import escaped

# Errors of the disk, and what to do about each.
DISK_ERRORS = {
    errno.ENOSPC: "make space there",
    errno.EDQUOT: "make space there",
    errno.EROFS: "make it writable",
    errno.EACCES: "make it writable",
    errno.EPERM: "make it writable",
    errno.EIO: "check the disk for damage",
    errno.ENOTDIR: "a file is in the way of a folder",
    errno.EEXIST: "a file is in the way of a folder",
}

_MAX_JSON = 2**22  # bytes; 20,000 class names take about 1 MB


class CannotWrite(ValueError):
    """The disk is full or read-only; the message names the folder and what to do."""


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raises CannotWrite if the disk under `path` is full or not writable.

    Libraries report this with many kinds of errors, some only in their text. All other errors pass through.
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


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file beside `path` to write to; it takes the place of `path` at the end, and is removed after an error."""
    partial = path.with_name(path.name + ".partial")
    try:
        yield partial
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


def replace_text(path: Path, text: str) -> None:
    """Replace the content of `path` in one step, so that a killed process never leaves half of it.

    UTF-8 in any locale; lone surrogates, which it cannot hold, become escapes (\\ud800).
    """
    with writing(path), replacing(path) as partial:
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path: Path, content: Any) -> None:
    """Replace a JSON file in one step, as replace_text does."""
    replace_text(path, json.dumps(content, indent=2) + "\n")


def read_json(path: Path, most: int = _MAX_JSON) -> Any:
    """The content of a JSON file of at most `most` bytes.

    Raises ValueError, naming the file, if it is missing, larger or damaged.
    """
    try:
        if path.exists() and not path.is_file():
            raise ValueError("it is not a regular file")
        with path.open("rb") as stream:
            content = stream.read(most + 1)
        if len(content) > most:
            raise ValueError(f"it is larger than {most} bytes")
        return parse_json(content.decode())
    except (OSError, ValueError) as error:
        raise ValueError(f"{shown(path, 300)} cannot be read: {error}") from error


def parse_json(text: str) -> Any:
    """The content of untrusted JSON. Raises ValueError if it is damaged, nested too deeply, or has a key twice."""
    try:
        return json.loads(text, object_pairs_hook=_without_repeats)
    except RecursionError:
        raise ValueError("its JSON is nested too deeply") from None


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError("its JSON has the same key twice")
    return content


def shown(value: object, limit: int = 200) -> str:
    """Untrusted text, a path or a number as one line of at most `limit` characters, for a message.

    What a terminal would obey is escaped (ESC, newlines), and long text is cut in the middle. For any other value only
    the type is shown, because printing it could take forever.
    """
    if isinstance(value, int) and value.bit_length() > 64:
        return f"a number of {value.bit_length()} bits"
    if not isinstance(value, str | os.PathLike | int | float | None):
        return f"a {type(value).__name__}"
    text = str(value)
    cut = len(text) > limit
    text = text[:limit] + text[-limit:] if cut else text
    printable = escaped(text)
    if cut or len(printable) > limit:
        half = (limit - 5) // 2
        return f"{printable[:half]} ... {printable[-half:]}"
    return printable


def shown_value(value: Any) -> str:
    """A value from untrusted JSON for a message: text in quotes, numbers as they are, and only the type of all else."""
    if isinstance(value, str):
        return repr(value[:100])
    if value is None or _is_short_number(value):
        return repr(value)
    if isinstance(value, list | tuple) and len(value) <= 4 and all(map(_is_short_number, value)):
        return repr(value)
    return shown(value)


def _is_short_number(value: Any) -> bool:
    return isinstance(value, float) or (isinstance(value, int) and abs(value) < 10**20)


def read_table(path: Path, name: str) -> dict[str, Any]:
    """The object under `name` in a JSON file. Raises ValueError, naming the file, if there is none."""
    content = read_json(path)
    table = content.get(name) if isinstance(content, dict) else None
    if not isinstance(table, dict):
        raise ValueError(f"{path} is damaged: it has no table {name!r}")
    return table


def expanded(path: str | Path) -> Path:
    """The path with ~ replaced. Raises ValueError if there is no home folder to replace it with."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:  # HOME is not set, and the user is not in the password file
        raise ValueError(f"{str(path)!r} begins with ~ and there is no home folder: write the path in full") from error


def writable_folder(path: str | Path) -> Path:
    """The folder, which is made if it is missing. Raises ValueError if it cannot be written to."""
    folder = Path(path)
    probe = folder / ".writable"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(f"{folder} cannot be written to ({error.strerror}): give another folder") from error
    return folder
