"""The folder of a run: its settings, and which of them may change when it resumes."""

import json
from pathlib import Path
from typing import Any

import jax

from avit_jax.checkpoints.model_folder import checkpoint_steps
from avit_jax.runtime.files import read_table
from avit_jax.runtime.settings import flat, keys
from avit_jax.train.settings import TrainSettings


def check_folder(settings: TrainSettings, workdir: Path, resume: bool) -> None:
    """Raises ValueError if workdir holds a run with other settings, or any run unless resume.

    A key that the run's train_config.json lacks, because an earlier version wrote it, had its default. Changed keys
    that only affect the log (their field's `resume` is "log") are printed.
    """
    if not (workdir / "summary.json").exists() and not checkpoint_steps(workdir / "checkpoints"):
        return
    if not resume:
        raise ValueError(f"{workdir} holds a run already: leave --noresume out, or give another --workdir")
    here = _plain(settings)
    there = _plain(TrainSettings()) | flat(read_table(workdir / "train_config.json", "config"))
    changed = [name for name in sorted(there.keys() | here.keys()) if there.get(name) != here.get(name)]
    fields = keys(TrainSettings)
    resumes = {name: fields[name].metadata["resume"] if name in fields else "never" for name in changed}
    for name in changed:
        if resumes[name] == "never":
            raise ValueError(
                f"{workdir} holds a run with config.{name}={there.get(name)!r}, this one has {here.get(name)!r}: "
                "give another --workdir, or remove that folder"
            )
    for name in changed:
        if resumes[name] == "log" and jax.process_index() == 0:
            print(
                f"config.{name} was {there.get(name)!r} and is now {here.get(name)!r}: the log changes from here on, "
                "the training does not"
            )


def _plain(settings: TrainSettings) -> dict[str, Any]:
    """Every key as JSON has it: with lists instead of tuples."""
    return flat(json.loads(json.dumps(settings.to_config())))
