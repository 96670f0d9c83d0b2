"""What a run writes while it trains: JSON lines and TensorBoard events."""

import json
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import numpy as np
import optax

from avit_jax.evaluate.figures import Evaluation
from avit_jax.runtime.files import replace_text, writing


class RunLog:
    """metrics.jsonl and tensorboard/ in the run's folder; lines after the restored step are removed on resume.

    start: the restored step. validated: whether the evaluation after that step, if one is due, was made; if not, its
    lines are removed too. With several processes, only the first one writes.
    """

    def __init__(self, workdir: Path, start: int, schedule: optax.Schedule, *, validated: bool = True) -> None:
        self._writes = jax.process_index() == 0
        self._schedule = schedule
        if not self._writes:
            return
        self._workdir = workdir
        self._open(start, validated)

    def _open(self, start: int, validated: bool) -> None:
        from avit_jax.train.tensorboard import EventFile  # imports torch if it is installed, which takes two seconds

        path = self._workdir / "metrics.jsonl"
        lines = [line for line in read_metrics(self._workdir) if line["step"] <= start]
        if not validated:
            lines = [line for line in lines if line["step"] < start or line["split"] == "train"]
        # In one piece, so that no line is lost if the process is killed here.
        replace_text(path, "".join(json.dumps(line) + "\n" for line in lines))
        with writing(path):
            self._file = path.open("a")
            self._tensorboard = EventFile(self._workdir / "tensorboard", start + 1)

    def back_to(self, step: int, *, validated: bool) -> None:
        """Remove what was written after this step, and its evaluation's lines unless it was `validated`."""
        if self._writes:
            self._close()
            self._open(step, validated)

    def train(self, step: int, means: dict[str, Any]) -> None:
        """Write the means over the steps since the last line."""
        self._write("train", step, means | {"learning_rate": float(self._schedule(step - 1))})

    def val(self, step: int, result: Evaluation, split: str = "val") -> None:
        """Write an evaluation on the validation set. split "val_raw": of the raw weights beside the moving average."""
        self._write(split, step, {"loss": result.loss, "accuracy": result.top1, "mean_depth": result.mean_depth})

    def _write(self, split: str, step: int, values: dict[str, Any]) -> None:
        if not self._writes:
            return
        with writing(self._workdir / "metrics.jsonl"):
            self._file.write(json.dumps({"split": split, "step": step} | values) + "\n")
            self._file.flush()
            for name, value in values.items():
                for layer, number in enumerate(value, start=1) if isinstance(value, list) else ((0, value),):
                    self._tensorboard.scalar(f"{split}/{name}" + f"/{layer:02}" * (layer > 0), number, step)

    def _close(self) -> None:
        with writing(self._workdir / "metrics.jsonl"):
            try:
                self._file.close()
            finally:
                self._tensorboard.close()

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if not self._writes:
            return
        try:
            self._close()
        except ValueError:
            if error is None:  # otherwise the first error is shown; a full disk causes several
                raise


def read_metrics(workdir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, without damaged ones and a last one that a killed run left unfinished."""
    path = workdir / "metrics.jsonl"
    lines = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            found = json.loads(line)
        except ValueError:
            continue
        if isinstance(found, dict) and isinstance(found.get("step"), int) and isinstance(found.get("split"), str):
            lines.append(found)
    return lines


def means_of(window: list[dict[str, Any]]) -> dict[str, Any]:
    """The means of the metrics of several steps; those by layer, layer by layer."""
    means = {name: np.mean([metrics[name] for metrics in window], axis=0) for name in window[0]}
    return {name: value.tolist() for name, value in means.items()}
