"""Small files that are whole or not there (JSON written beside and renamed), and folders for them."""

import json
import os
from pathlib import Path
from typing import Any


def write_json(path: Path, content: Any) -> None:
    """Replace `path` in one step, so that a killed process leaves no half of it."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(partial, path)


def read_json(path: Path) -> Any:
    """The content of a JSON file. Raises ValueError, naming the file, where it is missing or damaged."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
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
