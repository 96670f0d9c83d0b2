"""Records what timm 1.0.31 and torchvision make of one small photograph: tests/data/timm_augment.npz.

Development only: python tests/data/make_timm_fixtures.py, in an environment with torch (CPU), torchvision (--no-deps),
timm==1.0.31 and scikit-image. torchvision's compiled operators are stubbed: its transforms of PIL pictures need none.
"""

import io
import json
import random
from pathlib import Path

import numpy as np
import torch
from PIL import Image

library = torch.library.Library("torchvision", "DEF")
for operator in ("nms", "qnms"):
    library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

import timm
from skimage import data as photographs
from timm.data import Mixup, create_transform
from timm.data.auto_augment import AugmentOp, rand_augment_transform
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import RandomResizedCropAndInterpolation
from torchvision import transforms

FILE = Path(__file__).parent / "timm_augment.npz"
FILL = (124, 116, 104)
LEVELS = (0.0, 2.5, 6.0, 9.0, 10.0)


def photograph(width: int, height: int) -> Image.Image:
    return Image.fromarray(photographs.astronaut()).crop((120, 0, 420, 225)).resize((width, height))


def recorded() -> dict[str, np.ndarray]:
    picture = photograph(14, 10)
    arrays: dict[str, np.ndarray] = {"picture": np.asarray(picture)}
    transform = rand_augment_transform(
        "rand-m9-mstd0.5-inc1", {"img_mean": FILL, "interpolation": Image.Resampling.BICUBIC}
    )
    names, results = [], []
    kinds = [op.name for op in transform.ops]
    assert all(op.prob == 0.5 and op.magnitude == 9 and op.magnitude_std == 0.5 for op in transform.ops)
    assert transform.num_layers == 2
    for name in kinds:
        for level in LEVELS:
            if name.startswith("Posterize") and level == 10:
                continue  # timm asks for 0 bits, which Pillow refuses since version 13
            op = AugmentOp(name, 1.0, level, {"img_mean": FILL, "interpolation": Image.Resampling.BICUBIC})
            for sign, drawn in ((1, 0.0), (-1, 0.9)):  # the direction is negative where random() > 0.5
                original, random.random = random.random, lambda drawn=drawn: drawn
                try:
                    results.append(np.asarray(op(picture)))
                    names.append(f"{name} {level} {sign}")
                finally:
                    random.random = original
    arrays |= {"operations": np.asarray(names), "results": np.stack(results)}
    big = photograph(50, 37)
    arrays["photograph"] = np.asarray(big)
    for size, fraction in ((24, 0.875), (24, 0.9), (20, 1.0), (21, 0.8)):
        transform = create_transform(size, is_training=False, crop_pct=fraction, interpolation="bicubic")
        cut = transforms.Compose(transform.transforms[:2])
        for name, given in (("wide", big), ("tall", big.rotate(90, expand=True)), ("small", big.resize((19, 13)))):
            arrays[f"eval {name} {size} {fraction}"] = np.asarray(cut(given))
    crop = RandomResizedCropAndInterpolation(16, interpolation="bicubic")
    boxes = []
    for seed in range(3):
        random.seed(seed)
        torch.manual_seed(seed)
        box = crop.get_params(big, crop.scale, crop.ratio)
        top, left, height, width = box
        boxes.append((left, top, left + width, top + height))
        arrays[f"crop {seed}"] = np.asarray(
            transforms.functional.resized_crop(big, top, left, height, width, (16, 16), crop.interpolation)
        )
    arrays["boxes"] = np.asarray(boxes)
    arrays["box statistics"] = np.asarray([_relative_box(crop, size) for size in ((100, 75), (30, 100), (300, 20))])
    arrays["jitter"] = np.stack(
        [
            np.asarray(getattr(transforms.functional, f"adjust_{kind}")(picture, factor))
            for kind in ("brightness", "contrast", "saturation")
            for factor in (0.6, 1.4)
        ]
    )
    return arrays


def _relative_box(crop: RandomResizedCropAndInterpolation, size: tuple[int, int]) -> list[float]:
    """Means over 20,000 crops: area, width and height as shares, and where the middle is."""
    random.seed(0)
    torch.manual_seed(0)
    given = Image.new("L", size)
    found = np.asarray([crop.get_params(given, crop.scale, crop.ratio) for _ in range(20_000)], float)
    top, left, height, width = found.T
    share_w, share_h = width / size[0], height / size[1]
    values = (share_w * share_h, share_w, share_h, (left + width / 2) / size[0], (top + height / 2) / size[1])
    return [float(value.mean()) for value in values]


def statistics() -> dict[str, float]:
    """timm's Mixup in its pair mode and RandomErasing over many draws, on 16 x 16 pixels."""
    np.random.seed(0)  # noqa: NPY002 (timm draws from it)
    random.seed(0)
    torch.manual_seed(0)
    count, size = 20_000, 16
    images = (torch.arange(count) < count // 2).float()[:, None, None, None].expand(count, 1, size, size)
    mixup = Mixup(0.8, 1.0, switch_prob=0.5, mode="pair", label_smoothing=0.0, num_classes=2)
    mixed, _ = mixup(images.clone().contiguous(), (images[:, 0, 0, 0]).long())
    own = mixed[: count // 2, 0].reshape(count // 2, -1)
    is_whole = (own == 1).all(1)
    is_cut = ((own == 0) | (own == 1)).all(1) & ~is_whole
    share = own.mean(1)
    mixup_share, cut_share = share[~is_cut & ~is_whole], share[is_cut]
    erased = RandomErasing(0.25, mode="pixel", device="cpu")(torch.full((4000, 3, size, size), 7.0))
    inside = (erased != 7).all(1).float().mean((1, 2))
    return {
        "cut": float(is_cut.float().mean()),
        "whole": float(is_whole.float().mean()),
        "mixup_mean": float(mixup_share.mean()),
        "mixup_deviation": float(mixup_share.std()),
        "cut_mean": float(cut_share.mean()),
        "cut_deviation": float(cut_share.std()),
        "erased": float((inside > 0).float().mean()),
        "erased_mean": float(inside[inside > 0].mean()),
        "erased_deviation": float(inside[inside > 0].std()),
    }


if __name__ == "__main__":
    assert timm.__version__ == "1.0.31"
    arrays = recorded() | {"statistics": np.asarray(json.dumps(statistics()))}
    stream = io.BytesIO()
    np.savez_compressed(stream, **arrays)
    FILE.write_bytes(stream.getvalue())
    print(f"{FILE}: {len(arrays)} arrays, {len(stream.getvalue()) / 1e3:.0f} kB; {arrays['statistics']}")
