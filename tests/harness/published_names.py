"""Small random checkpoints under the names that are published: tests/data/names/*.txt."""

import re
from pathlib import Path

import numpy as np

NAMES = Path(__file__).parents[1] / "data" / "names"
# Published sizes and the ones of the tests: width 24, 2 heads, 24 x 24 pixels, patch 8, 5 classes.
_SIZES = {768: 24, 3072: 96, 2304: 72, 1536: 48, 12: 2, 64: 12, 1000: 5, 21843: 5, 14: 8, 16: 8, 512: 8, 2048: 8}
_SIZES |= {256: 8, 65536: 8, 196: 9, 197: 10, 198: 11, 201: 14, 1369: 9, 1370: 10}


def published_state(family: str, layers: int = 2, seed: int = 0) -> dict[str, np.ndarray]:
    """Random weights under the literal names of a family.

    A file's first line is the source; the second says how many layers there are and how the names of layer 0 begin,
    which stand for all; then follow names and published shapes.
    """
    _, header, *lines = (NAMES / f"{family}.txt").read_text().splitlines()
    match = re.fullmatch(r"# layers \d+ (.*?)(\d+)([./])", header)
    assert match is not None
    before, _, after = match.groups()
    rng = np.random.default_rng(seed)
    state = {}
    for line in lines:
        name, numbers = line.split()
        shape = tuple(_SIZES.get(int(n), int(n)) for n in numbers.split(","))
        block = f"{before}0{after}"
        names = [name]
        if name.startswith(block):
            names = [f"{before}{layer}{after}{name.removeprefix(block)}" for layer in range(layers)]
        for each in names:
            state[each] = rng.normal(0, 0.2, shape).astype(np.float32)
    return state


def images() -> np.ndarray:
    """Two images as a model of these sizes takes them, [2, 24, 24, 3]."""
    return np.random.default_rng(1).normal(size=(2, 24, 24, 3)).astype(np.float32)
