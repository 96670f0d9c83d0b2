"""Real faults at random moments; each run must end as if nothing had happened.

    python benchmarks/faults.py                                        50 faults, about 10 minutes on 2 cores
    python benchmarks/faults.py --faults=killed,killed_saving --seed=1

Runs of train.py, with a small model on a synthetic data set, meet one fault after another. After each fault, the same
command is given again. A run survives a fault if it reacts as it should (exit status, sentence, in time, no traceback)
and if in the end parameters, moving average, optimiser, data state, metrics.jsonl (except times) and the saved model
are bit for bit those of a run without faults. Full and read-only disks are mounted (tmpfs), which needs root; without
root these faults are left out, and a line says so. Writes runs/benchmarks/faults.json.
"""

import argparse
import contextlib
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
from tqdm import tqdm

from avit_jax.model.config import nearest
from avit_jax.runtime.mesh import available_cores
from avit_jax.runtime.processes import LOST
from benchmarks.real_run import PATIENCE, Failed, Job, check_same
from benchmarks.results import save_results

STEPS = 300
FAULTS_A_RUN = 8
Fault = Callable[[Job, random.Random], bool]  # returns whether it happened, because the run may have ended before


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


# How many of 100 faults are of each kind; those in TOGETHER need two processes.
ALONE: dict[Fault, int] = {
    killed: 24,
    killed_saving: 20,
    stopped: 8,
    stopped_twice: 6,
    damaged: 10,
    disk_full: 10,
    read_only: 6,
    second_run: 2,
}
TOGETHER: dict[Fault, int] = {peer_killed: 6, peer_hung: 2, stopped: 6}


def toy_data(path: Path) -> Path:
    """Images whose class is the position of a bright band."""
    rng = np.random.default_rng(0)
    labels = np.arange(120) % 3
    images = rng.integers(0, 60, (120, 8, 8, 1))
    for image, label in zip(images, labels, strict=True):
        image[label * 8 // 3 : (label + 1) * 8 // 3] += 150
    np.savez(path, images=images.astype(np.uint8), labels=labels)
    return path


class Campaign:
    """Runs of one kind (with one process or two), each with some faults, compared with a run without faults."""

    def __init__(self, folder: Path, processes: int, rng: random.Random) -> None:
        self._folder, self._processes, self._rng = folder, processes, rng
        self._runs = 0
        self._whole = self._job("whole")
        self._whole.finish()

    def _job(self, name: str) -> Job:
        environment = {
            "JAX_COMPILATION_CACHE_DIR": str(self._folder / "xla"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "AVIT_HEARTBEAT_TIMEOUT": "10",
        }
        folder = self._folder / f"{self._processes}_{name}"
        devices = None if self._processes == 1 else 1
        return Job(
            folder,
            self._folder / "toy.npz",
            steps=STEPS,
            processes=self._processes,
            devices=devices,
            environment=environment,
        )

    def meet(self, faults: list[Fault], bar: tqdm) -> Iterator[tuple[str, str]]:
        """Yield each fault's name and what went wrong, or "" if nothing did."""
        while faults:
            job = self._job(str(self._runs))
            self._runs += 1
            met: list[str] = []
            wrong: dict[int, str] = {}
            while faults and len(met) < FAULTS_A_RUN and not job.finished():
                try:
                    happened = faults[0](job, self._rng)
                except Failed as failure:
                    happened, wrong[len(met)] = True, str(failure)
                if happened:
                    met.append(faults.pop(0).__name__)
                    bar.update()
            try:
                job.finish()
                check_same(self._whole.workdir, job.workdir)
            except Failed as failure:
                wrong = {index: wrong.get(index, f"after {', '.join(met)}: {failure}") for index in range(len(met))}
            shutil.rmtree(job.folder)
            yield from ((name, wrong.get(index, "")) for index, name in enumerate(met))


def main() -> None:
    """Parse the flags, run, print the table and write the JSON."""
    known = {fault.__name__ for fault in ALONE | TOGETHER}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--faults", default=",".join(sorted(known)))
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks/faults.json"))
    flags = parser.parse_args()
    wanted = set(flags.faults.split(","))
    for name in wanted - known:
        parser.error(f"there is no fault {name!r}: {nearest(name, known)}")
    began, rng = time.perf_counter(), random.Random(flags.seed)
    with tempfile.TemporaryDirectory() as temporary, contextlib.ExitStack() as disk:
        folder = Path(temporary) / "disk"
        try:
            disk.enter_context(small_disk(folder, 64))
        except OSError as error:
            print(f"disk_full and read_only are left out: {error}")
            wanted -= {"disk_full", "read_only"}
            folder.mkdir(exist_ok=True)
        toy_data(folder / "toy.npz")
        shares = [
            (fault, several, share) for several, part in enumerate((ALONE, TOGETHER)) for fault, share in part.items()
        ]
        shares = [entry for entry in shares if entry[0].__name__ in wanted]
        drawn = rng.choices(shares, [share for _, _, share in shares], k=flags.rounds)
        results: list[tuple[str, str]] = []
        with tqdm(total=flags.rounds, unit="fault", dynamic_ncols=True) as bar, contextlib.suppress(KeyboardInterrupt):
            for several in (0, 1):  # Ctrl-C ends it with the table so far
                faults = [fault for fault, kind, _ in drawn if kind == several]
                suffix = " (2 processes)" * several
                for name, wrong in Campaign(folder, 1 + several, rng).meet(faults, bar) if faults else ():
                    results.append((name + suffix, wrong))
    show(results, time.perf_counter() - began, flags)


def show(results: list[tuple[str, str]], seconds: float, flags: argparse.Namespace) -> None:
    """Print the table and what went wrong, and write the JSON."""
    rows = {
        name: {"times": len(each), "survived": sum(not wrong for wrong in each)}
        for name in dict(results)
        for each in [[wrong for other, wrong in results if other == name]]
    }
    print(f"{'fault':28}{'times':>6}{'survived':>10}")
    for name, row in rows.items():
        print(f"{name:28}{row['times']:>6}{row['survived']:>10}")
    total = sum(row["survived"] for row in rows.values())
    print(f"{total} of {len(results)} survived; seed {flags.seed}; {seconds:.0f} s on {available_cores()} cores")
    wrongs = [{"fault": name, "what": wrong} for name, wrong in results if wrong]
    for entry in wrongs:
        print(f"\n{entry['fault']}: {entry['what']}")
    report = {"machine": platform.processor() or platform.machine(), "cores": available_cores(), "seed": flags.seed}
    save_results(flags.output, report | {"seconds": seconds, "faults": rows, "not_survived": wrongs})
    if wrongs:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
