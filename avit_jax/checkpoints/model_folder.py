"""Saving and loading models with orbax. Every checkpoint holds its configuration (config.json; in a run, config)."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx
from flax.traverse_util import flatten_dict

from avit_jax.checkpoints.convert import Conversion, fit, override, read_foreign
from avit_jax.checkpoints.convert.huggingface import is_foreign_folder
from avit_jax.checkpoints.convert.limits import check_folder
from avit_jax.checkpoints.convert.published import merged, where_to_get
from avit_jax.checkpoints.convert.weight_files import read_config
from avit_jax.checkpoints.digests import NO_DIGESTS, check_digests, json_digest, read_digests, tree_digests
from avit_jax.model.config import AViTConfig
from avit_jax.model.vit import AViT, model_of_shapes
from avit_jax.runtime.files import read_json, write_json, writing
from avit_jax.runtime.mesh import check_platform
from avit_jax.runtime.text import first_line


def save(model: AViT, path: str | Path) -> None:
    """Write a model as a folder: config.json (architecture, preprocessing, class names), params/ (orbax), digests.json.

    The folder appears whole or not at all. Raises ValueError if it exists already; nothing is overwritten.
    """
    path = Path(path).absolute()
    if path.exists():
        raise ValueError(f"{path} exists already: choose another path or remove it")
    partial = path.with_name(path.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)  # left by a killed process
    with writing(path):
        _save(model, path, partial)


def _save(model: AViT, path: Path, partial: Path) -> None:
    partial.mkdir(parents=True)
    # With several processes, orbax saves the arrays of one of them only as NumPy arrays.
    with ocp.StandardCheckpointer(multiprocessing_options=_alone("save")) as checkpointer:
        params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
        checkpointer.save(partial / "params", jax.tree.map(np.asarray, params) if jax.process_count() > 1 else params)
    # Orbax writes there where the folder was, which is nobody's business who gets the model. Only its presence counts.
    for mark in (partial / "params").glob("commit_success*"):
        mark.write_text("complete\n")
    write_json(partial / "config.json", model.config.to_json())
    write_json(partial / "digests.json", _digests(model.config.to_json(), params))
    partial.rename(path)


def _digests(config: Any, params: Any) -> dict[str, Any]:
    """The content of digests.json."""
    return {"config.json": json_digest(config), "params": tree_digests(params)}


def add_digests(path: str | Path) -> None:
    """Add the digests of its present content to a saved model without digests, so that later damage is found.

    path: a folder that `save` wrote. Raises ValueError if it is not one, or has digests already.
    """
    path = Path(path).absolute()
    if (path / "digests.json").exists():
        raise ValueError(f"{path} has digests already: nothing to do")
    if not (path / "params").is_dir():
        raise ValueError(f"{path} is not a folder that avit_jax.save wrote: params is missing")
    config = read_json(path / "config.json")
    params = restore_tree(path / "params", _shapes(AViTConfig.from_json(config)))
    write_json(path / "digests.json", _digests(config, params))


def _shapes(model_config: AViTConfig) -> dict[str, Any]:
    """The parameters that a model of this configuration has, without their values."""
    return nnx.to_pure_dict(nnx.state(model_of_shapes(model_config)))


def _alone(doing: str) -> ocp.options.MultiprocessingOptions:
    """Orbax's options for work by this process only, without waiting for others; doing: a name for that work."""
    own = jax.process_index()
    return ocp.options.MultiprocessingOptions(
        primary_host=own, active_processes={own}, barrier_sync_key_prefix=f"{doing}_{own}"
    )


