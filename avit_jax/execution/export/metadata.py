"""What an exported file says about its model, and whether it may be written."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from avit_jax.model.config import AViTConfig


def check_targets(path: Path, names: Iterable[str], overwrite: bool) -> None:
    """Raises ValueError if a file of these names beside the path cannot be written, or would replace one unasked."""
    for target in map(path.with_name, names):
        if target.is_dir() or (target.exists() and not overwrite):
            raise ValueError(
                f"{target} exists already: choose another path, or replace a file with overwrite=True (--overwrite)"
            )
    if not path.parent.is_dir():
        raise ValueError(f"{path} cannot be written: there is no folder {path.parent}; make it first")


def metadata(config: AViTConfig, inside: bool) -> dict[str, Any]:
    """What a user of the file needs to know, as JSON values by name. inside: whether the file preprocesses pictures."""
    height, width = config.image_shape
    preprocessing = config.preprocessing
    steps = {
        "in_this_file": inside,
        "layout": "batch, height, width, channels",
        "resize_to_cover": [int(side / preprocessing.crop_fraction) for side in (height, width)],
        "interpolation": preprocessing.interpolation,
        "antialias": preprocessing.interpolation != "nearest",
        "centre_crop": [height, width],
        "divide_by": 255,
        "mean": preprocessing.mean,
        "std": preprocessing.std,
    }
    return {"class_names": config.class_names, "preprocessing": steps, "config": config.to_json()}
