"""The main job: from a config to a trained model, a table, pictures, and a model to take away."""

import dataclasses
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from avit_jax.checkpoints.convert.weight_files import read_config
from avit_jax.checkpoints.model_folder import is_foreign, load, save
from avit_jax.commands.checks import check_folder, check_starts, check_values, flat, resolved
from avit_jax.commands.help import command_line
from avit_jax.data.account import check_data, data_account
from avit_jax.data.open import open_dataset
from avit_jax.data.pipeline import evaluation_images
from avit_jax.data.preprocessing import normalize
from avit_jax.data.settings import DataSettings
from avit_jax.data.sources import Dataset, Split
from avit_jax.evaluate.compare import format_summary, measure
from avit_jax.evaluate.figures import Evaluation
from avit_jax.model.config import AViTConfig, Preprocessing, config_from
from avit_jax.model.settings import given_fields
from avit_jax.model.vit import AViT
from avit_jax.report import draw_curves, draw_depth_histogram, draw_depth_maps
from avit_jax.runtime.files import read_json, write_json, writing
from avit_jax.runtime.processes import check_same, in_any_process
from avit_jax.runtime.signals import FolderLock
from avit_jax.train.gate_start import start_gate
from avit_jax.train.logs import read_metrics
from avit_jax.train.loop import train


def model_config(config: ConfigDict, dataset: Dataset) -> AViTConfig:
    """config.model, with image size, channels, classes, class names and normalisation taken from the data.

    Raises ValueError where config.model names a field that does not exist or contradicts the data.
    """
    preset, fields = given_fields(config.model)
    from_data: dict[str, Any] = {"num_classes": len(dataset.class_names)}
    if isinstance(dataset.train, Split):
        _, height, width, channels = dataset.train.images.shape
        from_data |= {"image_size": height if height == width else (height, width), "in_channels": channels}
    elif fields.setdefault("in_channels", 3) not in (1, 3):  # images from disk are made what the model takes
        raise ValueError(f"config.model.in_channels is {fields['in_channels']}: images from disk are read as 3 or 1")
    preprocessing = _preprocessing(config, dataset)
    for name, value in from_data.items():
        if fields.setdefault(name, value) != value:
            raise ValueError(f"config.model.{name} is {fields[name]} and the data say {value}: change one of them")
    if len(preprocessing.mean) != fields["in_channels"]:
        raise ValueError(
            f"config.data.mean and std have {len(preprocessing.mean)} values and images {fields['in_channels']} "
            "channels: give one value for each channel"
        )
    return config_from(preset, **fields, class_names=dataset.class_names, preprocessing=preprocessing)


def _preprocessing(config: ConfigDict, dataset: Dataset) -> Preprocessing:
    """The config's mean and std, or those of the training images by channel (exact: from histograms of bytes).

    For images from disk: the config's or ImageNet's, and the config's crop.
    """
    data = DataSettings.from_config(dict(config.data))
    mean, std = tuple(data.mean), tuple(data.std)
    if not isinstance(dataset.train, Split):
        return Preprocessing(**stated_preprocessing(config))
    if not (mean and std):
        values = np.arange(256) / 255
        channels = np.moveaxis(dataset.train.images, -1, 0)
        shares = [np.bincount(channel.ravel(), minlength=256) / channel.size for channel in channels]
        means = [float(share @ values) for share in shares]
        deviations = [float(share @ (values - m) ** 2) ** 0.5 for share, m in zip(shares, means, strict=True)]
        mean = mean or tuple(round(m, 4) for m in means)
        std = std or tuple(round(d, 4) or 1.0 for d in deviations)
    return Preprocessing(mean, std, crop_fraction=1.0)


def stated_preprocessing(config: ConfigDict) -> dict[str, Any]:
    """Preprocessing that config.data states, by not having the default; a checkpoint's own gives way to it."""
    data, default = DataSettings.from_config(dict(config.data)), DataSettings()
    names = [field.name for field in dataclasses.fields(Preprocessing)]
    return {name: getattr(data, name) for name in names if getattr(data, name) != getattr(default, name)}


def fields_for_foreign(config: ConfigDict, dataset: Dataset) -> tuple[str | None, dict[str, Any]]:
    """Preset and AViTConfig fields to load a checkpoint with that does not carry our configuration.

    They are what config.model gives and what the data decide; the rest is the checkpoint's. Images from disk are
    preprocessed as was published with the checkpoint, unless config.data states otherwise.
    """
    wanted = model_config(config, dataset)
    preset, fields = given_fields(config.model)
    fields |= {name: getattr(wanted, name) for name in ("image_size", "in_channels", "num_classes", "class_names")}
    if isinstance(dataset.train, Split):
        fields["preprocessing"] = wanted.preprocessing
    elif stated := stated_preprocessing(config):
        fields["preprocessing"] = stated
    return preset, fields


def initial_model(config: ConfigDict, dataset: Dataset) -> AViT:
    """A model with random weights from config.seed, or with those of config.init_from and this config's gate.

    With config.gate_start.images the gate starts from so many training images (gate_start.start_gate).
    """
    wanted = model_config(config, dataset)
    if not config.init_from:
        return AViT(wanted, rngs=nnx.Rngs(config.seed))
    preset, fields = None, {name: getattr(wanted, name) for name in wanted.__dataclass_fields__}
    if is_foreign(config.init_from):
        preset, fields = fields_for_foreign(config, dataset)
    elif not isinstance(dataset.train, Split):
        fields["preprocessing"] = stated_preprocessing(config)  # the rest is the checkpoint's own
    model = load(config.init_from, preset, **fields)
    if config.gate_start.images:
        # Evenly over the set, which may be sorted by class.
        chosen = np.linspace(0, len(dataset.train) - 1, min(config.gate_start.images, len(dataset.train))).astype(int)
        images = normalize(evaluation_images(dataset.train, chosen, model.config), model.config)
        start_gate(model, images, target_depth=config.gate_start.target_depth, deviation=config.gate_start.deviation)
    return model


