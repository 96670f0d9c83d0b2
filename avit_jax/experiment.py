"""The main job: from a config to a trained model, a table, pictures, and a model to take away."""

import json
import shlex
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from avit_jax.checkpoint import load, save
from avit_jax.config import AViTConfig, Preprocessing, config_from
from avit_jax.data.sources import Dataset, load_dataset
from avit_jax.evaluation import Evaluation, evaluate, images_per_second
from avit_jax.logs import read_metrics
from avit_jax.model import AViT
from avit_jax.preprocessing import normalize
from avit_jax.report import draw_curves, draw_depth_histogram, draw_depth_maps
from avit_jax.training import train

# What decides the shapes of the parameters; the gate and the preprocessing are the checkpoint's own.
SHAPE_FIELDS = [
    "image_size",
    "patch_size",
    "in_channels",
    "num_classes",
    "embed_dim",
    "depth",
    "mlp_ratio",
    "qkv_bias",
    "distilled",
]
SUMMARY_KEYS = ("top1", "top5", "gmacs")
DEPTH_KEYS = ("mean_depth", "depth_fraction", "depth_std_tokens", "depth_std_images")


def model_config(config: ConfigDict, dataset: Dataset) -> AViTConfig:
    """config.model, with image size, channels, classes, class names and normalisation taken from the data.

    Raises ValueError where config.model names a field that does not exist or contradicts the data.
    """
    fields = dict(config.model)
    preset = fields.pop("preset", None)
    _, height, width, channels = dataset.train.images.shape
    from_data = {
        "image_size": height if height == width else (height, width),
        "in_channels": channels,
        "num_classes": len(dataset.class_names),
    }
    for name, value in from_data.items():
        if fields.setdefault(name, value) != value:
            raise ValueError(f"config.model.{name} is {fields[name]} and the data say {value}: change one of them")
    return config_from(preset, **fields, class_names=dataset.class_names, preprocessing=_preprocessing(config, dataset))


def _preprocessing(config: ConfigDict, dataset: Dataset) -> Preprocessing:
    """The config's mean and std, or those of the training images by channel."""
    pixels = dataset.train.images.reshape(-1, dataset.train.images.shape[-1]) / np.float32(255)
    mean = config.data.mean or tuple(round(float(value), 4) for value in pixels.mean(0))
    std = config.data.std or tuple(round(float(value), 4) or 1.0 for value in pixels.std(0))
    return Preprocessing(tuple(mean), tuple(std), crop_fraction=1.0)


def initial_model(config: ConfigDict, dataset: Dataset) -> AViT:
    """A model with random weights from config.seed, or with those of config.init_from and this config's gate."""
    wanted = model_config(config, dataset)
    if not config.init_from:
        return AViT(wanted, rngs=nnx.Rngs(config.seed))
    return load(config.init_from, **{name: getattr(wanted, name) for name in wanted.__dataclass_fields__})


def run(config: ConfigDict, workdir: str | Path, *, resume: bool = True) -> dict[str, Any]:
    """Train, measure dense and A-ViT on the test images, write summary.json and pictures; returns the summary.

    A finished run is not repeated, a stopped one is continued. Raises ValueError where workdir holds a run of another
    config, or any run while resume is False.
    """
    began = time.perf_counter()
    workdir = Path(workdir)
    _claim(config, workdir, resume)
    summary_path = workdir / "summary.json"
    if summary_path.exists():
        summary = json.loads(summary_path.read_text())
        print(f"this run is finished; its table, from {summary_path}:")
        print(format_summary(summary))
        return summary
    dataset = load_dataset(config.data.source, config.data.path)
    model = initial_model(config, dataset)
    baseline = load(config.init_from) if config.init_from else None
    teacher = load(config.teacher) if config.teacher else None
    loading = time.perf_counter() - began
    trained = train(config, dataset, model, workdir, teacher)
    measuring = time.perf_counter()
    summary, result = _measure(config, dataset, baseline, model)
    pictures = draw(model, dataset, result, workdir)
    if not (workdir / "model").exists():
        save(model, workdir / "model")
    summary["seconds"] = loading + trained + time.perf_counter() - measuring
    # Last: a folder with a summary is a finished run.
    summary_path.write_text(json.dumps(summary, indent=2) + "\n")
    print(format_summary(summary))
    print("\n".join(["", *(f"picture: {path}" for path in pictures), f"model:   {workdir / 'model'}"]))
    return summary


def _claim(config: ConfigDict, workdir: Path, resume: bool) -> None:
    """Write the resolved config into workdir, or see that the run there has the same one."""
    path = workdir / "train_config.json"
    resolved = json.loads(config.to_json())
    if not path.exists():
        workdir.mkdir(parents=True, exist_ok=True)
        origin = {"command": shlex.join(["python", *sys.argv]), "versions": _versions(), "config": resolved}
        path.write_text(json.dumps(origin, indent=2) + "\n")
        return
    if not resume:
        raise ValueError(f"{workdir} holds a run already: leave --noresume out, or give another --workdir")
    there, here = _flat(json.loads(path.read_text())["config"]), _flat(resolved)
    changed = [name for name in sorted(there.keys() | here.keys()) if there.get(name) != here.get(name)]
    if changed:
        name = changed[0]
        raise ValueError(
            f"{workdir} holds a run with config.{name}={there.get(name)!r}, this one has {here.get(name)!r}: "
            "give another --workdir, or remove that folder"
        )


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def _versions() -> dict[str, str]:
    return {"python": sys.version.split()[0]} | {name: metadata.version(name) for name in ("jax", "flax", "optax")}


