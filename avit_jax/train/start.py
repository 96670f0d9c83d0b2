"""What a run starts from: the model configuration from config and data, weights, baseline and teacher."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from avit_jax.checkpoints.convert.weight_files import read_config
from avit_jax.checkpoints.model_folder import is_foreign, load, no_checkpoint
from avit_jax.data.pipeline import evaluation_images
from avit_jax.data.preprocessing import normalize
from avit_jax.data.settings import DataSettings
from avit_jax.data.sources import Dataset, Split
from avit_jax.model.config import AViTConfig, Preprocessing
from avit_jax.model.presets import config_from
from avit_jax.model.settings import ModelSettings
from avit_jax.model.vit import AViT
from avit_jax.train.gate_start import start_gate
from avit_jax.train.settings import TrainSettings


def check_starts(settings: TrainSettings) -> None:
    """Raises ValueError if config.init_from or config.teacher is a path where there is nothing."""
    for name, path in (("init_from", settings.init_from), ("teacher", settings.teacher)):
        if not path or Path(path).exists():
            continue
        if Path(path).parts[:1] == ("checkpoints",):
            way = (
                "it comes with the repository, not with the installed package: run the command in a checkout, give "
                f"--config.{name}=PATH to it, or train such a model first, here with --config=mnist_dense"
            )
        elif Path(path).parts[:1] == ("runs",):
            way = f"train that model first, or give --config.{name}=CHECKPOINT"
        else:
            way = f"give --config.{name}=CHECKPOINT, a run, a saved model or a file of weights"
        raise no_checkpoint(path, way, f"config.{name}")


def resolve_model_config(model: ModelSettings, data: DataSettings, dataset: Dataset) -> AViTConfig:
    """The model configuration: config.model, with image size, channels, classes and normalisation from the data.

    Raises ValueError if config.model has a field that does not exist or contradicts the data.
    """
    fields = dict(model.given)
    from_data: dict[str, Any] = {"num_classes": len(dataset.class_names)}
    if isinstance(dataset.train, Split):
        _, height, width, channels = dataset.train.images.shape
        from_data |= {"image_size": height if height == width else (height, width), "in_channels": channels}
    elif fields.setdefault("in_channels", 3) not in (1, 3):  # images from disk are converted to the model's channels
        raise ValueError(f"config.model.in_channels is {fields['in_channels']}: images from disk are read as 3 or 1")
    preprocessing = _preprocessing(data, dataset)
    for name, value in from_data.items():
        if fields.setdefault(name, value) != value:
            raise ValueError(f"config.model.{name} is {fields[name]} and the data say {value}: change one of them")
    if len(preprocessing.mean) != fields["in_channels"]:
        raise ValueError(
            f"config.data.mean and std have {len(preprocessing.mean)} values and images {fields['in_channels']} "
            "channels: give one value for each channel"
        )
    return config_from(model.preset, **fields, class_names=dataset.class_names, preprocessing=preprocessing)


def _preprocessing(data: DataSettings, dataset: Dataset) -> Preprocessing:
    """The config's mean and std, or those of the training images by channel (exact: from histograms of bytes).

    For images from disk: the config's mean and std or ImageNet's, and the config's crop.
    """
    mean, std = data.mean, data.std
    if not isinstance(dataset.train, Split):
        return Preprocessing(**stated_preprocessing(data))
    if not (mean and std):
        values = np.arange(256) / 255
        channels = np.moveaxis(dataset.train.images, -1, 0)
        shares = [np.bincount(channel.ravel(), minlength=256) / channel.size for channel in channels]
        means = [float(share @ values) for share in shares]
        deviations = [float(share @ (values - m) ** 2) ** 0.5 for share, m in zip(shares, means, strict=True)]
        mean = mean or tuple(round(m, 4) for m in means)
        std = std or tuple(round(d, 4) or 1.0 for d in deviations)
    return Preprocessing(mean, std, crop_fraction=1.0)


def stated_preprocessing(data: DataSettings) -> dict[str, Any]:
    """The preprocessing fields whose value in config.data is not the default; they override a checkpoint's own."""
    default = DataSettings()
    names = [field.name for field in dataclasses.fields(Preprocessing)]
    return {name: getattr(data, name) for name in names if getattr(data, name) != getattr(default, name)}


