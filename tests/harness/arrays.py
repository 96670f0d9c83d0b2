"""Arrays that tests compare with."""

from pathlib import Path

import numpy as np


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """All arrays of a .npz file, which is closed again: one that is left open is reported in another test."""
    with np.load(path) as file:
        return dict(file)
