"""Batches: an endless shuffled stream for training whose state is one number, and one exact pass for evaluation."""

from collections.abc import Iterator
from typing import Any

import grain
import numpy as np

from avit_jax.config import AViTConfig
from avit_jax.data.augment import RandomAffine
from avit_jax.data.sources import Split
from avit_jax.preprocessing import normalize

Batch = dict[str, np.ndarray]


def training_batches(
    split: Split, model: AViTConfig, *, batch_size: int, seed: int, augment: dict[str, float]
) -> grain.DatasetIterator:
    """Shuffled anew each epoch, augmented, normalised; get_state / set_state continue it exactly.

    Same seed, same order and same augmentation. Raises ValueError where a batch is larger than the data.
    """
    if batch_size > len(split):
        raise ValueError(f"config.batch_size {batch_size} is larger than the {len(split)} training images: lower it")
    dataset = grain.MapDataset.source(split).seed(seed).shuffle().repeat()
    if any(augment.values()):
        dataset = dataset.random_map(RandomAffine(**augment))
    dataset = dataset.batch(batch_size, drop_remainder=True)
    dataset = dataset.map(lambda batch: batch | {"image": normalize(batch["image"], model)})
    # One thread: it decodes the next batches while the step runs, and two would take the step's cores.
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)))


def evaluation_batches(split: Split, model: AViTConfig, batch_size: int) -> Iterator[Batch]:
    """Every image once, in order; the last batch is padded to full size with images of `weight` 0."""
    for start in range(0, len(split), batch_size):
        images, labels = split.images[start : start + batch_size], split.labels[start : start + batch_size]
        missing = batch_size - len(images)
        yield {
            "image": _pad(normalize(images, model), missing),
            "label": _pad(labels, missing),
            "weight": _pad(np.ones(len(images), np.float32), missing),
        }


def _pad(array: Any, missing: int) -> np.ndarray:
    return np.pad(array, [(0, missing)] + [(0, 0)] * (array.ndim - 1))
