"""Models and training states on disk, with orbax; every checkpoint says what it is (config.json or a config item)."""

import contextlib
import dataclasses
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx
from flax.traverse_util import flatten_dict
from orbax.checkpoint.checkpoint_managers import preservation_policy

from avit_jax.config import AViTConfig
from avit_jax.convert import Conversion, convert, fit, override
from avit_jax.convert.limits import check_folder
from avit_jax.convert.weight_files import read_weight_file
from avit_jax.distributed import in_any_process, lost_a_process
from avit_jax.files import CannotWrite, read_json, write_json, writing
from avit_jax.model import AViT


def save(model: AViT, path: str | Path) -> None:
    """Write a model as a folder: config.json (architecture, preprocessing, class names) and params/ (orbax).

    The folder appears whole or not at all. Raises ValueError where it exists already: nothing is overwritten.
    """
    path = Path(path).absolute()
    if path.exists():
        raise ValueError(f"{path} exists already: choose another path or remove it")
    partial = path.with_name(path.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)  # what a killed process left
    with writing(path):
        _save(model, path, partial)


def _save(model: AViT, path: Path, partial: Path) -> None:
    partial.mkdir(parents=True)
    # Orbax takes arrays of one process of several as NumPy's.
    with ocp.StandardCheckpointer(multiprocessing_options=_alone("save")) as checkpointer:
        params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
        checkpointer.save(partial / "params", jax.tree.map(np.asarray, params) if jax.process_count() > 1 else params)
    write_json(partial / "config.json", model.config.to_json())
    partial.rename(path)


def _alone(doing: str) -> ocp.options.MultiprocessingOptions:
    """By this process, of however many, without waiting for the others."""
    own = jax.process_index()
    return ocp.options.MultiprocessingOptions(
        primary_host=own, active_processes={own}, barrier_sync_key_prefix=f"{doing}_{own}"
    )


def load(path: str | Path, preset: str | None = None, *, ema: bool = False, **overrides: Any) -> AViT:
    """A model from a folder that `save` or a training run wrote, or from a .pth, .safetensors or .npz file.

    Of a run's folder: the finished model, else the newest checkpoint. Folders, and files that save_torch wrote, carry
    their own configuration; preset and overrides (AViTConfig fields) say the rest. ema: the moving average's weights.
    Position embeddings are resized to another image_size, the head is new for another num_classes; either is printed.
    Raises ValueError where the path is missing, damaged, or of another architecture (naming the parameter and shapes).
    """
    conversion = load_conversion(path, preset, ema=ema, **overrides)
    for note in conversion.notes:
        print(f"{path}: {note}")
    return conversion.model


def load_conversion(path: str | Path, preset: str | None = None, *, ema: bool = False, **overrides: Any) -> Conversion:
    """What load does, with the account of it."""
    path = Path(path).absolute()
    if path.is_file():
        file = read_weight_file(path, ema=ema)
        try:
            conversion = convert(file.state, preset, saved=file.config, **overrides)  # file.state is empty after it
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        return dataclasses.replace(conversion, notes=file.notes + conversion.notes)
    if preset is not None:
        raise ValueError(f"{path} carries its own configuration: leave preset={preset!r} out")
    config_file, params = _locate(path, ema)
    saved = AViTConfig.from_json(read_json(config_file))
    if overrides.get("num_heads", saved.num_heads) != saved.num_heads:
        # The one difference of architecture that no shape shows.
        raise ValueError(
            f"num_heads is {saved.num_heads} in the checkpoint {path} and {overrides['num_heads']} in the model"
        )
    config = override(saved, overrides)
    abstract = nnx.state(nnx.eval_shape(lambda: AViT(saved, rngs=nnx.Rngs(0))))
    parameters = flatten_dict(restore_tree(params, nnx.to_pure_dict(abstract)), sep=".")
    try:
        return fit(parameters, config, saved, overrides.keys())
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _locate(path: Path, ema: bool) -> tuple[Path, Path]:
    """The configuration's file and the parameters' folder, in a saved model, a run, its checkpoints, or one of them."""
    if not path.exists():
        raise ValueError(f"there is no checkpoint at {path}: the folder is missing")
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
    return sorted((p for p in folder.glob("*") if p.name.isdigit()), key=lambda p: int(p.name))


def restore_tree(path: Path, target: Any) -> Any:
    """The arrays under `path` in the structure of the target, nested dicts of arrays, as they lie, or of shapes.

    Shapes alone: on this process's first device.

    Raises ValueError naming the parameter and both shapes where they differ, and the path where it is damaged.
    """
    # Said, not left to the file: it may come from a machine with other devices.
    first = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def placed(leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None) or first)

    with ocp.StandardCheckpointer(multiprocessing_options=_alone("restore")) as checkpointer:
        try:
            found = ocp.StandardCheckpointHandler().metadata(path).tree
        except Exception as error:  # orbax raises many kinds; all of them mean that the folder is not whole
            raise ValueError(f"the checkpoint {path} is incomplete or damaged: {_first_line(error)}") from error
        _check_shapes(path, found, target)
        try:
            return checkpointer.restore(path, jax.tree.map(placed, target))
        except Exception as error:
            raise ValueError(f"the checkpoint {path} is incomplete or damaged: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    while error.__cause__ is not None:  # tensorstore's own says which parameter and why; orbax wraps it
        error = error.__cause__
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


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
            f"the checkpoint {path} is of another architecture: only there {extra or 'nothing'}, "
            f"only in the model {missing or 'nothing'}"
        )
    if path.name != "optimizer":  # whose moments may all be zero
        check_folder(path, ours.values())


