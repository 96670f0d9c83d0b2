"""timm's transforms in a PyTorch DataLoader, as DeiT's training code reads ImageNet; input_pipeline.py runs this.

Prints JSON: images per second in steady state, or per CPU second without workers. torchvision is installed with
--no-deps beside a CPU build of torch, and its compiled operators are stubbed, because transforms of pictures need none.
"""

import argparse
import json
import time
from typing import Any

import torch
from PIL import Image, ImageOps


def posterize(picture: Image.Image, bits: int, **_: object) -> Image.Image:
    """timm's posterize, without its call for 0 bits, which Pillow 13 and later refuse."""
    return ImageOps.posterize(picture, bits) if bits else Image.new(picture.mode, picture.size)


def main() -> None:
    """Read the given number of images and print the speed."""
    library = torch.library.Library("torchvision", "DEF")
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    from timm.data import auto_augment, create_transform
    from torchvision.datasets import ImageFolder

    parser = argparse.ArgumentParser()
    parser.add_argument("root")
    parser.add_argument("--purpose", choices=("train", "eval"))
    parser.add_argument("--workers", type=int)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--images", type=int)
    arguments = parser.parse_args()
    for name in ("PosterizeIncreasing", "Posterize"):
        auto_augment.NAME_TO_OP[name] = posterize
    if arguments.purpose == "train":
        transform = create_transform(
            224,
            is_training=True,
            color_jitter=0.3,
            auto_augment="rand-m9-mstd0.5-inc1",
            interpolation="bicubic",
            re_prob=0.25,
            re_mode="pixel",
            re_count=1,
        )
    else:
        transform = create_transform(224, is_training=False, interpolation="bicubic", crop_pct=0.875)
    images = ImageFolder(f"{arguments.root}/train", transform=transform)
    repeated: Any = torch.utils.data.ConcatDataset([images] * (1 + 2 * arguments.images // len(images)))
    loader = torch.utils.data.DataLoader(
        repeated, batch_size=arguments.batch, shuffle=arguments.purpose == "train", num_workers=arguments.workers
    )
    batches = iter(loader)
    torch.set_num_threads(1)
    for _ in range(2 * max(arguments.workers, 1)):
        next(batches)
    began, began_cpu, seen = time.perf_counter(), time.process_time(), 0
    while seen < arguments.images:
        seen += len(next(batches)[0])
    wall, cpu = time.perf_counter() - began, time.process_time() - began_cpu
    # Without workers this process does everything, and its CPU time does not depend on other users of the machine.
    print(json.dumps({"images_per_second": seen / (wall if arguments.workers else cpu)}))


if __name__ == "__main__":
    main()
