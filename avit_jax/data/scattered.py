"""Scattered items: pictures twice as large as an idx folder's images, with one to three of them among small pieces.

The label is that of the largest item. The rest is background and clutter, so most patches of a picture matter little.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image

from avit_jax.data.settings import DataSettings
from avit_jax.data.sources import Dataset, Split, load_dataset
from avit_jax.runtime.files import expanded, shown

FOLDER = "/usr/share/datasets/fashion-mnist"
SIDE = 2  # a picture's height and width, in those of an item's image
SCALES = (0.5, 1.5)  # least and most scale of an item
OTHERS = 0.7  # the most scale of another item, as a fraction of the largest one's
MOST_ITEMS = 3
PIECES = (4, 8)  # least and most pieces in a picture
PIECE_SIDES = (3 / 14, 5 / 14)  # least and most side of a piece: 6 to 10 pixels of an item's 28
MOST_NUMBERS = 3 + 4 * MOST_ITEMS + 6 * PIECES[1]  # that a scene draws
FAINT = 16  # pixels up to this value are background, which hides nothing
LEAST_SIDE = 8  # pixels; pieces of smaller images would be single pixels


@dataclasses.dataclass(frozen=True)
class Placement:
    """An item, or a piece of one, in a picture."""

    item: int  # its index in the split
    box: tuple[int, int, int, int]  # left, top, right and bottom of the part that is shown, in the item's pixels
    scale: float
    left: int  # where it is in the picture, in pixels
    top: int
    width: int
    height: int


@dataclasses.dataclass(frozen=True)
class Scene:
    """What is in a picture. It is painted in this order, so nothing covers the largest item."""

    pieces: tuple[Placement, ...]
    items: tuple[Placement, ...]  # the largest last


@dataclasses.dataclass(frozen=True)
class ScatteredSplit:
    """The pictures of one split, made when they are read. The largest item of picture i is item i of the split."""

    items: Split
    seed: int  # picture i depends on the items, the seed and i alone
    about: str  # what messages call the split
    settings: DataSettings

    @property
    def labels(self) -> Int[np.ndarray, " n"]:
        """The labels of the largest items."""
        return self.items.labels

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": self.paint(self.scene(index)), "label": self.labels[index]}

    def name(self, index: int) -> str:
        """The split and the number of the picture."""
        return f"{self.about}, picture {index}"

    def scene(self, index: int) -> Scene:
        """Where the items and pieces of picture `index` are."""
        index = range(len(self))[index]
        # RandomState's numbers are the same in every version of NumPy. One call for all is far faster than a call each.
        numbers = np.random.RandomState(np.random.PCG64([self.seed, index])).random_sample(MOST_NUMBERS)
        draw = _Draw(iter(numbers.tolist()))
        count = draw.whole(1, MOST_ITEMS)
        least, most = SCALES
        largest = draw.between(least if count == 1 else least / OTHERS, most)
        others = [
            self._item(draw, self._other(draw, index), draw.between(least, OTHERS * largest)) for _ in range(count - 1)
        ]
        pieces = [self._piece(draw, self._other(draw, index)) for _ in range(draw.whole(*PIECES))]
        return Scene(tuple(pieces), (*others, self._item(draw, index, largest)))

    def _other(self, draw: "_Draw", index: int) -> int:
        return (index + draw.whole(1, len(self) - 1)) % len(self)

    def _item(self, draw: "_Draw", item: int, scale: float) -> Placement:
        rows, columns = self.items.images.shape[1:3]
        return self._placed(draw, item, (0, 0, columns, rows), scale)

    def _piece(self, draw: "_Draw", item: int) -> Placement:
        """A square from the middle of an item, where it is seldom empty."""
        rows, columns = self.items.images.shape[1:3]
        side = round(min(rows, columns) * draw.between(*PIECE_SIDES))
        left, top = (length // 4 + draw.whole(0, length // 2 - side) for length in (columns, rows))
        return self._placed(draw, item, (left, top, left + side, top + side), 1.0)

    def _placed(self, draw: "_Draw", item: int, box: tuple[int, int, int, int], scale: float) -> Placement:
        """The part `box` of an item somewhere in the picture, wholly inside."""
        rows, columns = self.items.images.shape[1:3]
        width, height = round(scale * (box[2] - box[0])), round(scale * (box[3] - box[1]))
        left, top = draw.whole(0, SIDE * columns - width), draw.whole(0, SIDE * rows - height)
        return Placement(item, box, scale, left, top, width, height)

    def paint(self, scene: Scene) -> UInt8[np.ndarray, "h w 1"]:
        """The picture of a scene, which may be another than those of the split."""
        rows, columns = self.items.images.shape[1:3]
        picture = np.zeros((SIDE * rows, SIDE * columns), np.uint8)
        for placed in (*scene.pieces, *scene.items):
            part = self.items.images[placed.item, ..., 0]
            if placed.scale == 1:
                left, top, right, bottom = placed.box
                part = part[top:bottom, left:right]
            else:  # only items are resized, and they are shown whole
                size = (placed.width, placed.height)
                part = np.asarray(Image.fromarray(part).resize(size, Image.Resampling.BILINEAR))
            there = picture[placed.top : placed.top + placed.height, placed.left : placed.left + placed.width]
            np.copyto(there, part, where=part > FAINT)
        return picture[..., None]


@dataclasses.dataclass(frozen=True)
class _Draw:
    """Random numbers in 0..1, each used once."""

    numbers: Iterator[float]

    def between(self, least: float, most: float) -> float:
        return least + next(self.numbers) * (most - least)

    def whole(self, least: int, most: int) -> int:
        """A whole number, `least` and `most` included."""
        return least + int(next(self.numbers) * (most - least + 1))


def load_scattered(settings: DataSettings) -> Dataset[ScatteredSplit]:
    """As many pictures as the idx folder settings.path has images; an empty path is that of Debian's Fashion-MNIST.

    Each split of the folder's images makes a split of pictures, so no item is in two. Raises ValueError for
    a folder that is missing or does not hold what it should, and for images too small or too few.
    """
    path = str(expanded(settings.path or FOLDER))
    dataset = load_dataset("idx", path, settings.class_names)
    height, width = dataset.train.images.shape[1:3]
    if min(height, width) < LEAST_SIDE:
        raise ValueError(
            f"{shown(path)} has images of {height}x{width} pixels: scattered items need at least "
            f"{LEAST_SIDE}x{LEAST_SIDE}"
        )
    splits = {"training": dataset.train, "validation": dataset.val, "test": dataset.test}
    for purpose, items in splits.items():
        if len(items) < 2:
            raise ValueError(
                f"{shown(path)} has too few images for {purpose}, {len(items)}: a picture needs at least 2 items"
            )
    train, val, test = (
        ScatteredSplit(items, seed, f"{purpose} items of {shown(path)}", settings)
        for seed, (purpose, items) in enumerate(splits.items())
    )
    return Dataset(train, val, test, dataset.class_names)