def run(config: ConfigDict, workdir: str | Path, *, resume: bool = True, began: float | None = None) -> dict[str, Any]:
    """Train, measure dense and A-ViT on the test images, write summary.json and pictures; returns the summary.

    A finished run is not repeated, a stopped one is continued. began: time.perf_counter() from which `seconds` counts.
    Raises ValueError for a config that cannot work, and where workdir holds a run of another config, or any run while
    resume is False.
    """
    began = time.perf_counter() if began is None else began
    workdir = Path(workdir)
    if workdir.exists() and not workdir.is_dir():
        raise ValueError(f"the run's folder {workdir} is a file: give another --workdir")
    check_same(flat(resolved(config)))
    check_values(config)
    with FolderLock(workdir):
        return _run(config, workdir, resume, began)


def train_model(config: ConfigDict, workdir: str | Path, *, resume: bool = True) -> AViT:
    """Train as train.py does and return the trained model; summary.json in workdir has the measured figures.

    config: what a config file's get_config() returns, with any key changed. A finished run is not repeated, a stopped
    one is continued. Raises what `run` raises, and training.Stopped after SIGTERM or Ctrl-C, when the checkpoint is
    written and the same call goes on.
    """
    run(config, workdir, resume=resume)
    in_any_process(False)  # not before process 0 has written the model
    return load(Path(workdir) / "model")


def _run(config: ConfigDict, workdir: Path, resume: bool, began: float) -> dict[str, Any]:
    check_folder(config, workdir, resume)
    summary_path = workdir / "summary.json"
    if summary_path.exists():
        summary = read_json(summary_path)
        print(f"this run is finished; its table, from {summary_path}:")
        print(format_summary(summary))
        return summary
    dataset = open_dataset(DataSettings.from_config(dict(config.data)))
    check_starts(config)
    data = data_account(dataset)
    check_data(data, workdir)
    model = initial_model(config, dataset)
    baseline = _baseline(config, model.config)
    teacher = _teacher(config, model.config)
    first = jax.process_index() == 0
    if first:
        origin = {"command": command_line(), "versions": _versions(), "data": data}
        write_json(workdir / "train_config.json", origin | {"config": resolved(config)})
    earlier = train(config, dataset, model, workdir, teacher, began=began)
    summary, result = measure(dataset.test, baseline, model, config.eval_batch_size)
    summary["seconds"] = earlier + time.perf_counter() - began
    if not first:
        return summary
    with writing(workdir / "a picture"):
        pictures = draw(model, dataset, result, workdir)
    if not (workdir / "model").exists():
        save(model, workdir / "model")
    write_json(summary_path, summary)  # last: a folder with a summary is a finished run
    print(format_summary(summary))
    print("\n".join(["", *(f"picture: {path}" for path in pictures), f"model:   {workdir / 'model'}"]))
    return summary


def _baseline(config: ConfigDict, wanted: AViTConfig) -> AViT | None:
    """config.init_from as it is, for the table's other row; None where it knows other classes or another image size."""
    if not config.init_from:
        return None
    model = load(config.init_from, **_own_fields(config.init_from, wanted))
    same = ("num_classes", "image_shape")
    return model if all(getattr(model.config, name) == getattr(wanted, name) for name in same) else None


def _own_fields(path: str | Path, wanted: AViTConfig) -> dict[str, Any]:
    """What a checkpoint cannot tell of itself: of a foreign file all but classes, gate and image size."""
    if not Path(path).is_file() or read_config(Path(path)):
        return {}
    own = ("num_classes", "class_names", "gate_scale", "gate_center", "image_size")
    return {name: value for name, value in vars(wanted).items() if name not in own} | {"gate_scale": None}


def _teacher(config: ConfigDict, student: AViTConfig) -> AViT | None:
    """The model at config.teacher. Raises ValueError unless it sees the same images and knows the same classes."""
    if not config.teacher:
        return None
    teacher = load(config.teacher, **_own_fields(config.teacher, student))
    for name in ("image_shape", "in_channels", "num_classes", "preprocessing"):
        there, here = getattr(teacher.config, name), getattr(student, name)
        if there != here:
            raise ValueError(f"the teacher {config.teacher} has {name} {there} and the student {here}: they must agree")
    return teacher


def _versions() -> dict[str, str]:
    return {"python": sys.version.split()[0]} | {name: metadata.version(name) for name in ("jax", "flax", "optax")}


def draw(model: AViT, dataset: Dataset, result: Evaluation, workdir: Path) -> list[Path]:
    """The run's pictures; a model that never halts has curves alone."""
    pictures = [draw_curves(read_metrics(workdir), workdir / "curves.png", model.config.depth)]
    if model.config.halts:
        pictures.append(draw_depth_maps(model, dataset.test, result.image_depths, workdir / "depth_maps.png"))
        has_one = model.config.class_token
        pictures.append(draw_depth_histogram(result, workdir / "depth_histogram.png", class_token=has_one))
    return pictures