def load(path: str | Path, preset: str | None = None, *, ema: bool = False, **overrides: Any) -> AViT:
    """A model from a folder of `save`, a run or Hugging Face, or from a .pth, .safetensors, .npz or .onnx file.

    path: nothing is downloaded; from a run's folder comes the finished model, or else the newest checkpoint. preset:
    the architecture of a file without a configuration (folders, and files that save_torch wrote, have one). ema: load
    the moving average's weights. overrides: AViTConfig fields.
    Position embeddings are resized for another image_size, and the head is new for another num_classes. Preprocessing
    is what was published with the weights, unless given (a Preprocessing, or a dict of some of its fields). A line is
    printed for each of these.
    Raises ValueError if the path is missing, damaged, or has another architecture (naming the parameter and shapes).
    """
    conversion = load_conversion(path, preset, ema=ema, **overrides)
    for note in conversion.notes:
        print(f"{path}: {note}")
    return conversion.model


def is_foreign(path: str | Path) -> bool:
    """Whether a checkpoint has no configuration of ours: files of other programs, folders of transformers and timm."""
    path = Path(path)
    return read_config(path) is None if path.is_file() else is_foreign_folder(path)


def no_checkpoint(path: str | Path, hint: str = "nothing of that name is there", key: str = "") -> ValueError:
    """The error to raise for a missing checkpoint; hint: what to do. key: the setting that names the path."""
    return ValueError(f"there is no checkpoint at {path}{f' ({key})' if key else ''}: {hint}")


def load_conversion(path: str | Path, preset: str | None = None, *, ema: bool = False, **overrides: Any) -> Conversion:
    """As `load`, but returns the model with its notes and changes, and prints nothing."""
    check_platform()
    if not Path(path).exists():
        raise no_checkpoint(path, where_to_get(path))
    path = Path(path).absolute()
    if path.is_file() or is_foreign_folder(path):
        try:
            return read_foreign(path, preset, ema=ema, **overrides)
        except ValueError as error:
            raise ValueError(str(error) if str(path) in str(error) else f"{path}: {error}") from error
    if preset is not None:
        raise ValueError(f"{path} carries its own configuration: leave preset={preset!r} out")
    config_file, params = _locate(path, ema)
    config_content = read_json(config_file)
    try:
        saved = AViTConfig.from_json(config_content)
    except ValueError as error:
        raise ValueError(f"{config_file}: {error}") from error
    if overrides.get("num_heads", saved.num_heads) != saved.num_heads:
        # The number of heads is the only part of the architecture that no shape shows.
        raise ValueError(
            f"num_heads is {saved.num_heads} in the checkpoint {path} and {overrides['num_heads']} in the model"
        )
    if "preprocessing" in overrides:
        overrides["preprocessing"] = merged(overrides["preprocessing"], saved.preprocessing)
    config = override(saved, overrides)
    shapes = _shapes(saved)
    restored = restore_tree(params, shapes)
    checked = _check(params, config_content, restored)
    restored = jax.tree.map(lambda array, shape: array.astype(shape.dtype), restored, shapes)
    try:
        conversion = fit(flatten_dict(restored, sep="."), config, saved, overrides.keys())
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if checked:
        return conversion
    hint = "; avit_jax.checkpoints.add_digests adds them" if params.name == "params" else ""
    return dataclasses.replace(conversion, notes=[NO_DIGESTS + hint, *conversion.notes])


def _check(params: Path, config: Any, restored: Any) -> bool:
    """Whether there are digests to check against. Raises ValueError if they show damage."""
    of_a_model = params.name == "params"
    written = read_digests(params.parent / ("digests.json" if of_a_model else "digests/metadata"))
    if written is None:
        return False
    config_name = "config.json" if of_a_model else "config"
    if json_digest(config) != written.get(config_name):
        raise ValueError(
            f"the checkpoint {params.parent} is damaged: its {config_name} is not what was written (its SHA-256 digest "
            "differs); if you changed it yourself, remove digests.json and call avit_jax.checkpoints.add_digests"
        )
    check_digests(params, tree_digests(restored), written.get(params.name))
    return True


