"""Preprocessing that published checkpoints expect, and the pages to download them from."""

import dataclasses
import re
from pathlib import Path
from typing import Any

from avit_jax.model.config import Preprocessing

_HALF: dict[str, Any] = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
CHANGE = "give preprocessing={...} (on the command line --mean, --std, --crop-fraction, --interpolation) for others"


@dataclasses.dataclass(frozen=True)
class Published:
    """The preprocessing that the authors of a kind of checkpoint use."""

    whose: str
    preprocessing: Preprocessing
    doubt: str = ""  # which other checkpoints have the same names but expect something else


def published(kind: str, image_size: int) -> Published:
    """The values published with this kind of checkpoint, at this shorter side in pixels."""
    large = image_size >= 384
    if kind == "AugReg":
        return Published("AugReg's", Preprocessing(**_HALF, crop_fraction=1.0 if large else 0.9))
    if kind == "Hugging Face ViT":
        return Published(
            "google/vit-base-patch16-224's",
            Preprocessing(**_HALF, crop_fraction=1.0, interpolation="bilinear"),
            "DINO's and MAE's ViT have ImageNet's mean and std; preprocessor_config.json beside the weights shows it",
        )
    if kind == "Hugging Face DeiT":
        return Published("facebook/deit-base-patch16-224's", Preprocessing())
    if kind == "torchvision":
        # The weights for 224 pixels are bilinear; SWAG's for 384 and 512 are bicubic and see the whole square.
        if large:
            return Published("torchvision's SWAG", Preprocessing(crop_fraction=1.0))
        doubt = "vit_l_16 expects crop 0.926, the SWAG weights of 224 pixels crop 1 and bicubic"
        return Published("torchvision's vit_b_16", Preprocessing(interpolation="bilinear"), doubt)
    if kind == "DeiT III":
        return Published("DeiT III's", Preprocessing(crop_fraction=1.0))
    if kind == "DINOv2":
        return Published("DINOv2's", Preprocessing(crop_fraction=1.0 if large else 0.875))
    if kind == "MAE":
        return Published("MAE's", Preprocessing(crop_fraction=1.0 if large else 0.875))
    if kind == "DeiT":
        return Published("DeiT's", Preprocessing(), "")
    if kind == "timm with fc_norm":
        return Published("MAE's", Preprocessing(), "other models of timm with fc_norm expect mean and std 0.5")
    return Published(
        "DeiT's", Preprocessing(), "timm's AugReg ViTs expect mean and std 0.5 and crop 0.9, its DeiT crop 0.9"
    )


def described(preprocessing: Preprocessing, image_size: int) -> str:
    """Mean, std, crop and interpolation in a few words."""
    mean, std = (" ".join(f"{x:.3g}" for x in values) for values in (preprocessing.mean, preprocessing.std))
    fraction = preprocessing.crop_fraction
    crop = "no crop" if fraction == 1 else f"crop {fraction:.3g} ({image_size} of {int(image_size / fraction)})"
    return f"mean {mean}, std {std}, {crop}, {preprocessing.interpolation}"


def merged(preprocessing: Any, base: Preprocessing) -> Preprocessing:
    """The preprocessing that was asked for: as given, or if it is a dict, `base` with those fields replaced.

    Raises ValueError for any other value or field.
    """
    if isinstance(preprocessing, Preprocessing):
        return preprocessing
    fields = {field.name for field in dataclasses.fields(Preprocessing)}
    if not isinstance(preprocessing, dict) or not preprocessing.keys() <= fields:
        raise ValueError(f"preprocessing is {preprocessing!r:.100}: give some of {', '.join(sorted(fields))}")
    changes: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in preprocessing.items()
    }
    return dataclasses.replace(base, **changes)


def where_to_get(path: str | Path) -> str:
    """The message for a missing checkpoint: that nothing is downloaded, and where to get it."""
    text = str(path)
    if Path(text).suffix in (".pth", ".pt", ".bin", ".safetensors", ".npz"):
        pages = {
            r"deit|a-?vit": "https://github.com/facebookresearch/deit",
            r"dinov2": "https://github.com/facebookresearch/dinov2",
            r"dino": "https://github.com/facebookresearch/dino",
            r"mae": "https://github.com/facebookresearch/mae",
            r"\.npz$|augreg": "https://github.com/google-research/vision_transformer",
            r"vit_[blh]_(?:16|32|14)": "https://docs.pytorch.org/vision/stable/models/vision_transformer.html",
        }
        name = Path(text).name.lower()
        page = next((page for pattern, page in pages.items() if re.search(pattern, name)), None)
        page = page or "https://github.com/facebookresearch/deit (DeiT) or https://huggingface.co/timm"
        return f"the file is missing, and nothing is downloaded: published files are at {page}"
    if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", text):
        return (
            "the folder is missing, and nothing is downloaded: if it is the name of a model at "
            f"https://huggingface.co/{text}, run `hf download {text} --local-dir DIR` and give DIR"
        )
    return "the folder is missing"
