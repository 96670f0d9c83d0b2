"""Batches: an endless shuffled stream for training whose state is one number, and one exact pass for evaluation."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain
import numpy as np
from absl import flags, logging
from jaxtyping import UInt8

from avit_jax.data.augment import RandomAffine
from avit_jax.data.crop import RandomFlip, RandomResizedCrop
from avit_jax.data.decode import BadData, BadImage, decode
from avit_jax.data.elements import (
    BadImages,
    Decode,
    EvaluationCrop,
    EvaluationRows,
    Numbered,
    ToArray,
    TrainingCrop,
    as_array,
)
from avit_jax.data.preprocessing import normalize
from avit_jax.data.randaugment import ColorJitter, RandAugment
from avit_jax.data.settings import AugmentSettings, DataSettings
from avit_jax.data.sources import Images, Split
from avit_jax.data.workers import end_with_parent
from avit_jax.model.config import AViTConfig
from avit_jax.runtime.files import shown
from avit_jax.runtime.mesh import available_cores

Batch = dict[str, Any]
BAD_LIMIT = 0.01  # the largest fraction of bad images in a split that on_bad_image = "skip" accepts


class TrainingBatches(Iterator[Batch]):
    """The endless training stream. set_state continues it exactly and without delay, with any number of workers."""

    def __init__(self, opened: Callable[[int], grain.DatasetIterator], split: Images, rows: int, share: float) -> None:
        self._opened = opened  # the iterator that starts at a given batch
        self._split = split
        self._rows = rows  # in a batch
        self._share = share  # the fraction of an epoch's images that this process reads
        self._next = 0
        self._bad: set[int] = set()
        self._iterator: grain.DatasetIterator | None = None

    def __next__(self) -> Batch:
        if self._iterator is None:
            self._iterator = self._opened(self._next)
        batch = _next(self._iterator)
        self._next += 1
        # Each epoch brings other images to this process: in the end it sees all of them.
        share = max(self._share, min(1.0, self._next * self._rows / len(self._split)))
        _count_bad(self._split, batch, self._bad, share)
        return batch

    def get_state(self) -> dict[str, Any]:
        """Plain JSON: how many batches were returned, and the indices of the bad images."""
        return {"next_index": self._next, "bad": sorted(self._bad)}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue from where get_state returned `state`."""
        self.close()
        self._next, self._bad = state["next_index"], set(state.get("bad", ()))

    def close(self) -> None:
        """Stop the workers."""
        if self._iterator is not None:
            self._iterator.close()
        self._iterator = None