def _measure(
    config: ConfigDict, dataset: Dataset, baseline: AViT | None, model: AViT
) -> tuple[dict[str, Any], Evaluation]:
    """The rows of the table, on the test images; speeds of both models interleaved, on one batch."""
    result = evaluate(model, dataset.test, config.eval_batch_size)
    rows = {"avit" if model.config.halts else "dense": (model, result)}
    if baseline is not None and baseline.config.halts != model.config.halts:
        rows["avit" if baseline.config.halts else "dense"] = (
            baseline,
            evaluate(baseline, dataset.test, config.eval_batch_size),
        )
    count = min(config.eval_batch_size, len(dataset.test))
    batch = normalize(dataset.test.images[:count], model.config)
    speeds = images_per_second([row_model for row_model, _ in rows.values()], batch)
    summary: dict[str, Any] = {"images": len(dataset.test), "batch_size": count}
    for (name, (_, row)), speed in sorted(zip(rows.items(), speeds, strict=True), reverse=True):
        summary[name] = {key: getattr(row, key) for key in SUMMARY_KEYS} | {"images_per_second": speed}
        if name == "avit":
            summary[name] |= {key: getattr(row, key) for key in DEPTH_KEYS}
    return summary, result


def format_summary(summary: dict[str, Any]) -> str:
    """The table that train.py ends with."""
    lines = [f"{'':8}{'top-1':>8}{'top-5':>8}{'mean depth':>12}{'GMACs/image':>13}{'images/s':>10}"]
    for name, label in (("dense", "dense"), ("avit", "A-ViT")):
        if name in summary:
            row = summary[name]
            depth = f"{row['mean_depth']:.2f}" if "mean_depth" in row else "all"
            lines.append(
                f"{label:8}{row['top1']:>8.2%}{row['top5']:>8.2%}{depth:>12}{row['gmacs']:>13.4f}"
                f"{row['images_per_second']:>10.0f}"
            )
    if "avit" in summary:
        row = summary["avit"]
        lines.append(
            f"A-ViT uses {row['depth_fraction']:.0%} of its layers; depth deviates by {row['depth_std_tokens']:.2f} "
            f"layers between the tokens of an image, by {row['depth_std_images']:.2f} between images"
        )
    lines.append(
        f"{summary['images']} test images; images/s at batch {summary['batch_size']}, masked execution (halted "
        f"tokens are still computed); {summary['seconds']:.0f} s in all"
    )
    return "\n".join(lines)


def draw(model: AViT, dataset: Dataset, result: Evaluation, workdir: Path) -> list[Path]:
    """The run's pictures; a model that never halts has curves alone."""
    pictures = [draw_curves(read_metrics(workdir), workdir / "curves.png", model.config.depth)]
    if model.config.halts:
        pictures.append(draw_depth_maps(model, dataset.test, result.image_depths, workdir / "depth_maps.png"))
        pictures.append(draw_depth_histogram(result, workdir / "depth_histogram.png"))
    return pictures


def evaluate_checkpoint(config: ConfigDict, path: str | Path) -> str:
    """Any checkpoint on the test images of config.data; its architecture and gate are its own. Returns the table.

    Raises ValueError where the checkpoint and config.model differ in shape, or the checkpoint and the data.
    """
    dataset = load_dataset(config.data.source, config.data.path)
    wanted = model_config(config, dataset)
    model = load(path, **{name: getattr(wanted, name) for name in SHAPE_FIELDS})
    return format_evaluation(evaluate(model, dataset.test, config.eval_batch_size), model.config)


def format_evaluation(result: Evaluation, config: AViTConfig) -> str:
    """The table that eval.py prints."""
    lines = [
        f"images             {result.images}",
        f"top-1              {result.top1:.2%}",
        f"top-5              {result.top5:.2%}",
        f"loss               {result.loss:.4f} nats",
        f"mean depth         {result.mean_depth:.2f} of {config.depth} layers ({result.depth_fraction:.0%})",
        f"  deviation        {result.depth_std_tokens:.2f} between tokens, {result.depth_std_images:.2f} of images",
        f"class token depth  {result.class_token_depth:.2f}",
        f"GMACs per image    {result.gmacs:.4f}",
        "depth  tokens",
    ]
    most = max(result.depth_histogram)
    for layer, share in enumerate(result.depth_histogram, start=1):
        lines.append(f"{layer:5}  {share:6.1%}  {'#' * round(40 * share / most)}")
    return "\n".join(lines)
