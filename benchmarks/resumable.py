"""A benchmark of many rows, each in a process of its own and with a JSON file of its own, that may be stopped."""

import argparse
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from avit_jax.runtime.mesh import use_all_cores

ROOT = Path(__file__).parents[1]


class Row(Protocol):
    """One result."""

    @property
    def name(self) -> str:
        """Of its files."""

    @property
    def label(self) -> str:
        """Of its method in the results."""

    @property
    def result(self) -> Path:
        """Its JSON file; the row is done once it is there."""


def run_rows(script: str, description: str | None, rows: Sequence[Any], run: Callable[[Any], None], logs: Path) -> None:
    """Run every row whose result is missing, or do what the command line says; a row that fails stops no other.

    script: the benchmark's file. rows: in their order; names differ. run: what makes one row's result. logs: the folder
    for the output of each row.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="names of rows, with commas between them")
    parser.add_argument("--list", action="store_true", help="print the rows, run none")
    parser.add_argument("--here", action="store_true", help="run the row in this process")
    arguments = parser.parse_args()
    names = [name for name in arguments.only.split(",") if name]
    chosen = [row for row in rows if not names or row.name in names]
    if len(names) > len(chosen):
        parser.error(f"--only={arguments.only}: not all of these are rows; --list shows the names")
    if arguments.list:
        print("\n".join(f"{row.name:40} {'there' if row.result.exists() else '':8} {row.label}" for row in chosen))
        return
    if arguments.here:
        use_all_cores()
        run(chosen[0])
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped; the same command goes on"))
    for number, row in enumerate(chosen, 1):
        if row.result.exists():
            continue
        began = time.perf_counter()
        print(f"{time.strftime('%H:%M:%S')} {number} of {len(chosen)}: {row.name}", flush=True)
        code = _in_own_process(script, row, logs)
        minutes = (time.perf_counter() - began) / 60
        print(f"    {f'FAILED with {code}' if code else 'done'} after {minutes:.1f} min", flush=True)


def _in_own_process(script: str, row: Row, logs: Path) -> int:
    """Run the row with its output in LOGS/NAME.log; returns the exit status."""
    logs.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, script, "--here", "--only", row.name]
    with (logs / f"{row.name}.log").open("a") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
        try:
            return process.wait()
        except BaseException:
            process.terminate()  # it writes its checkpoint
            process.wait()
            raise


def commit() -> str:
    """The commit of this checkout."""
    command = ["git", "rev-parse", "HEAD"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
