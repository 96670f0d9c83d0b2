"""Signals that stop a run, and a lock against a second run in the same folder."""

import fcntl
import os
import signal
from pathlib import Path
from typing import Any

import jax

from avit_jax.runtime.files import writing
from avit_jax.runtime.processes import in_any_process


class StopAsked(Exception):
    """A signal asked this run to stop; raised at points where long work can be interrupted."""


class StopRequest:
    """After SIGTERM or SIGINT, the run finishes its step and writes a checkpoint; a second signal ends it at once.

    Several processes must all stop after the same step. JAX's runtime then handles SIGTERM, and
    RunCheckpoints.preempted tells every process when one of them got it.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.signal: str | None = None  # the signal's name, in a run with one process
        self._asked_before = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        for number in self.SIGNALS if jax.process_count() == 1 else (signal.SIGINT,):
            try:
                self._before[number] = signal.signal(number, self._asked)
            except ValueError:  # not the main thread, so another part of the program handles signals
                break
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if kind is None and self.signal is not None:
            # The signal came after the last check, and must not be lost.
            os.kill(os.getpid(), signal.Signals[self.signal])

    def check(self) -> None:
        """Raises StopAsked after a signal, in a run with one process."""
        if self.signal is not None:
            raise StopAsked

    def _asked(self, number: int, _: Any) -> None:
        if self._asked_before:
            self.agreed()
            os.kill(os.getpid(), number)
        self._asked_before = True
        if jax.process_count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            self.signal = signal.Signals(number).name

    def agreed(self) -> None:
        """Tell this object that the run is about to stop: from now on, a signal ends this process at once.

        Files are whole at any moment, because orbax renames a checkpoint when it is complete.
        """
        for number in self.SIGNALS:
            signal.signal(number, signal.SIG_DFL)


class FolderLock:
    """Allows one run at a time in a folder. The operating system releases the lock however the run ends.

    Entering it raises ValueError if another run has the lock.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / ".lock"

    def __enter__(self) -> "FolderLock":
        # Process 0 holds the lock for all processes, and all of them learn if it cannot get it.
        if in_any_process(jax.process_index() == 0 and not self._taken()):
            raise ValueError(f"another run is at work in {self._path.parent}: wait for it, or give another --workdir")
        return self

    def _taken(self) -> bool:
        try:
            with writing(self._path):
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._file = self._path.open("a+")
        except FileNotFoundError as error:  # a place where no folder can be made, such as /proc
            raise ValueError(f"the run's folder {self._path.parent} cannot be made: give another --workdir") from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            return False
        return True

    def __exit__(self, *_: Any) -> None:
        if jax.process_index() == 0:
            self._file.close()
