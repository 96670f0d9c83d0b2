"""The main job: from a config to a trained model, a table, pictures, and a model to take away."""

import dataclasses
import json
import shlex
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from avit_jax.checkpoint import checkpoint_steps, load, save
from avit_jax.config import AViTConfig, Preprocessing, config_from
from avit_jax.convert.weight_files import read_config
from avit_jax.data.open import open_dataset
from avit_jax.data.pipeline import evaluation_images
from avit_jax.data.settings import AugmentSettings, DataSettings
from avit_jax.data.sources import Dataset, Split
from avit_jax.distributed import check_same
from avit_jax.evaluation import Evaluation, evaluate, images_per_second, masked_program
from avit_jax.files import read_json, writable_folder, write_json
from avit_jax.gate_start import start_gate
from avit_jax.interruption import FolderLock
from avit_jax.logs import read_metrics
from avit_jax.mesh import data_mesh
from avit_jax.model import AViT
from avit_jax.packed import compile_packed
from avit_jax.predict_images import read_class_names
from avit_jax.preprocessing import normalize
from avit_jax.report import draw_curves, draw_depth_histogram, draw_depth_maps
from avit_jax.report.writer import Subject, write_report
from avit_jax.speed import parse_profile
from avit_jax.sweep import parse_sweep
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
# What a stopped run may go on with changed: where and how it runs, and what it says of itself.
FREE_TO_CHANGE = {
    "checkpoint_every",
    "data.path",
    "data.threads",
    "data.workers",
    "eval_batch_size",
    "eval_every",
    "keep_best",
    "keep_checkpoints",
    "keep_every",
    "log_every",
    "mesh.data",
    "mesh.fsdp",
    "on_nan",
    "peak_tflops",
    "profile",
}
ON_NAN = ("stop", "roll back")
SUMMARY_KEYS = ("top1", "top5", "gmacs")
DEPTH_KEYS = ("mean_depth", "depth_fraction", "depth_std_tokens", "depth_std_images")


def model_config(config: ConfigDict, dataset: Dataset) -> AViTConfig:
    """config.model, with image size, channels, classes, class names and normalisation taken from the data.

    Raises ValueError where config.model names a field that does not exist or contradicts the data.
    """
    fields = dict(config.model)
    preset = fields.pop("preset", None)
    from_data: dict[str, Any] = {"num_classes": len(dataset.class_names), "in_channels": 3}
    if isinstance(dataset.train, Split):  # images from disk are decoded as RGB and resized to what the model takes
        _, height, width, channels = dataset.train.images.shape
        from_data |= {"image_size": height if height == width else (height, width), "in_channels": channels}
    for name, value in from_data.items():
        if fields.setdefault(name, value) != value:
            raise ValueError(f"config.model.{name} is {fields[name]} and the data say {value}: change one of them")
    return config_from(preset, **fields, class_names=dataset.class_names, preprocessing=_preprocessing(config, dataset))


def _preprocessing(config: ConfigDict, dataset: Dataset) -> Preprocessing:
    """The config's mean and std, or those of the training images by channel (exact: from histograms of bytes).

    For images from disk: the config's or ImageNet's, and the config's crop.
    """
    data = DataSettings.from_config(dict(config.data))
    mean, std = tuple(data.mean), tuple(data.std)
    if not isinstance(dataset.train, Split):
        imagenet = Preprocessing()
        return Preprocessing(mean or imagenet.mean, std or imagenet.std, data.crop_fraction, data.interpolation)
    if not (mean and std):
        values = np.arange(256) / 255
        channels = np.moveaxis(dataset.train.images, -1, 0)
        shares = [np.bincount(channel.ravel(), minlength=256) / channel.size for channel in channels]
        means = [float(share @ values) for share in shares]
        deviations = [float(share @ (values - m) ** 2) ** 0.5 for share, m in zip(shares, means, strict=True)]
        mean = mean or tuple(round(m, 4) for m in means)
        std = std or tuple(round(d, 4) or 1.0 for d in deviations)
    return Preprocessing(mean, std, crop_fraction=1.0)


def initial_model(config: ConfigDict, dataset: Dataset) -> AViT:
    """A model with random weights from config.seed, or with those of config.init_from and this config's gate.

    With config.gate_start.images the gate starts from so many training images (gate_start.start_gate).
    """
    wanted = model_config(config, dataset)
    if not config.init_from:
        return AViT(wanted, rngs=nnx.Rngs(config.seed))
    model = load(config.init_from, **{name: getattr(wanted, name) for name in wanted.__dataclass_fields__})
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
    check_same(_flat(_resolved(config)))
    check_values(config)
    with FolderLock(workdir):
        return _run(config, workdir, resume, began)


