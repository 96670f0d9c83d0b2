"""Faults that a run of train.py may meet: killed, stopped, damaged, a full disk, a lost process.

Each takes a Job and a random generator, starts the job, does its harm at a random moment and checks what is promised of
the run: exit status, sentence, in time, no traceback. It returns whether the fault happened: the run may have ended
before.
"""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from avit_jax.runtime.processes import LOST
from tests.harness.real_run import PATIENCE, Failed, Job

Fault = Callable[[Job, random.Random], bool]


def killed(job: Job, rng: random.Random) -> bool:
    """kill -9 at any moment: while the run imports, compiles, restores, trains or evaluates."""
    (process,) = job.start()
    until = time.monotonic() + rng.uniform(0.5, 10.0)
    while process.alive() and time.monotonic() < until:
        time.sleep(0.01)
    happened = process.alive()
    process.kill()
    return happened


def killed_saving(job: Job, rng: random.Random) -> bool:
    """kill -9 while a checkpoint is being written."""
    processes = job.start()
    if job.await_checkpoints(processes, rng.randint(1, 4)) and job.await_saving(processes):
        time.sleep(rng.uniform(0, 0.08))
    processes[0].kill()
    return job.saving()


def stopped(job: Job, rng: random.Random) -> bool:
    """SIGTERM or SIGINT to one process: a checkpoint, exit status 0, and a line that says how to go on."""
    processes = job.start()
    if not _training(job, processes, rng):
        return False
    rng.choice(processes).send(rng.choice((signal.SIGTERM, signal.SIGINT)))
    for process in processes:
        process.expect(0, "")
    if job.finished():
        return False
    for process in processes:
        process.expect(0, "the same command goes on")
    return True


def stopped_twice(job: Job, rng: random.Random) -> bool:
    """Two signals: the run ends at once."""
    processes = job.start()
    if not _training(job, processes, rng):
        return False
    for _ in range(2):
        processes[0].send(signal.SIGTERM)
        time.sleep(rng.uniform(0, 0.05))
    status = processes[0].ended(within=10)
    if status not in (0, -signal.SIGTERM):
        raise Failed(f"status {status}: {processes[0].said()[-1500:]}")
    return status != 0


def damaged(job: Job, rng: random.Random) -> bool:
    """A file of the newest checkpoint is truncated or deleted, or one bit of it is flipped."""
    if not stopped(job, rng) or len(job.checkpoints()) < 2:
        return False
    newest = job.checkpoints()[-1]
    item = rng.choice(("model", "ema", "optimizer", "step", "data", "digests"))
    file = rng.choice(sorted(path for path in (newest / item).rglob("*") if path.is_file()))
    damage = rng.choice(("gone", "cut", "flipped"))
    if damage == "gone":
        file.unlink()
    elif damage == "cut" or not file.stat().st_size:
        os.truncate(file, file.stat().st_size // 2)
    else:
        content = bytearray(file.read_bytes())
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        file.write_bytes(content)
    (process,) = job.start()
    while process.alive() and "going on from step" not in process.said():
        time.sleep(0.005)
    said, steps = process.said(), [step.name for step in job.checkpoints()]
    process.kill()
    if "going on from step" not in said:
        raise Failed(f"{file.relative_to(newest)} was damaged: {said[-1500:]}")
    if newest.name not in steps and not newest.with_name(f"damaged-{newest.name}").exists():
        raise Failed(f"the damaged checkpoint {newest} was deleted: {said[-1500:]}")
    return True


def disk_full(job: Job, rng: random.Random) -> bool:
    """The disk becomes full at some moment; then there is space again."""
    processes = job.start()
    if not _training(job, processes, rng):
        return False
    filler = job.folder / "filler"
    try:
        with filler.open("wb", buffering=0) as file:
            until = time.monotonic() + PATIENCE
            while processes[0].alive() and time.monotonic() < until:
                with contextlib.suppress(OSError):  # repeatedly, because removed checkpoints free space
                    file.write(bytes(shutil.disk_usage(job.folder).free))
                time.sleep(0.01)
        if processes[0].ended() == 0 and job.finished():  # nothing was left to write
            return False
        processes[0].expect(1, "(No space left on device): make space there; the same command goes on")
    finally:
        filler.unlink()
    return True


def read_only(job: Job, rng: random.Random) -> bool:
    """The checkpoints' folder becomes read-only; then it is writable again."""
    processes = job.start()
    if not _training(job, processes, rng):
        return False
    with read_only_folder(job.workdir / "checkpoints"):
        if processes[0].ended() == 0 and job.finished():
            return False
        processes[0].expect(1, "(Read-only file system): make it writable; the same command goes on")
    return True


def second_run(job: Job, rng: random.Random) -> bool:
    """The same command is given while the run is active: it is refused, and the first one goes on."""
    first = job.start()
    happened = job.await_checkpoints(first, 1)
    (second,) = job.start("second")
    if happened:
        second.expect(1, "another run is at work in")
    second.kill()
    happened &= first[0].alive()
    first[0].kill()
    return happened


def peer_killed(job: Job, rng: random.Random) -> bool:
    """kill -9 of one of two processes: the other ends within a minute and says why."""
    return _lost(job, rng, signal.SIGKILL)


def peer_hung(job: Job, rng: random.Random) -> bool:
    """One of two processes hangs (SIGSTOP): the other ends within a minute and says why."""
    return _lost(job, rng, signal.SIGSTOP)


def _lost(job: Job, rng: random.Random, number: signal.Signals) -> bool:
    processes = job.start()
    if not _training(job, processes, rng):
        return False
    victim = rng.choice(processes)
    victim.send(number)
    try:
        for process in processes:
            if process is not victim:
                process.expect(1, LOST, within=60)
    finally:
        victim.kill()
    return True


def _training(job: Job, processes: list, rng: random.Random) -> bool:
    """Wait until a random moment of the training; False, after the run's end, if it ends before."""
    if job.await_checkpoints(processes, rng.randint(1, 4)):
        time.sleep(rng.uniform(0, 0.3))
        if all(process.alive() for process in processes):
            return True
    for process in processes:
        process.expect(0, "")
    return False


@contextlib.contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[None]:
    """A separate file system of this size in the folder. Raises OSError if mounting is not allowed."""
    folder.mkdir(parents=True, exist_ok=True)
    _mount("-t", "tmpfs", "-o", f"size={megabytes}m", "none", str(folder))
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


@contextlib.contextmanager
def read_only_folder(folder: Path) -> Iterator[None]:
    """A folder that nobody can write to, not even root. Raises OSError if mounting is not allowed."""
    _mount("--bind", str(folder), str(folder))
    try:
        for _ in range(2000):
            with contextlib.suppress(OSError):  # a file is open for writing
                _mount("-o", "remount,bind,ro", str(folder))
                break
            time.sleep(0.005)
        yield
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def _mount(*arguments: str) -> None:
    done = subprocess.run(["mount", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"mount {' '.join(arguments)}: {done.stderr.strip()}")