def training_batches(
    split: Images,
    model_config: AViTConfig,
    *,
    batch_size: int,
    seed: int,
    augment: AugmentSettings,
    process_index: int = 0,
    process_count: int = 1,
) -> TrainingBatches:
    """Augmented batches, shuffled again each epoch: this process's rows of every batch of batch_size images.

    seed: the same seed gives the same batches for any number of workers, threads and processes. "image" is normalised
    float32 for arrays in memory. For images from disk it is uint8, a quarter of the bytes, and the device normalises it
    (mix.py). With on_bad_image "skip" there is a "weight". Raises ValueError if a batch is larger than the data or
    cannot be divided among the processes; next() raises it for unusable data.
    """
    settings = split.settings
    _check_shares(batch_size, process_count)
    if batch_size > len(split) * settings.repeated_augmentation:
        raise ValueError(f"config.batch_size {batch_size} is larger than the {len(split)} training images: lower it")
    dataset = grain.MapDataset.source(Numbered(split)).seed(seed).shuffle().repeat()
    if settings.repeated_augmentation > 1:
        dataset = _Reindexed(dataset, RepeatedRows(settings.repeated_augmentation, batch_size))
    dataset = _augmented(dataset, split, model_config, augment)
    if process_count > 1:
        dataset = _Reindexed(dataset, OwnRows(batch_size, process_index, process_count))
    finish = functools.partial(
        _finished, in_memory=isinstance(split, Split), model_config=model_config, settings=settings
    )
    return TrainingBatches(
        lambda start: _read(dataset, batch_size // process_count, start, finish, settings, isinstance(split, Split)),
        split,
        rows=batch_size // process_count,
        share=1 / process_count,
    )


def _augmented(
    dataset: grain.MapDataset, split: Images, model_config: AViTConfig, augment: AugmentSettings
) -> grain.MapDataset:
    settings = split.settings
    if not isinstance(split, Split) or augment.needs_pictures:
        bad = BadImages(split, model_config, settings.on_bad_image == "skip")
        dataset = dataset.map(Decode(bad))
        if augment.crop_scale:
            crop = RandomResizedCrop(
                model_config.image_shape, augment.crop_scale, augment.crop_ratio, settings.interpolation
            )
            dataset = dataset.random_map(TrainingCrop(crop, bad))
        else:
            dataset = dataset.map(EvaluationCrop(bad))
        if augment.flip:
            dataset = dataset.random_map(RandomFlip(augment.flip))
        if augment.randaugment:
            fill = tuple(min(255, round(255 * value)) for value in model_config.preprocessing.mean)
            dataset = dataset.random_map(
                RandAugment.from_string(augment.randaugment, fill=fill, interpolation=settings.interpolation)
            )
        elif augment.color_jitter:
            dataset = dataset.random_map(ColorJitter(augment.color_jitter))
        dataset = dataset.map(ToArray())
    if any(augment.affine.values()):
        dataset = dataset.random_map(RandomAffine(**augment.affine))
    return dataset


def evaluation_batches(
    split: Images, model_config: AViTConfig, batch_size: int, *, process_index: int = 0, process_count: int = 1
) -> Iterator[Batch]:
    """Every image once over all processes, in order: this process's rows of batches of batch_size images.

    "image" is normalised float32 for arrays in memory, uint8 for images from disk, as in training. The last batch
    is padded to full size with images of "weight" 0. Bad images that are skipped have weight 0 too.
    """
    _check_shares(batch_size, process_count)
    own = batch_size // process_count
    if isinstance(split, Split):
        for start in range(process_index * own, len(split) + process_index * own, batch_size):
            images, labels = split.images[start : start + own], split.labels[start : start + own]
            missing = own - len(images)
            yield {
                "image": _pad(normalize(images, model_config), missing),
                "label": _pad(labels, missing),
                "weight": _pad(np.ones(len(images), np.float32), missing),
            }
        return
    settings = split.settings
    rows = EvaluationRows(split, batch_size, process_index, process_count)
    bad_images = BadImages(split, model_config, settings.on_bad_image == "skip")
    dataset = grain.MapDataset.source(rows).map(Decode(bad_images)).map(EvaluationCrop(bad_images)).map(ToArray())
    iterator = _read(dataset, own, 0, lambda batch: batch, settings, in_memory=False)
    bad: set[int] = set()
    try:
        for _ in range(len(rows) // own):
            batch = _next(iterator)
            _count_bad(split, batch, bad, 1 / process_count)
            yield batch
    finally:
        iterator.close()


def evaluation_images(
    split: Images, indices: Sequence[int] | np.ndarray, model_config: AViTConfig
) -> UInt8[np.ndarray, "n h w c"]:
    """The images of a split at these indices as evaluation sees them, but not normalised."""
    if isinstance(split, Split):
        return split.images[np.asarray(indices)]
    bad = BadImages(split, model_config, skip=False)
    elements = (Decode(bad).map(split[int(i)] | {"index": int(i)}) for i in indices)
    return np.stack([as_array(EvaluationCrop(bad).map(element)["image"]) for element in elements])


class _Reindexed(grain.MapDataset):
    """The elements of an endless data set in another order."""

    def __init__(self, parent: grain.MapDataset, index: Callable[[int], int]) -> None:
        super().__init__(parent)
        self._index = index

    def __len__(self) -> int:
        return len(self._parent)

    def __getitem__(self, index: Any) -> Any:
        return self.slice(index) if isinstance(index, slice) else self._parent[self._index(index)]


class RepeatedRows:
    """Repeated augmentation: maps a row to its place in the shuffled stream, so that each image comes `times` times.

    A batch holds all first copies, then all second ones, and so on. So no image is next to its own copy, which mixup
    would mix it with, and the copies go to different devices. In `times` epochs every image is seen `times` times.
    """

    def __init__(self, times: int, batch_size: int) -> None:
        self.times, self.batch_size = times, batch_size
        self._order = [row for first in range(times) for row in range(first, batch_size, times)]

    def __call__(self, row: int) -> int:
        """The row's place in the shuffled stream."""
        batch, offset = divmod(row, self.batch_size)
        return (batch * self.batch_size + self._order[offset]) // self.times


class OwnRows:
    """The rows of every batch that belong to one process: a contiguous share."""

    def __init__(self, batch_size: int, process_index: int, process_count: int) -> None:
        self.batch_size, self.own = batch_size, batch_size // process_count
        self.first = process_index * self.own

    def __call__(self, row: int) -> int:
        """The place in the whole stream of this process's row."""
        batch, offset = divmod(row, self.own)
        return batch * self.batch_size + self.first + offset


def _read(
    dataset: grain.MapDataset,
    size: int,
    start: int,
    finish: Callable[[Batch], Batch],
    settings: DataSettings,
    in_memory: bool,
) -> grain.DatasetIterator:
    """Batches from number `start` on, made in the background. Their order does not depend on what makes them."""
    if settings.workers:
        if not flags.FLAGS.is_parsed():  # grain passes flags to its workers; outside app.run they are not parsed
            flags.FLAGS.mark_as_parsed()
        # Workers get whole batches in turn. If they got single images, each worker would make its own batches of them.
        batches = dataset.batch(size, drop_remainder=True).map(finish)[start:]
        options = grain.ReadOptions(num_threads=settings.threads or 1, prefetch_buffer_size=2)
        return iter(
            batches.to_iter_dataset(options).mp_prefetch(
                grain.MultiprocessingOptions(num_workers=settings.workers, per_worker_buffer_size=2), end_with_parent
            )
        )
    if in_memory:
        # One thread makes the next batches while the step runs; a second one would take cores away from the step.
        batches = dataset.batch(size, drop_remainder=True).map(finish)[start:]
        return iter(batches.to_iter_dataset(grain.ReadOptions(settings.threads or 1, prefetch_buffer_size=4)))
    # Image by image, so that all threads work on the next batch; then few images wait, and they stay in the cache.
    threads = settings.threads or available_cores()
    options = grain.ReadOptions(threads, prefetch_buffer_size=4 * threads)
    images = dataset[start * size :].to_iter_dataset(options)
    batches = images.batch(size, drop_remainder=True).map(finish)
    return iter(grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=1))


def _finished(batch: Batch, in_memory: bool, model_config: AViTConfig, settings: DataSettings) -> Batch:
    """What the training step takes, and the indices of the images if bad ones are to be counted."""
    wanted = {"image", "label"} | ({"weight", "index"} if settings.on_bad_image == "skip" and not in_memory else set())
    batch = {name: value for name, value in batch.items() if name in wanted}
    return batch | {"image": normalize(batch["image"], model_config)} if in_memory else batch


def _next(iterator: grain.DatasetIterator) -> Batch:
    try:
        return next(iterator)
    except BadData as error:  # raised again: from a worker process, its text ends with the worker's traceback
        raise type(error)(str(error).splitlines()[0]) from error


def _count_bad(split: Images, batch: Batch, known: set[int], share: float) -> None:
    """Log a batch's new bad images. Raises BadData if they are too many for this process's share of the data."""
    indices = batch.pop("index", None)
    if indices is None:
        return
    for index in indices[(batch["weight"] == 0) & (indices >= 0)].tolist():
        if index not in known:
            known.add(index)
            logging.warning("image skipped, %d so far: %s", len(known), _reason(split, index))
    if len(known) > BAD_LIMIT * share * len(split):
        raise BadData(
            f"{len(known)} of {round(share * len(split))} images are bad, more than {BAD_LIMIT:.0%}; one of them: "
            f"{_reason(split, max(known))}"
        )


def _reason(split: Images, index: int) -> str:
    """Why an image is bad. It is decoded once more, because a worker process cannot show the message."""
    try:
        decode(split[index]["image"], functools.partial(split.name, index))
    except BadImage as error:
        return str(error)
    return f"{shown(split.name(index))} could not be read before, but can be read now"


def _check_shares(batch_size: int, process_count: int) -> None:
    if batch_size % process_count:
        raise ValueError(
            f"a batch of {batch_size} cannot be divided among {process_count} processes: change the batch size"
        )


def _pad(array: Any, missing: int) -> np.ndarray:
    return np.pad(array, [(0, missing)] + [(0, 0)] * (array.ndim - 1))