def _run(config: ConfigDict, workdir: Path, resume: bool, began: float) -> dict[str, Any]:
    _check_folder(config, workdir, resume)
    summary_path = workdir / "summary.json"
    if summary_path.exists():
        summary = read_json(summary_path)
        print(f"this run is finished; its table, from {summary_path}:")
        print(format_summary(summary))
        return summary
    dataset = open_dataset(DataSettings.from_config(dict(config.data)))
    model = initial_model(config, dataset)
    baseline = _baseline(config, model.config)
    teacher = _teacher(config, model.config)
    first = jax.process_index() == 0
    if first:
        workdir.mkdir(parents=True, exist_ok=True)
        origin = {"command": shlex.join(["python", *sys.argv]), "versions": _versions(), "config": _resolved(config)}
        write_json(workdir / "train_config.json", origin)
    earlier = train(config, dataset, model, workdir, teacher, began=began)
    summary, result = _measure(config, dataset, baseline, model)
    summary["seconds"] = earlier + time.perf_counter() - began
    if not first:
        return summary
    pictures = draw(model, dataset, result, workdir)
    if not (workdir / "model").exists():
        save(model, workdir / "model")
    write_json(summary_path, summary)  # last: a folder with a summary is a finished run
    print(format_summary(summary))
    print("\n".join(["", *(f"picture: {path}" for path in pictures), f"model:   {workdir / 'model'}"]))
    return summary


def check_values(config: ConfigDict) -> None:
    """Raises ValueError for numbers that no run can work with, naming the key."""
    limits = {
        "batch_size": 1,
        "eval_batch_size": 1,
        "log_every": 1,
        "eval_every": 1,
        "checkpoint_every": 1,
        "keep_checkpoints": 1,
        "keep_every": 0,
        "keep_best": 0,
        "accumulation": 1,
        "epochs": 0,
        "loss.ponder_weight": 0,
        "loss.prior_weight": 0,
        "loss.label_smoothing": 0,
        "optim.learning_rate": 0,
    }
    DataSettings.from_config(dict(config.data))
    AugmentSettings.from_config(dict(config.augment))
    values = _flat(_resolved(config))
    for name, least in limits.items():
        if values[name] < least:
            raise ValueError(f"config.{name} is {values[name]}: it must be at least {least}")
    if config.batch_size % config.accumulation:
        raise ValueError(
            f"config.batch_size {config.batch_size} is no multiple of config.accumulation {config.accumulation}"
        )
    if config.on_nan not in ON_NAN:
        raise ValueError(f"config.on_nan {config.on_nan!r} is unknown: choose {' or '.join(map(repr, ON_NAN))}")
    parse_profile(config.profile)
    if config.loss.label_smoothing >= 1:
        raise ValueError(f"config.loss.label_smoothing is {config.loss.label_smoothing}: it must be below 1")
    if (config.loss.distillation == "none") != (not config.teacher):
        raise ValueError(
            f"config.teacher is {config.teacher!r} and config.loss.distillation {config.loss.distillation!r}: "
            "give a teacher and hard or soft, or neither"
        )


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


def _check_folder(config: ConfigDict, workdir: Path, resume: bool) -> None:
    """See that the run in workdir, if one has got to a checkpoint, has this config."""
    if not (workdir / "summary.json").exists() and not checkpoint_steps(workdir / "checkpoints"):
        return
    if not resume:
        raise ValueError(f"{workdir} holds a run already: leave --noresume out, or give another --workdir")
    there, here = _flat(read_json(workdir / "train_config.json")["config"]), _flat(_resolved(config))
    changed = [
        name
        for name in sorted(there.keys() | here.keys())
        if there.get(name) != here.get(name) and name not in FREE_TO_CHANGE
    ]
    if changed:
        name = changed[0]
        raise ValueError(
            f"{workdir} holds a run with config.{name}={there.get(name)!r}, this one has {here.get(name)!r}: "
            "give another --workdir, or remove that folder"
        )


def _resolved(config: ConfigDict) -> dict[str, Any]:
    """The config as plain JSON."""
    return json.loads(config.to_json())


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
    result = evaluate(model, dataset.test, config.eval_batch_size, "packed")
    rows = {"avit" if model.config.halts else "dense": (model, result)}
    if baseline is not None and baseline.config.halts != model.config.halts:
        rows["avit" if baseline.config.halts else "dense"] = (
            baseline,
            evaluate(baseline, dataset.test, config.eval_batch_size, "packed"),
        )
    count = min(config.eval_batch_size, len(dataset.test))
    # Evenly over the set, which may be sorted by class.
    timed = np.linspace(0, len(dataset.test) - 1, count).astype(int)
    batch = normalize(evaluation_images(dataset.test, timed, model.config), model.config)
    mesh = data_mesh(count)
    programs = [
        compile_packed(row_model, count, mesh=mesh) if row_model.config.halts else masked_program(row_model, mesh)
        for row_model, _ in rows.values()
    ]
    speeds = images_per_second(programs, batch, mesh)
    summary: dict[str, Any] = {"images": len(dataset.test), "batch_size": count}
    for (name, (_, row)), speed in zip(rows.items(), speeds, strict=True):
        summary[name] = {key: getattr(row, key) for key in SUMMARY_KEYS} | {"images_per_second": speed}
        if name == "avit":
            summary[name] |= {key: getattr(row, key) for key in DEPTH_KEYS}
            summary[name]["execution"] = "packed"
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
        f"{summary['images']} test images; images/s at batch {summary['batch_size']}, packed execution (halted "
        f"tokens are gone); {summary['seconds']:.0f} s in all"
    )
    return "\n".join(lines)