@dataclasses.dataclass(frozen=True)
class Restored:
    """What a training run's checkpoint holds."""

    step: int
    items: dict[str, Any]
    progress: dict[str, Any]
    data: dict[str, Any]


class RunCheckpoints:
    """The checkpoints of one training run: STEP/{model,ema,optimizer,step,data,config}, written in the background.

    Kept: the last `keep`, every `every`-th step, the `best` ones by top-1 on validation.
    """

    def __init__(self, folder: Path, keep: int, every: int = 0, best: int = 0) -> None:
        policies: list[Any] = [preservation_policy.LatestN(keep)]
        if every:
            policies.append(preservation_policy.EveryNSteps(every))
        if best:
            policies.append(preservation_policy.BestN(get_metric_fn=lambda metrics: metrics["top1"], n=best))
        options = ocp.CheckpointManagerOptions(
            preservation_policy=preservation_policy.AnyPreservationPolicy(policies), cleanup_tmp_directories=True
        )
        self._folder = folder.absolute()
        with writing(self._folder):
            self._manager = ocp.CheckpointManager(self._folder, options=options)

    def save(
        self,
        step: int,
        items: dict[str, Any],
        progress: dict[str, Any],
        data: dict[str, Any],
        config: AViTConfig,
        top1: float,
    ) -> None:
        """Write in the background; items are model, optimizer and perhaps ema, progress and data are plain JSON.

        Raises ValueError where this one, or the one before it in the background, cannot be written.
        """
        parts = ocp.args.Composite(
            **{name: ocp.args.StandardSave(tree) for name, tree in items.items()},
            step=ocp.args.JsonSave(progress),
            data=ocp.args.JsonSave(data),
            config=ocp.args.JsonSave(config.to_json()),
        )
        with self._writing():
            self._manager.save(step, metrics={"top1": top1}, args=parts)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            with writing(self._folder / "a checkpoint"):
                yield
        except (CannotWrite, jax.errors.JaxRuntimeError):  # the latter: of a collective, another process has gone
            raise
        except Exception as error:  # orbax raises many kinds
            raise ValueError(
                f"a checkpoint could not be written to {self._folder}: {_first_line(error)}; the ones before it are "
                "whole, and the same command goes on from there"
            ) from error

    def restore_newest(self, items: dict[str, Any]) -> Restored | None:
        """The newest whole checkpoint in the given items' structure and layout; None where there is none at all.

        A damaged one is named and passed over, not deleted. Raises ValueError where all are damaged.
        """
        steps = checkpoint_steps(self._folder)[::-1]
        for folder in steps:
            found, damage = None, None
            try:
                found = self._restore(folder, items)
            except ValueError as error:
                damage = error
            # What one of several processes cannot read, none takes.
            if not in_any_process(damage is not None):
                assert found is not None
                self._set_aside(step for step in steps if int(step.name) > found.step)
                return found
            damage = damage or ValueError(f"the checkpoint {folder} is damaged for another process: see its message")
            if folder == steps[-1]:
                raise damage
            print(f"{damage}; going back to the checkpoint before it")
        return None

    def _restore(self, folder: Path, items: dict[str, Any]) -> Restored:
        restored = {name: restore_tree(folder / name, tree) for name, tree in items.items()}
        progress, data = (read_json(folder / name / "metadata") for name in ("step", "data"))
        return Restored(int(folder.name), restored, progress, data)

    def _set_aside(self, damaged: Iterable[Path]) -> None:
        """Rename, so that the steps can be written again."""
        damaged = list(damaged)
        if jax.process_index() == 0:
            for folder in damaged:
                target = folder.with_name(f"damaged-{folder.name}")
                if not target.exists():
                    folder.rename(target)
        if damaged:
            in_any_process(False)  # not before process 0 has renamed them
            self._manager.reload()

    def preempted(self, step: int) -> bool:
        """Whether the cluster is about to take the machine away (one of several processes got SIGTERM)."""
        return jax.process_count() > 1 and self._manager.reached_preemption(step)

    def wait(self) -> None:
        """Until what was saved is on disk. Raises ValueError where it could not be written."""
        with self._writing():
            self._manager.wait_until_finished()

    def __enter__(self) -> "RunCheckpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """Wait until everything is on disk; not for a process that has gone."""
        if error is not None and lost_a_process(error):
            return
        try:
            with self._writing():
                self._manager.close()
        except ValueError:
            if error is None:  # else that one is told, which may be the same
                raise
