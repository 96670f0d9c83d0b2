"""A small training run in its own processes, which can be stopped, killed and compared with another run."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from ml_collections import ConfigDict

from avit_jax.checkpoints.model_folder import checkpoint_steps, restore_tree
from avit_jax.data.sources import load_dataset
from avit_jax.runtime.files import read_json
from avit_jax.train.clock import TIMES
from avit_jax.train.logs import read_metrics
from configs import npz_avit

ROOT = Path(__file__).parents[2]
PATIENCE = 900.0  # seconds in which a process must end, even on a busy machine; longer is a hang
SETTINGS: dict[str, Any] = {
    "init_from": "",
    "teacher": "",
    "loss.distillation": "none",
    "model.patch_size": 4,
    "model.embed_dim": 16,
    "model.depth": 3,
    "model.num_heads": 2,
    "model.gate_scale": 4.0,
    "model.gate_center": 2.0,
    "model.drop_path_rate": 0.2,
    "batch_size": 12,
    "eval_batch_size": 16,
    "optim.warmup_steps": 2,
    "checkpoint_every": 5,
    "log_every": 3,
    "eval_every": 50,
}


class Failed(Exception):
    """A run did not do what it should; the message says what happened."""


class Process:
    """One process of a run."""

    def __init__(self, command: list[str], environment: Mapping[str, str], log: Path) -> None:
        self._log = log
        with log.open("w") as file:
            self._process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=file)

    def alive(self) -> bool:
        """Whether the process is running."""
        return self._process.poll() is None

    def send(self, number: signal.Signals) -> None:
        """Send the process a signal."""
        self._process.send_signal(number)

    def said(self) -> str:
        """Everything it has printed."""
        return self._log.read_text()

    def kill(self) -> None:
        """kill -9, and wait for the end."""
        self._process.kill()
        self._process.wait()

    def ended(self, within: float = PATIENCE) -> int:
        """The exit status. Raises Failed if it has not ended within this many seconds."""
        try:
            return self._process.wait(within)
        except subprocess.TimeoutExpired:
            self.kill()
            raise Failed(f"a process had not ended after {within:.0f} s: {self.said()[-1500:]}") from None

    def expect(self, status: int, sentence: str, within: float = PATIENCE) -> None:
        """Raises Failed unless it ends with this status in time, prints the sentence, and shows no traceback."""
        found, said = self.ended(within), self.said()
        if found != status or sentence not in said or "Traceback" in said:
            start = max(said.find("Traceback") - 200, 0) if "Traceback" in said else -1500
            raise Failed(f"status {found}, expected {status} and {sentence!r}; it said: {said[start:][:1500]}")


class Job:
    """The command of one run, which can be given repeatedly.

    folder: for the run and its logs. data: an .npz file of 8x8 images in three classes. settings: config keys to set.
    """

    def __init__(
        self,
        folder: Path,
        data: Path,
        *,
        steps: int,
        processes: int = 1,
        devices: int | None = None,
        environment: Mapping[str, str] | None = None,
        **settings: Any,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.workdir, self.processes = folder, folder / "run", processes
        self._data = data
        self._settings = SETTINGS | settings
        self._settings["epochs"] = steps * self._settings["batch_size"] / len(load_dataset("npz", str(data)).train)
        self._environment = {**os.environ, "JAX_PLATFORMS": "cpu", **(environment or {})}
        if devices is not None:
            self._environment["JAX_NUM_CPU_DEVICES"] = str(devices)

    def config(self) -> ConfigDict:
        """The command's configuration."""
        config = npz_avit.get_config(str(self._data))
        config.update_from_flattened_dict(self._settings)
        return config

    def start(self, name: str = "log") -> list[Process]:
        """Start the command's processes; they print to name.0, name.1, ..."""
        command = [
            sys.executable,
            "train.py",
            f"--config=configs/npz_avit.py:{self._data}",
            f"--workdir={self.workdir}",
        ]
        command += [f"--config.{key}={value}" for key, value in self._settings.items()]
        if self.processes > 1:
            with socket.socket() as free:
                free.bind(("localhost", 0))
                command += [f"--coordinator=localhost:{free.getsockname()[1]}", f"--num_processes={self.processes}"]
        return [
            Process(
                command + ([f"--process_id={index}"] if self.processes > 1 else []),
                self._environment,
                self.folder / f"{name}.{index}",
            )
            for index in range(self.processes)
        ]

    def finish(self) -> None:
        """Give the command and wait until it has finished."""
        for process in self.start():
            process.expect(0, "")

    def finished(self) -> bool:
        """Whether the run is complete."""
        return (self.workdir / "summary.json").exists()

    def checkpoints(self) -> list[Path]:
        """The complete checkpoints, oldest first."""
        return checkpoint_steps(self.workdir / "checkpoints")

    def await_checkpoints(self, processes: list[Process], count: int) -> bool:
        """Wait for `count` more complete checkpoints; False if a process ends before."""
        newest = [step.name for step in self.checkpoints()][-1:]
        while count and all(process.alive() for process in processes):
            time.sleep(0.002)
            if (found := [step.name for step in self.checkpoints()][-1:]) != newest:
                newest, count = found, count - 1
        return all(process.alive() for process in processes)

    def await_saving(self, processes: list[Process]) -> bool:
        """Wait until a checkpoint is half written; False if a process ends before."""
        while all(process.alive() for process in processes):
            if self.saving():
                return True
        return False

    def saving(self) -> bool:
        """Whether there is a half-written checkpoint."""
        return any((self.workdir / "checkpoints").glob("*.orbax-checkpoint-tmp"))


def check_same(whole: Path, other: Path) -> None:
    """Raises Failed unless two finished runs agree bit for bit: log lines (times apart), state, saved model."""
    lines = [
        [{key: value for key, value in line.items() if key not in TIMES} for line in read_metrics(run)]
        for run in (whole, other)
    ]
    if lines[0] != lines[1]:
        raise Failed(f"metrics.jsonl differs between {whole} and {other}")
    newest = [checkpoint_steps(run / "checkpoints")[-1] for run in (whole, other)]
    if newest[0].name != newest[1].name:
        raise Failed(f"the newest checkpoints are {newest[0]} and {newest[1]}")
    for item in ("checkpoint/model", "checkpoint/ema", "checkpoint/optimizer", "model/params"):
        where, _, name = item.partition("/")
        folders = newest if where == "checkpoint" else [run / where for run in (whole, other)]
        trees = [_arrays(folder / name) for folder in folders]
        if trees[0] != trees[1]:
            raise Failed(f"{item} differs between {whole} and {other}")
    if len({str(read_json(step / "data" / "metadata")) for step in newest}) > 1:
        raise Failed(f"the data's state differs between {whole} and {other}")


def _arrays(path: Path) -> dict[str, tuple[Any, ...]]:
    found = ocp.StandardCheckpointHandler().metadata(path).tree
    tree = restore_tree(path, jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), found))
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(keys): (x.shape, str(x.dtype), np.asarray(x).tobytes()) for keys, x in leaves}
