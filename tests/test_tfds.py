"""TFDS data sets stored as ArrayRecord, made here and read without TensorFlow."""

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from avit_jax import AViTConfig
from avit_jax.commands.typed_config import parse
from avit_jax.data.open import open_dataset
from avit_jax.data.pipeline import evaluation_batches, evaluation_images, training_batches
from avit_jax.data.settings import AugmentSettings, DataSettings
from avit_jax.data.sources import Dataset
from avit_jax.train.start import resolve_model_config
from configs import mnist_dense

MODEL = AViTConfig(image_size=16, patch_size=8, num_classes=3)

# In a process of its own: tensorflow_datasets registers builders and loggers for ever. Formats: array_record, tfrecord.
MAKE = """
import io, sys
import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

class Animals(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {
            "image": tfds.features.Image(shape=(None, None, 3), encoding_format="jpeg"),
            "label": tfds.features.ClassLabel(names=["cat", "dog", "eel"]),
            "file_name": tfds.features.Text(),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, _):
        return {split: self._generate_examples(count, split) for split, count in SPLITS.items()}

    def _generate_examples(self, count, split):
        for i in range(count):
            stream = io.BytesIO()
            image = np.full((20, 24, 3), 10 * i + len(split), np.uint8)
            Image.fromarray(image).convert("CMYK" if i == 3 else "RGB").save(stream, "JPEG")
            stream.seek(0)
            yield i, {"image": stream, "label": i % 3, "file_name": f"{split}_{i}.JPEG"}

SPLITS = {"train": 21, "test": 6} | ({"validation": 5} if sys.argv[2] == "validation" else {})
Animals(data_dir=sys.argv[1], file_format="array_record").download_and_prepare()
assert "tensorflow" not in sys.modules
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tfds")
    command = [sys.executable, "-c", MAKE, str(folder), "validation"]
    subprocess.run(command, check=True, capture_output=True)
    return folder


def opened(root: Path, name: str = "animals", **settings: object) -> Dataset:
    return open_dataset(DataSettings(source="tfds", path=str(root), name=name, **settings))


def test_records_are_read_and_decoded_without_tensorflow(root: Path) -> None:
    dataset = opened(root)
    assert dataset.class_names == ("cat", "dog", "eel")
    assert [len(part) for part in (dataset.train, dataset.val, dataset.test)] == [21, 5, 6]
    assert "tensorflow" not in sys.modules
    seen = []
    for i in range(21):
        record = dataset.train[i]
        level = np.asarray(Image.open(io.BytesIO(record["image"])).convert("L"))[0, 0]
        number = int(dataset.train.name(i).split("train_")[1].split(".")[0])
        assert level == pytest.approx(10 * number + len("train"), abs=4)
        assert record["label"] == number % 3
        seen.append(number)
    assert sorted(seen) == list(range(21)), "shuffled when it was written, each once"


def test_training_and_evaluation_read_records(root: Path) -> None:
    dataset = opened(root, threads=2)
    batches = training_batches(
        dataset.train, MODEL, batch_size=7, seed=0, augment=AugmentSettings(crop_scale=(0.5, 1.0))
    )
    epoch = [next(batches) for _ in range(3)]
    batches.close()
    levels = np.concatenate([batch["image"][:, 0, 0, 0] for batch in epoch])
    labels = np.concatenate([batch["label"] for batch in epoch])
    assert ((levels.astype(int) - len("train") + 5) // 10 % 3).tolist() == labels.tolist()
    assert len(set(levels)) == 21
    found = list(evaluation_batches(dataset.val, MODEL, 4))
    assert [batch["weight"].tolist() for batch in found] == [[1, 1, 1, 1], [1, 0, 0, 0]]


def test_a_model_of_one_channel_takes_grey_images(root: Path) -> None:
    config = mnist_dense.get_config()
    config.data.update({"source": "tfds", "path": str(root), "name": "animals"})
    config.model.update({"image_size": 16, "patch_size": 8, "in_channels": 1})
    settings = parse(config)
    dataset = open_dataset(settings.data)
    model = resolve_model_config(settings.model, settings.data, dataset)
    (batch, *_) = evaluation_batches(dataset.val, model, 5)
    assert batch["image"].shape == (5, 16, 16, 1)
    np.testing.assert_array_equal(evaluation_images(dataset.val, range(5), model), batch["image"])
    config.model.in_channels = 3
    with pytest.raises(ValueError, match="config.data.mean and std have 1 values and images 3 channels"):
        resolve_model_config(parse(config).model, settings.data, dataset)
    config.model.in_channels = 2
    with pytest.raises(ValueError, match="config.model.in_channels is 2: images from disk are read as 3 or 1"):
        resolve_model_config(parse(config).model, settings.data, dataset)


def test_worker_processes_open_the_records_themselves(root: Path) -> None:
    def first(**settings: object) -> dict[str, np.ndarray]:
        train = opened(root, **settings).train
        batches = training_batches(train, MODEL, batch_size=7, seed=0, augment=AugmentSettings(flip=0.5))
        batch = next(batches)
        batches.close()
        return batch

    np.testing.assert_array_equal(first(workers=1)["image"], first()["image"])


def test_a_label_that_the_model_does_not_know_is_named(root: Path) -> None:
    two = AViTConfig(image_size=16, patch_size=8, num_classes=2)
    with pytest.raises(ValueError, match=r"animals validation in .*, record \d \(validation_\d.JPEG\) has label 2"):
        list(evaluation_batches(opened(root).val, two, 5))


def test_data_sets_that_cannot_be_read_say_what_to_do(root: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="config.data.name is empty"):
        opened(root, name="")
    with pytest.raises(ValueError, match="holds no prepared data set 'imagenet2012': prepare it once with 'tfds build"):
        opened(root, name="imagenet2012")
    version = tmp_path / "animals/1.0.0"
    version.mkdir(parents=True)
    for file in (root / "animals/1.0.0").iterdir():
        (version / file.name.replace("array_record", "tfrecord")).write_bytes(file.read_bytes())
    with pytest.raises(ValueError, match="holds TFRecord files, and only ArrayRecord can be read: .*convert_format"):
        opened(tmp_path)
    (version / "animals-train.array_record-00000-of-00001").touch()
    (version / "features.json").write_text("{")
    with pytest.raises(ValueError, match="holds no TFDS data set 'animals' that can be read"):
        opened(tmp_path)