def _locate(path: Path, ema: bool) -> tuple[Path, Path]:
    """The configuration file and the parameter folder in a saved model, a run, its checkpoints, or one of them."""
    if (path / "model" / "config.json").exists() and not ema:
        path = path / "model"
    if (path / "params").exists() or (path / "config.json").exists():
        if ema:
            raise ValueError(f"{path} holds one set of weights and no moving average: leave ema out")
        for part in ("config.json", "params"):
            if not (path / part).exists():
                raise ValueError(f"the checkpoint {path} is incomplete: {part} is missing")
        return path / "config.json", path / "params"
    steps = checkpoint_steps(path / "checkpoints" if (path / "checkpoints").is_dir() else path)
    step = steps[-1] if steps else path
    if not steps and not (path / "config").exists():
        raise ValueError(f"{path} holds no finished checkpoint: neither config.json and params/ nor a STEP folder")
    item = step / ("ema" if ema else "model")
    if not item.exists():
        hint = ": the run kept no moving average" if ema else ""
        raise ValueError(f"the checkpoint {step} is incomplete: {item.name} is missing{hint}")
    return step / "config" / "metadata", item


def checkpoint_steps(folder: Path) -> list[Path]:
    """The finished checkpoints of a run, oldest first (orbax renames a step's folder to its number at the end)."""
    steps = (path for path in folder.glob("*") if path.name.isascii() and path.name.isdigit())
    return sorted(steps, key=lambda path: int(path.name))


def restore_tree(path: Path, target: Any) -> Any:
    """The arrays under `path`, in the structure of `target` and with the dtypes of the file.

    target: nested dicts of arrays, whose sharding is used, or of shapes, which go to this process's first device.
    Raises ValueError, naming the parameter and both shapes, if shapes differ; naming the path, if it is damaged.
    """
    # The sharding is given here, because the file may come from a machine with other devices.
    first = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def placed(leaf: Any, stored: Any) -> jax.ShapeDtypeStruct:
        # The dtype is the file's own, because the digests are made from it.
        return jax.ShapeDtypeStruct(leaf.shape, stored.dtype, sharding=getattr(leaf, "sharding", None) or first)

    with ocp.StandardCheckpointer(multiprocessing_options=_alone("restore")) as checkpointer:
        try:
            found = ocp.StandardCheckpointHandler().metadata(path).tree
        except Exception as error:  # orbax raises many kinds; all of them mean that the folder is incomplete
            raise ValueError(f"the checkpoint {path} is incomplete or damaged: {cause(error)}") from error
        _check_shapes(path, found, target)
        try:
            return checkpointer.restore(path, jax.tree.map(placed, target, found))
        except Exception as error:
            raise ValueError(f"the checkpoint {path} is incomplete or damaged: {cause(error)}") from error


def cause(error: BaseException) -> str:
    """The first line of the root cause of an orbax error."""
    while error.__cause__ is not None:  # tensorstore's error says which parameter and why; orbax wraps it
        error = error.__cause__
    return first_line(error)


def _check_shapes(path: Path, found: Any, target: Any) -> None:
    def shapes(tree: Any) -> dict[str, tuple[int, ...]]:
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        return {jax.tree_util.keystr(keys, simple=True, separator="."): tuple(leaf.shape) for keys, leaf in leaves}

    ours, theirs = shapes(target), shapes(found)
    for name in sorted(ours.keys() & theirs.keys()):
        if ours[name] != theirs[name]:
            raise ValueError(f"{name} has shape {theirs[name]} in the checkpoint {path} and {ours[name]} in the model")
    extra, missing = sorted(theirs.keys() - ours.keys()), sorted(ours.keys() - theirs.keys())
    if extra or missing:
        raise ValueError(
            f"the checkpoint {path} has another architecture: only in the checkpoint {extra or 'nothing'}, "
            f"only in the model {missing or 'nothing'}"
        )
    if path.name != "optimizer":  # its moments may all be zero and compress well
        check_folder(path, ours.values())
