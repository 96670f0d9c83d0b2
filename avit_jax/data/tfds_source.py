"""TFDS data sets stored as ArrayRecord, read without TensorFlow."""

import dataclasses
import re
from pathlib import Path
from typing import Any

from avit_jax.data.settings import DataSettings
from avit_jax.data.sources import Dataset
from avit_jax.runtime.files import expanded
from avit_jax.runtime.text import first_line

HELD_OUT = 5  # percent of train that become val if a data set has no validation split


@dataclasses.dataclass(frozen=True)
class TfdsSplit:
    """The records of one split. An element holds the image's bytes, not decoded."""

    source: Any  # from tfds.data_source: random access to records, opened again in every process
    about: str  # what messages call it
    settings: DataSettings
    labels: None = None  # they are inside the records, and reading all of them would need a pass over the data

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self.source[int(index)]
        return {"image": record["image"], "label": record["label"]}

    def name(self, index: int) -> str:
        """Data set, split and number of the record, with its file name if the data set has one."""
        record = self.source[int(index)]
        file = record.get("file_name", b"")
        return f"{self.about}, record {index}" + (f" ({file.decode(errors='replace')})" if file else "")


def load_tfds(settings: DataSettings) -> Dataset:
    """train, val and test of a data set prepared as ArrayRecord in config.data.path ("": ~/tensorflow_datasets).

    val is "validation", or if there is none, the last 5 % of train; test is "test" if it has labels, else val. Raises
    ValueError if the data set is not prepared or is stored as TFRecord, with the command that helps, and if it is not
    for image classification.
    """
    name = settings.name
    if not name:
        raise ValueError("config.data.name is empty: give the TFDS data set, such as imagenet2012")
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise ValueError("config.data.source 'tfds' needs a package: pip install tensorflow-datasets") from error
    root = expanded(settings.path or "~/tensorflow_datasets")
    _check_prepared(root, name)
    try:
        builder = tfds.builder(name, data_dir=root)
    except Exception as error:  # tfds raises many kinds; each means that the folder holds no such data set
        raise ValueError(f"{root} holds no TFDS data set {name!r} that can be read: {first_line(error)}") from error
    features = dict(builder.info.features or {})
    if "image" not in features or not hasattr(features.get("label"), "names"):
        raise ValueError(f"the TFDS data set {name!r} has {sorted(features)}: it needs an image and a class label")
    known = builder.info.splits
    train, val = (
        ("train", "validation") if "validation" in known else (f"train[:-{HELD_OUT}%]", f"train[-{HELD_OUT}%:]")
    )
    # ImageNet's test images are included, but have no labels (-1).
    test = "test" if "test" in known and not name.startswith("imagenet2012") else val
    decoders = {"image": tfds.decode.SkipDecoding()}

    def opened(split: str) -> TfdsSplit:
        return TfdsSplit(builder.as_data_source(split=split, decoders=decoders), f"{name} {split} in {root}", settings)

    return Dataset(opened(train), opened(val), opened(test), tuple(features["label"].names))


def _check_prepared(root: Path, name: str) -> None:
    """Raises ValueError if there are no ArrayRecord files, for which tfds itself gives a misleading error."""
    folder = root / re.split("[:/]", name)[0]
    prepare = f"tfds build {name} --data_dir={root} --file_format=array_record"
    versions = sorted(folder.glob("**/dataset_info.json")) if folder.is_dir() else []
    if not versions:
        raise ValueError(
            f"{folder} holds no prepared data set {name!r}: prepare it once with '{prepare}' "
            "(pip install '.[prepare]' in avit_jax's folder)"
        )
    if any(any(file.parent.glob("*.array_record*")) for file in versions):
        return
    found = versions[-1].parent
    kind = "TFRecord files" if any(found.glob("*.tfrecord*")) else "no ArrayRecord files"
    raise ValueError(
        f"{found} holds {kind}, and only ArrayRecord can be read: prepare it with '{prepare}', or convert it with "
        f"'python -m tensorflow_datasets.scripts.convert_format --dataset_version_dir={found} "
        "--out_file_format=array_record' (pip install '.[prepare]' in avit_jax's folder)"
    )
