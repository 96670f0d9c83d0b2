"""The checkpoints of a training run, written in the background with orbax; a damaged one is set aside."""

import contextlib
import copy
import dataclasses
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from avit_jax.checkpoints.digests import NO_DIGESTS, check_digests, json_digest, read_digests, tree_digests
from avit_jax.checkpoints.model_folder import cause, checkpoint_steps, restore_tree
from avit_jax.model.config import AViTConfig
from avit_jax.runtime.files import CannotWrite, read_json, writing
from avit_jax.runtime.processes import in_any_process, lost_a_process

# Bytes of JSON: it holds the metrics of all steps since the last log line, about 600 bytes a step, for any log_every.
MOST_PROGRESS = 2**28


@dataclasses.dataclass(frozen=True)
class Restored:
    """What a training run's checkpoint holds."""

    folder: Path
    step: int
    items: dict[str, Any]
    progress: dict[str, Any]
    data: dict[str, Any]
    digests: dict[str, Any] | None  # as stored; None in old checkpoints, which have none


class RunCheckpoints:
    """The checkpoints of one training run: STEP/{model,ema,optimizer,step,data,config,digests}.

    They are written in the background. The last `keep` are kept, those of every `every`-th step, and the `best` ones by
    validation top-1. Raises ValueError if those in `folder` cannot be read.
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
        try:
            with writing(self._folder):
                self._manager = ocp.CheckpointManager(self._folder, options=options)
        except CannotWrite:
            raise
        except Exception as error:  # orbax raises many kinds if its own _CHECKPOINT_METADATA is damaged
            raise ValueError(
                f"the checkpoints in {self._folder} cannot be read: {cause(error)}; move the damaged STEP folder "
                "away, most likely the newest one"
            ) from error

    def save(
        self,
        step: int,
        items: dict[str, Any],
        progress: dict[str, Any],
        data: dict[str, Any],
        model_config: AViTConfig,
        top1: float,
    ) -> None:
        """Write a checkpoint in the background.

        items: the arrays of model, optimizer and perhaps ema. progress, data: plain JSON. top1: on validation, for
        `best`. The digests are made before this returns, so that the next step may reuse the arrays' memory. Raises
        ValueError if this checkpoint, or the one before it in the background, cannot be written.
        """
        # This is a copy, because orbax writes it in the background while the run's own lists grow.
        plain = copy.deepcopy({"step": progress, "data": data, "config": model_config.to_json()})
        digests: dict[str, Any] = {name: tree_digests(tree) for name, tree in items.items()}
        digests |= {name: json_digest(content) for name, content in plain.items()}
        parts = ocp.args.Composite(
            **{name: ocp.args.StandardSave(tree) for name, tree in items.items()},
            **{name: ocp.args.JsonSave(content) for name, content in (plain | {"digests": digests}).items()},
        )
        with self._writing():
            self._manager.save(step, metrics={"top1": top1}, args=parts)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            with writing(self._folder / "a checkpoint"):
                yield
        except (CannotWrite, jax.errors.JaxRuntimeError):  # the latter: another process is gone
            raise
        except Exception as error:  # orbax raises many kinds
            raise ValueError(
                f"a checkpoint could not be written to {self._folder}: {cause(error)}; the earlier ones are "
                "intact, and the same command goes on from there"
            ) from error

    def restore_newest(self, items: dict[str, Any]) -> Restored | None:
        """The newest intact checkpoint, in the structure and layout of `items`; None if there is none at all.

        A damaged one is reported and skipped, but not deleted. Raises ValueError if all are damaged.
        """
        steps = checkpoint_steps(self._folder)[::-1]
        for folder in steps:
            found, damage = None, None
            try:
                found = self._restore(folder, items)
            except ValueError as error:
                damage = error
            # A checkpoint that one of several processes cannot read is used by none.
            if not in_any_process(damage is not None):
                assert found is not None
                damage = _damage(folder, found)
                if not in_any_process(damage is not None):
                    self._set_aside(step for step in steps if int(step.name) > found.step)
                    return found
            damage = damage or ValueError(f"the checkpoint {folder} is damaged for another process: see its message")
            if folder == steps[-1]:
                raise ValueError(f"{damage}; no intact checkpoint is left: give another --workdir to start again")
            print(f"{damage}; going back to the checkpoint before it")
        return None

    def _restore(self, folder: Path, items: dict[str, Any]) -> Restored:
        restored = {name: restore_tree(folder / name, tree) for name, tree in items.items()}
        plain = {name: read_json(folder / name / "metadata", MOST_PROGRESS) for name in ("step", "data", "config")}
        digests = read_digests(folder / "digests" / "metadata")
        if digests is not None:
            found = {name: json_digest(content) for name, content in plain.items()}
            check_digests(folder, found, {name: digests.get(name) for name in found})
        progress, data = plain["step"], plain["data"]
        if not (isinstance(progress, dict) and isinstance(data, dict)):
            raise ValueError(f"the checkpoint {folder} is damaged: its step or data item is not a table")
        return Restored(folder, int(folder.name), restored, progress, data, digests)

    def _set_aside(self, damaged: Iterable[Path]) -> None:
        """Rename damaged checkpoints, so that their steps can be written again."""
        damaged = list(damaged)
        if jax.process_index() == 0:
            for folder in damaged:
                target, number = folder.with_name(f"damaged-{folder.name}"), 1
                while target.exists():  # a checkpoint of this step was damaged before
                    number += 1
                    target = folder.with_name(f"damaged-{folder.name}-{number}")
                folder.rename(target)
        if damaged:
            in_any_process(False)  # wait until process 0 has renamed them
            self._manager.reload()

    def preempted(self, step: int) -> bool:
        """Whether the cluster is about to take the machine away (one of several processes got SIGTERM)."""
        return jax.process_count() > 1 and self._manager.reached_preemption(step)

    def wait(self) -> None:
        """Wait until what was saved is on disk. Raises ValueError if it could not be written."""
        with self._writing():
            self._manager.wait_until_finished()

    def __enter__(self) -> "RunCheckpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """Wait until everything is on disk, unless another process is gone."""
        if error is not None and lost_a_process(error):
            return
        try:
            with self._writing():
                self._manager.close()
        except ValueError:
            if error is None:  # otherwise the first error is raised, which may be the same
                raise


def _damage(folder: Path, found: Restored) -> ValueError | None:
    """The damage that the digests show, or None. All processes must call this together."""
    if not in_any_process(found.digests is not None):
        if jax.process_index() == 0:
            print(f"the checkpoint {folder}: {NO_DIGESTS}")
        return None
    digests = {name: tree_digests(tree) for name, tree in found.items.items()}
    written = found.digests or {}
    try:
        for name in digests:
            check_digests(folder / name, digests[name], written.get(name))
    except ValueError as error:
        return error
    return None