def initial_model(settings: TrainSettings, dataset: Dataset) -> AViT:
    """A model with random weights from config.seed, or with those of config.init_from and this config's gate.

    If config.gate_start.images is not 0, the gate is started from that many training images (gate_start.start_gate). A
    model with another rule has no gate to start.
    """
    model_config = resolve_model_config(settings.model, settings.data, dataset)
    if not settings.init_from:
        return AViT(model_config, rngs=nnx.Rngs(settings.seed))
    preset, fields = None, {name: getattr(model_config, name) for name in model_config.__dataclass_fields__}
    if is_foreign(settings.init_from):
        preset, fields = fields_for_foreign(settings.model, settings.data, dataset)
    elif not isinstance(dataset.train, Split):
        fields["preprocessing"] = stated_preprocessing(settings.data)  # the checkpoint has the rest
    model, gate = load(settings.init_from, preset, **fields), settings.gate_start
    if gate.images and model.config.rule is None:
        # Spread evenly over the set, because it may be sorted by class.
        chosen = np.linspace(0, len(dataset.train) - 1, min(gate.images, len(dataset.train))).astype(int)
        images = normalize(evaluation_images(dataset.train, chosen, model.config), model.config)
        start_gate(model, images, target_depth=gate.target_depth, deviation=gate.deviation, features=gate.features)
    return model


def fields_for_foreign(model: ModelSettings, data: DataSettings, dataset: Dataset) -> tuple[str | None, dict[str, Any]]:
    """Preset and AViTConfig fields for loading a checkpoint that does not carry our configuration.

    They come from config.model and from the data; the checkpoint has the rest. Images from disk are preprocessed as was
    published with the checkpoint, unless config.data says otherwise.
    """
    model_config = resolve_model_config(model, data, dataset)
    fields = model.given | {
        name: getattr(model_config, name) for name in ("image_size", "in_channels", "num_classes", "class_names")
    }
    if isinstance(dataset.train, Split):
        fields["preprocessing"] = model_config.preprocessing
    elif stated := stated_preprocessing(data):
        fields["preprocessing"] = stated
    return model.preset, fields


def load_baseline(path: str, model_config: AViTConfig) -> AViT | None:
    """The model at config.init_from, unchanged, for the table's other row.

    model_config: of the model to train. Returns None if there is no path, or if the model there has another number of
    classes or another image size.
    """
    if not path:
        return None
    model = load(path, **_own_fields(path, model_config))
    same = ("num_classes", "image_shape")
    return model if all(getattr(model.config, name) == getattr(model_config, name) for name in same) else None


def load_teacher(path: str, student: AViTConfig) -> AViT | None:
    """The model at config.teacher. Raises ValueError unless it takes the same images and has as many classes."""
    if not path:
        return None
    teacher = load(path, **_own_fields(path, student))
    for name in ("image_shape", "in_channels", "num_classes", "preprocessing"):
        there, here = getattr(teacher.config, name), getattr(student, name)
        if there != here:
            raise ValueError(f"the teacher {path} has {name} {there} and the student {here}: they must agree")
    return teacher


def _own_fields(path: str | Path, model_config: AViTConfig) -> dict[str, Any]:
    """The fields that a checkpoint lacks: for a foreign file all but classes, gate, rule and image size."""
    if not Path(path).is_file() or read_config(Path(path)):
        return {}
    own = ("num_classes", "class_names", "gate_scale", "gate_center", "rule", "image_size")
    return {name: value for name, value in vars(model_config).items() if name not in own} | {"gate_scale": None}
