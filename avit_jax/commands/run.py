"""A whole run: from a config to a trained model, a table, pictures, and the saved model."""

import json
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from avit_jax.checkpoints.model_folder import load, save
from avit_jax.commands.help import command_line
from avit_jax.commands.typed_config import parse
from avit_jax.data.account import check_data, data_account
from avit_jax.data.open import open_dataset
from avit_jax.evaluate.compare import format_summary, measure
from avit_jax.model.vit import AViT
from avit_jax.report import draw_run
from avit_jax.runtime.files import read_json, write_json, writing
from avit_jax.runtime.processes import check_same, in_any_process
from avit_jax.runtime.settings import flat
from avit_jax.runtime.signals import FolderLock
from avit_jax.train.logs import read_metrics
from avit_jax.train.loop import train
from avit_jax.train.run_folder import check_folder
from avit_jax.train.settings import TrainSettings
from avit_jax.train.start import check_starts, initial_model, load_baseline, load_teacher


def run(config: ConfigDict, workdir: str | Path, *, resume: bool = True, began: float | None = None) -> dict[str, Any]:
    """Train, measure dense and A-ViT on the test images, write summary.json and pictures; returns the summary.

    A finished run is not repeated, a stopped one is continued. began: time.perf_counter() from which `seconds` counts.
    Raises ValueError for a config that cannot work, and if workdir holds a run of another config, or any run while
    resume is False.
    """
    began = time.perf_counter() if began is None else began
    workdir = Path(workdir)
    if workdir.exists() and not workdir.is_dir():
        raise ValueError(f"the run's folder {workdir} is a file: give another --workdir")
    check_same(flat(json.loads(config.to_json())))  # before anything that may fail in only one process
    settings = parse(config)
    with FolderLock(workdir):
        return _run(settings, workdir, resume, began)


def train_model(config: ConfigDict, workdir: str | Path, *, resume: bool = True) -> AViT:
    """Train as train.py does and return the trained model; summary.json in workdir has the measured figures.

    config: what a config file's get_config() returns, with any key changed. workdir: the folder of the run. A finished
    run is not repeated, a stopped one is continued if resume is True. Raises what `run` raises, and train.loop.Stopped
    after SIGTERM or Ctrl-C; the checkpoint is then written, and the same call continues the run.
    """
    run(config, workdir, resume=resume)
    in_any_process(False)  # wait until process 0 has written the model
    return load(Path(workdir) / "model")


def _run(settings: TrainSettings, workdir: Path, resume: bool, began: float) -> dict[str, Any]:
    check_folder(settings, workdir, resume)
    summary_path = workdir / "summary.json"
    if summary_path.exists():
        summary = read_json(summary_path)
        print(f"this run is finished; its table, from {summary_path}:")
        print(format_summary(summary))
        return summary
    dataset = open_dataset(settings.data)
    check_starts(settings)
    data = data_account(dataset)
    check_data(data, workdir)
    model = initial_model(settings, dataset)
    baseline = load_baseline(settings.init_from, model.config)
    teacher = load_teacher(settings.teacher, model.config)
    first = jax.process_index() == 0
    if first:
        origin = {"command": command_line(), "versions": _versions(), "data": data}
        write_json(workdir / "train_config.json", origin | {"config": settings.to_config()})
    trained = train(settings, dataset, model, workdir, teacher, seconds=time.perf_counter() - began)
    ended = time.perf_counter()
    summary, result = measure(dataset.test, baseline, trained.model, settings.eval_batch_size)
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
