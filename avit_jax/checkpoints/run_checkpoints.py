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
from avit_jax.checkpoints.model_folder import checkpoint_steps, first_line, restore_tree
from avit_jax.model.config import AViTConfig
from avit_jax.runtime.files import CannotWrite, read_json, writing
from avit_jax.runtime.processes import in_any_process, lost_a_process

# Bytes of JSON: metrics of all steps since the last line of the log, about 600 for a step, whatever log_every is.
MOST_PROGRESS = 2**28


@dataclasses.dataclass(frozen=True)
class Restored:
    """What a training run's checkpoint holds."""

    folder: Path
    step: int
    items: dict[str, Any]
    progress: dict[str, Any]
    data: dict[str, Any]
    digests: dict[str, Any] | None  # as written; None in checkpoints from before there were any


class RunCheckpoints:
    """The checkpoints of one training run: STEP/{model,ema,optimizer,step,data,config,digests}.

    They are written in the background. Kept: the last `keep`, every `every`-th step, and the `best` ones by top-1 on
    validation.
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
        except Exception as error:  # orbax raises many kinds where its own _CHECKPOINT_METADATA is damaged
            raise ValueError(
                f"the checkpoints in {self._folder} cannot be read: {first_line(error)}; move the damaged STEP folder, "
                "most likely the newest, away"
            ) from error

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

        The digests are made before this returns, so that the next step may reuse the arrays' memory.
        Raises ValueError where this one, or the one before it in the background, cannot be written.
        """
        # A copy: orbax writes it in the background, while the run's own lists grow.
        plain = copy.deepcopy({"step": progress, "data": data, "config": config.to_json()})
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
        except (CannotWrite, jax.errors.JaxRuntimeError):  # the latter: of a collective, another process has gone
            raise
        except Exception as error:  # orbax raises many kinds
            raise ValueError(
                f"a checkpoint could not be written to {self._folder}: {first_line(error)}; the ones before it are "
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
                damage = _damage(folder, found)
                if not in_any_process(damage is not None):
                    self._set_aside(step for step in steps if int(step.name) > found.step)
                    return found
            damage = damage or ValueError(f"the checkpoint {folder} is damaged for another process: see its message")
            if folder == steps[-1]:
                raise ValueError(f"{damage}; no whole checkpoint is left: give another --workdir to begin anew")
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
            raise ValueError(f"the checkpoint {folder} is damaged: its step or its data item holds no table")
        return Restored(folder, int(folder.name), restored, progress, data, digests)

    def _set_aside(self, damaged: Iterable[Path]) -> None:
        """Rename, so that the steps can be written again."""
        damaged = list(damaged)
        if jax.process_index() == 0:
            for folder in damaged:
                target, number = folder.with_name(f"damaged-{folder.name}"), 1
                while target.exists():  # this step has been damaged before
                    number += 1
                    target = folder.with_name(f"damaged-{folder.name}-{number}")
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


def _damage(folder: Path, found: Restored) -> ValueError | None:
    """What differs from what was written, as far as digests tell; all processes must call this together."""
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
