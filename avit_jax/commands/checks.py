"""What a run refuses before it begins: values that cannot work, a folder that holds another run."""

import json
import operator
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from avit_jax.checkpoints.model_folder import checkpoint_steps
from avit_jax.data.settings import AugmentSettings, DataSettings
from avit_jax.halting.prior import PRIORS
from avit_jax.runtime.files import read_table
from avit_jax.train.clock import parse_profile

# Keys that may change when a run resumes, because neither its steps nor its log depend on them.
MAY_CHANGE = {
    "checkpoint_every",
    "data.path",
    "data.threads",
    "data.workers",
    "keep_best",
    "keep_checkpoints",
    "keep_every",
    "mesh.data",
    "mesh.fsdp",
    "on_nan",
    "peak_tflops",
    "profile",
}
# Keys that may change too, and change what is logged: at which steps, and the rounding of validation figures.
MAY_CHANGE_THE_LOG = {"eval_batch_size", "eval_every", "log_every"}
ON_NAN = ("stop", "roll back")


def check_values(config: ConfigDict) -> None:
    """Raises ValueError for numbers that no run can work with, naming the key."""
    least = {
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
        "loss.distillation_weight": 0,
        "optim.learning_rate": 0,
        "optim.final_learning_rate": 0,
        "optim.warmup_steps": 0,
        "optim.warmup_epochs": 0,
        "optim.weight_decay": 0,
        "optim.clip_norm": 0,
        "optim.beta1": 0,
        "optim.beta2": 0,
        "optim.ema_decay": 0,
    }
    above = {"loss.prior_deviation": 0, "loss.distillation_temperature": 0}
    most = {"loss.distillation_weight": 1}
    below = {"loss.label_smoothing": 1, "optim.beta1": 1, "optim.beta2": 1, "optim.ema_decay": 1}
    DataSettings.from_config(dict(config.data))
    AugmentSettings.from_config(dict(config.augment))
    values = flat(resolved(config))
    for bounds, holds, words in (
        (least, operator.ge, "at least"),
        (above, operator.gt, "above"),
        (most, operator.le, "at most"),
        (below, operator.lt, "below"),
    ):
        for name, bound in bounds.items():
            if not holds(values[name], bound):  # so that nan is refused too
                raise ValueError(f"config.{name} is {values[name]}: it must be {words} {bound}")
    if config.loss.prior not in PRIORS:
        raise ValueError(f"config.loss.prior {config.loss.prior!r} is unknown: choose {' or '.join(map(repr, PRIORS))}")
    if config.batch_size % config.accumulation:
        raise ValueError(
            f"config.batch_size {config.batch_size} is no multiple of config.accumulation {config.accumulation}"
        )
    if config.on_nan not in ON_NAN:
        raise ValueError(f"config.on_nan {config.on_nan!r} is unknown: choose {' or '.join(map(repr, ON_NAN))}")
    parse_profile(config.profile)
    if (config.loss.distillation == "none") != (not config.teacher):
        raise ValueError(
            f"config.teacher is {config.teacher!r} and config.loss.distillation {config.loss.distillation!r}: "
            "give a teacher and hard or soft, or neither"
        )


def check_folder(config: ConfigDict, workdir: Path, resume: bool) -> None:
    """Raises ValueError where workdir holds a begun run of another config, or any if not resume."""
    if not (workdir / "summary.json").exists() and not checkpoint_steps(workdir / "checkpoints"):
        return
    if not resume:
        raise ValueError(f"{workdir} holds a run already: leave --noresume out, or give another --workdir")
    there, here = flat(read_table(workdir / "train_config.json", "config")), flat(resolved(config))
    changed = [name for name in sorted(there.keys() | here.keys()) if there.get(name) != here.get(name)]
    for name in changed:
        if name not in MAY_CHANGE | MAY_CHANGE_THE_LOG:
            raise ValueError(
                f"{workdir} holds a run with config.{name}={there.get(name)!r}, this one has {here.get(name)!r}: "
                "give another --workdir, or remove that folder"
            )
    for name in changed:
        if name in MAY_CHANGE_THE_LOG and jax.process_index() == 0:
            print(
                f"config.{name} was {there.get(name)!r} and is now {here.get(name)!r}: the log changes from here on, "
                "the training does not"
            )


def resolved(config: ConfigDict) -> dict[str, Any]:
    """The config as plain JSON."""
    return json.loads(config.to_json())


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys joined by dots."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found
