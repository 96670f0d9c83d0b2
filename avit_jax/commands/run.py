"""The main job: from a config to a trained model, a table, pictures, and a model to take away."""

import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from avit_jax.checkpoints.model_folder import load, save
from avit_jax.commands.checks import check_folder, check_values, flat, resolved
from avit_jax.commands.help import command_line
from avit_jax.data.account import check_data, data_account
from avit_jax.data.open import open_dataset
from avit_jax.data.pipeline import evaluation_images
from avit_jax.data.preprocessing import normalize
from avit_jax.data.settings import DataSettings
from avit_jax.data.sources import Dataset
from avit_jax.evaluate.figures import Evaluation, evaluate, images_per_second, masked_program
from avit_jax.execution.packed import compile_packed
from avit_jax.model.vit import AViT
from avit_jax.report import draw_run
from avit_jax.runtime.files import read_json, write_json, writing
from avit_jax.runtime.mesh import data_mesh
from avit_jax.runtime.processes import check_same, in_any_process
from avit_jax.runtime.signals import FolderLock
from avit_jax.train.logs import read_metrics
from avit_jax.train.loop import train
from avit_jax.train.start import check_starts, initial_model, load_baseline, load_teacher

SUMMARY_KEYS = ("top1", "top5", "gmacs")
DEPTH_KEYS = ("mean_depth", "depth_fraction", "depth_std_tokens", "depth_std_images")

HARDLY_HALTS = 0.98  # of the layers: no work to speak of is saved


def hardly_halts(depth: float) -> str:
    """What to do about an A-ViT of so many layers whose tokens go through nearly all of them."""
    return (
        "its tokens halt almost nowhere, so nothing is saved: start the gate where tokens halt, with "
        f"--config.gate_start.images=1000 --config.gate_start.target_depth={0.75 * depth:g} "
        "--config.gate_start.deviation=2 in another --workdir, or train for more epochs"
    )


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
    baseline = load_baseline(config, model.config)
    teacher = load_teacher(config, model.config)
    first = jax.process_index() == 0
    if first:
        origin = {"command": command_line(), "versions": _versions(), "data": data}
        write_json(workdir / "train_config.json", origin | {"config": resolved(config)})
    trained = train(config, dataset, model, workdir, teacher, seconds=time.perf_counter() - began)
    ended = time.perf_counter()
    summary, result = _measure(config, dataset, baseline, trained.model)
    summary["seconds"] = trained.progress.seconds + time.perf_counter() - ended
    if not first:
        return summary
    with writing(workdir / "a picture"):
        pictures = draw_run(trained.model, dataset.test, result, read_metrics(workdir), workdir)
    if not (workdir / "model").exists():
        save(trained.model, workdir / "model")
    write_json(summary_path, summary)  # last: a folder with a summary is a finished run
    print(format_summary(summary))
    print("\n".join(["", *(f"picture: {path}" for path in pictures), f"model:   {workdir / 'model'}"]))
    return summary


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
        if row["depth_fraction"] >= HARDLY_HALTS:
            lines.append(hardly_halts(row["mean_depth"] / row["depth_fraction"]))
    packed = ", A-ViT by packed execution (halted tokens are gone)" if "avit" in summary else ""
    lines.append(
        f"{summary['images']} test images; images/s at batch {summary['batch_size']}{packed}; "
        f"{summary['seconds']:.0f} s in all"
    )
    return "\n".join(lines)