def draw(model: AViT, dataset: Dataset, result: Evaluation, workdir: Path) -> list[Path]:
    """The run's pictures; a model that never halts has curves alone."""
    pictures = [draw_curves(read_metrics(workdir), workdir / "curves.png", model.config.depth)]
    if model.config.halts:
        pictures.append(draw_depth_maps(model, dataset.test, result.image_depths, workdir / "depth_maps.png"))
        pictures.append(draw_depth_histogram(result, workdir / "depth_histogram.png"))
    return pictures


def evaluate_checkpoint(
    config: ConfigDict,
    path: str | Path,
    *,
    ema: bool = False,
    execution: str = "packed",
    report: str | Path | None = None,
    baseline: str | Path | None = None,
    sweep: str | None = None,
    class_names: str | Path | None = None,
) -> str:
    """Any checkpoint on the test images of config.data; a folder brings its own gate. Returns the table.

    report: a folder for report.html and report.json; baseline: a checkpoint to compare with in it; sweep: gate settings
    to try, as sweep.parse_sweep takes them; class_names: a file, one name a line. Raises ValueError where the
    checkpoint and config.model differ in shape, or the checkpoint and the data, and for a folder that is not writable.
    """
    check_values(config)
    if (baseline or sweep) and not report:
        raise ValueError(f"--{'sweep' if sweep else 'baseline'} is shown in the report: give --report=FOLDER too")
    settings = parse_sweep(sweep) if sweep else None
    folder = writable_folder(report) if report else None
    dataset = open_dataset(DataSettings.from_config(dict(config.data)))
    wanted = model_config(config, dataset)
    mesh = data_mesh(config.eval_batch_size)

    def subject(path: str | Path, ema: bool) -> Subject:
        model = _evaluable(path, wanted, ema)
        names = read_class_names(class_names, wanted) if class_names else model.config.class_names
        model.config = dataclasses.replace(model.config, class_names=names or wanted.class_names)
        result = evaluate(model, dataset.test, config.eval_batch_size, execution, mesh)
        return Subject(Path(path).name, model, result)

    ours = subject(path, ema)
    if settings and not ours.model.config.halts:
        raise ValueError(f"--sweep moves a gate and {path} has none: it never halts; leave --sweep out")
    lines = [format_evaluation(ours.result, ours.model.config)]
    if folder:
        page = write_report(
            folder,
            ours,
            dataset.test,
            data=f"the test set of {Path(config.data.path).name or config.data.source}",
            batch_size=config.eval_batch_size,
            baseline=subject(baseline, False) if baseline else None,
            sweep=settings,
        )
        lines.append(f"report: {page}")
    return "\n".join(lines)


def _evaluable(path: str | Path, wanted: AViTConfig, ema: bool) -> AViT:
    """The checkpoint, checked against what the data want."""
    # A foreign file knows nothing but weights; ours knows itself, and is only held against the config's shapes.
    foreign = Path(path).is_file() and read_config(Path(path)) is None
    known = list(wanted.__dataclass_fields__) if foreign else SHAPE_FIELDS
    # Not the classes: asking for them would make a new head where the checkpoint has other ones.
    fields = {name: getattr(wanted, name) for name in known if name not in ("num_classes", "class_names")}
    model = load(path, ema=ema, **fields)
    if model.config.num_classes != wanted.num_classes:
        raise ValueError(
            f"the checkpoint {path} has {model.config.num_classes} classes and the data {wanted.num_classes}: "
            "evaluate it on the data it was trained for, or train a new head with config.init_from"
        )
    return model


def format_evaluation(result: Evaluation, config: AViTConfig) -> str:
    """The table that eval.py prints."""
    lines = [f"images             {result.images}"]
    if result.labelled:
        lines += [
            f"top-1              {result.top1:.2%}",
            f"top-5              {result.top5:.2%}",
            f"loss               {result.loss:.4f} nats",
        ]
    else:
        lines.append("no labels          no accuracy, no loss")
    lines += [
        f"mean depth         {result.mean_depth:.2f} of {config.depth} layers ({result.depth_fraction:.0%})",
        f"  deviation        {result.depth_std_tokens:.2f} between tokens, {result.depth_std_images:.2f} of images",
        f"class token depth  {result.class_token_depth:.2f}",
        f"GMACs per image    {result.gmacs:.4f}",
        f"  executed         {result.executed_gmacs:.4f}, mean depth {result.executed_depth:.2f}",
        "depth  tokens",
    ]
    most = max(result.depth_histogram)
    for layer, share in enumerate(result.depth_histogram, start=1):
        lines.append(f"{layer:5}  {share:6.1%}  {'#' * round(40 * share / most)}")
    return "\n".join(lines)
