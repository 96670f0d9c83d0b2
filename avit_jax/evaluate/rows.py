"""The rows of a comparison: one method at one setting, a JSON file each, with the answer to every image.

A row is a dict of plain JSON:

    data, group ("training-free" or "fine-tuned"), method (a rule's name, "static", "static, last layer short", ..)
    rule (rule_to_json, or null), budget (share of the static model's work that was asked for, or null), seed (or null)
    images, top1, loss (both null without labels), correct (base64 of packed bits, one for each image; null)
    static_gmacs (of the static model with all layers whole, of which budgets are shares)
    agreement (share of the images answered as the static model answers them)
    cosine (without labels: mean of the features that a head reads, against the static model's; null)
    gmacs (mean for an image by the rule, last layer short), executed_gmacs (padding and matching included)
    speed {batch: {images_per_second, low_quartile, high_quartile, ratio, low_ratio, high_ratio}}
        ratio: to the static model in the same rounds, with its quartiles
    memory_mb, compile_seconds (of the program at the largest of these batches), machine, settings
    tokens (mean number that each layer computes), explained_by_position (of the variance of depths between tokens)
    deciles [{images, low, high, gmacs, top1}] and histogram {edges, counts} of the images' GMACs (if they differ)
    evaluated (images of which are these three and executed_gmacs, if fewer than `images`)
    trained_for (share of the work that the model was trained for, if `budget` is another)
"""

import base64
import itertools
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool

from avit_jax.rules import rule_to_json
from avit_jax.runtime.files import read_json, write_json

Row = dict[str, Any]
GROUPS = ("training-free", "fine-tuned")
STATIC, STATIC_SHORT = "static", "static, last layer short"
_MOST_BYTES = 2**24  # of a row's file: the answers to a hundred million images


def row_file(folder: Path, group: str, method: str, budget: float | None = None, seed: int | None = None) -> Path:
    """Where a row is kept: its group, method, budget and seed make the file's name."""
    parts = [group, method, *([] if budget is None else [f"{budget:g}"]), *([] if seed is None else [f"seed{seed}"])]
    return folder / "rows" / (re.sub(r"[^\w.-]+", "_", "-".join(parts)) + ".json")


def save_row(folder: Path, row: Row) -> Path:
    """Write a row in one step; returns its file."""
    path = row_file(folder, row["group"], row["method"], row["budget"], row["seed"])
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, row)
    return path


def saved_row(path: Path, rule: Any, settings: dict[str, Any]) -> Row | None:
    """The row in a file if it is of this rule (None: static) and these settings; None if it has to be measured."""
    if not path.is_file():
        return None
    row = read_json(path, _MOST_BYTES)
    wanted = json.loads(json.dumps({"rule": None if rule is None else rule_to_json(rule), "settings": settings}))
    return row if isinstance(row, dict) and row | wanted == row else None


def read_rows(folder: Path) -> list[Row]:
    """All rows of a comparison. Raises ValueError if there are none, or for a file that is not a row."""
    files = sorted((folder / "rows").glob("*.json"))
    if not files:
        raise ValueError(f"{folder} has no rows of a comparison: run it first")
    rows = [read_json(file, _MOST_BYTES) for file in files]
    for file, row in zip(files, rows, strict=True):
        if not _is_row(row):
            raise ValueError(f"{file} is not a row of a comparison: move it elsewhere")
    return rows


def _is_row(row: Any) -> bool:
    """Whether the content of a file has what pictures and tables need."""
    try:
        speeds = [(int(batch), speed["images_per_second"], speed["ratio"]) for batch, speed in row["speed"].items()]
        numbers = [row["gmacs"], row["images"], 1 if row["budget"] is None else row["budget"]]
        numbers += itertools.chain.from_iterable(speeds)
        answered = row.get("correct") is None or len(base64.b64decode(row["correct"])) == -(-row["images"] // 8)
        known = row["group"] in GROUPS and isinstance(row["method"], str) and isinstance(row["images"], int)
        return bool(known and answered and speeds and all(number > 0 for number in numbers))
    except (AttributeError, KeyError, TypeError, ValueError):
        return False


def as_bits(correct: Bool[np.ndarray, " n"]) -> str:
    """Whether each image is answered rightly, eight to a byte, in base64."""
    return base64.b64encode(np.packbits(correct).tobytes()).decode()


def correct_images(row: Row) -> Bool[np.ndarray, " n"] | None:
    """Whether each image is answered rightly, in the data's order; None if there are no labels."""
    if not row.get("correct"):
        return None
    return np.unpackbits(np.frombuffer(base64.b64decode(row["correct"]), np.uint8), count=row["images"]).astype(bool)
