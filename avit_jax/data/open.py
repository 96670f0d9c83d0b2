"""The data set that config.data names."""

import dataclasses

from avit_jax.data.folder import load_folder
from avit_jax.data.scattered import load_scattered
from avit_jax.data.settings import DataSettings
from avit_jax.data.sources import Dataset, load_dataset, spread
from avit_jax.data.tfds_source import load_tfds


def open_dataset(settings: DataSettings) -> Dataset:
    """The data set's splits, each with the settings for reading it.

    Raises ValueError for files that are missing or do not hold what they should, and for too many train_images.
    """
    dataset = _whole(settings)
    if not settings.train_images:
        return dataset
    if settings.train_images > len(dataset.train):
        raise ValueError(
            f"config.data.train_images is {settings.train_images} and there are {len(dataset.train)} training images: "
            "give at most as many, or 0 for all"
        )
    return dataclasses.replace(dataset, train=spread(dataset.train, settings.train_images))


def _whole(settings: DataSettings) -> Dataset:
    if settings.source == "folder":
        return load_folder(settings)
    if settings.source == "tfds":
        return load_tfds(settings)
    if settings.source == "scattered":
        return load_scattered(settings)
    dataset = load_dataset(settings.source, settings.path, settings.class_names)
    splits = (dataset.train, dataset.val, dataset.test)
    train, val, test = (dataclasses.replace(split, settings=settings) for split in splits)
    return Dataset(train, val, test, dataset.class_names)
