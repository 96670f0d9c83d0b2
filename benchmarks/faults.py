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
import platform
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from tqdm import tqdm

from avit_jax.runtime.hints import nearest
from avit_jax.runtime.mesh import available_cores
from benchmarks.results import save_results
from tests.harness.builders import toy_data
from tests.harness.faults import (
    Fault,
    damaged,
    disk_full,
    killed,
    killed_saving,
    peer_hung,
    peer_killed,
    read_only,
    second_run,
    small_disk,
    stopped,
    stopped_twice,
)
from tests.harness.real_run import Failed, Job, check_same

STEPS = 300
FAULTS_A_RUN = 8

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
