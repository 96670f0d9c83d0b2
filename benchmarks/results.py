"""Where a benchmark ran, and what it found as a file."""

import platform
from pathlib import Path
from typing import Any

import jax

from avit_jax.runtime.files import write_json
from avit_jax.runtime.mesh import available_cores


def machine() -> str:
    """Processor, cores and JAX."""
    return f"{platform.machine()}, {available_cores()} cores, {jax.default_backend()}, jax {jax.__version__}"


def save_results(path: Path, content: Any) -> None:
    """A benchmark's JSON, whole at any moment."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, content)
    print(f"\nwritten: {path}", flush=True)
