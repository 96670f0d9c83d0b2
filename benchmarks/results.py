"""A benchmark's machine and its results file."""

import platform
from pathlib import Path
from typing import Any

import jax

from avit_jax.runtime.files import write_json
from avit_jax.runtime.mesh import available_cores


def machine() -> str:
    """The processor, cores, JAX backend and version, as text."""
    return f"{platform.machine()}, {available_cores()} cores, {jax.default_backend()}, jax {jax.__version__}"


def save_results(path: Path, content: Any) -> None:
    """Write a benchmark's JSON in one step and print its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, content)
    print(f"\nwritten: {path}", flush=True)
