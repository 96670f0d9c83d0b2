"""The config of a run, read back from its train_config.json; this module is used as a config file."""

from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from avit_jax.checkpoints.convert.weight_files import read_config
from avit_jax.checkpoints.model_folder import no_checkpoint
from avit_jax.commands.typed_config import config_dict
from avit_jax.runtime.files import read_json, shown_value
from avit_jax.train.settings import TrainSettings

FILE = "train_config.json"
MOST_IMAGES = 65_536  # in a batch; the file may come from a stranger
# These describe how the machine of the run read the data.
_OF_THE_MACHINE = ("workers", "threads")


def find_run_config(checkpoint: str | Path) -> Path | None:
    """train_config.json of the run that a checkpoint is from: RUN, RUN/model, RUN/checkpoints or a step in it."""
    path = Path(checkpoint).absolute()
    folders = [path, path.parent] if path.name in ("model", "checkpoints") else [path]
    if path.name.isdigit() and path.parent.name == "checkpoints":
        folders.append(path.parent.parent)
    return next((folder / FILE for folder in folders if (folder / FILE).is_file()), None)


def config_of_checkpoint(checkpoint: str | Path) -> str:
    """The value of --config for a checkpoint of a run. Raises ValueError if there is no train_config.json beside it."""
    path = Path(checkpoint)
    if not path.exists():
        raise no_checkpoint(checkpoint)
    found = find_run_config(path)
    if found is None:
        own = path.is_dir() or read_config(path) is not None
        raise ValueError(
            f"{checkpoint} does not say which data to evaluate it on: give --config, "
            + ("which names them; the architecture is the checkpoint's own" if own else "which names data and model")
        )
    return f"{Path(__file__)}:{found}"


def get_config(arg: str) -> ConfigDict:
    """name, data, model and eval_batch_size as the run had them; arg: the path of its train_config.json.

    All other keys have their defaults, because evaluation does not read them. Raises ValueError, naming the file and
    the key, for values of the wrong type or out of range.
    """
    saved = read_json(Path(arg))
    saved = saved.get("config") if isinstance(saved, dict) else None
    if not isinstance(saved, dict):
        raise ValueError(f"{arg} is damaged: it holds no config")
    config = config_dict(TrainSettings())
    for name in ("name", "eval_batch_size"):
        if name in saved:
            _set(config, name, saved[name], f"{arg}: config.{name}")
    for section in ("data", "model"):
        given = saved.get(section, {})
        if not isinstance(given, dict):
            raise ValueError(f"{arg}: config.{section} is {shown_value(given)}: it must hold keys and values")
        for name, value in given.items():
            if name not in config[section]:
                raise ValueError(
                    f"{arg}: config.{section} has a key {shown_value(name)} that this version does not know"
                )
            if name not in _OF_THE_MACHINE:
                _set(config[section], name, value, f"{arg}: config.{section}.{name}")
    if not 1 <= config.eval_batch_size <= MOST_IMAGES:
        raise ValueError(f"{arg}: config.eval_batch_size is {config.eval_batch_size}: it must be 1 to {MOST_IMAGES}")
    return config


def _set(section: ConfigDict, name: str, value: Any, where: str) -> None:
    """Set the key. Raises ValueError if the value is not of the key's type."""
    if isinstance(value, list):
        value = tuple(value)
    kind = section.get_type(name)
    good = value is None if section[name] is None and value is None else _is_a(value, kind)
    if isinstance(value, tuple):
        wanted = str if name == "class_names" else (int, float)
        good = good and all(isinstance(part, wanted) and not isinstance(part, bool) for part in value)
    if not good:
        raise ValueError(f"{where} is {shown_value(value)}: it must be of type {kind.__name__}")
    section[name] = value


def _is_a(value: Any, kind: type) -> bool:
    if kind in (int, float) and isinstance(value, bool):
        return False
    return isinstance(value, (int, float) if kind is float else kind)
