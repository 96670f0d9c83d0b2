"""A benchmark's results file."""

from pathlib import Path
from typing import Any

from avit_jax.runtime.files import write_json


def save_results(path: Path, content: Any) -> None:
    """Write a benchmark's JSON in one step and print its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, content)
    print(f"\nwritten: {path}", flush=True)
