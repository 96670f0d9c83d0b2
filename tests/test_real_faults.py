"""Faults that really happen: processes killed, disks full and read-only; benchmarks/faults.py has them 50 times."""

import contextlib
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

from avit_jax.commands.run import run
from avit_jax.runtime.files import CannotWrite
from tests.harness.builders import quick_start, toy_data
from tests.harness.faults import killed_saving, read_only_folder, small_disk, stopped_twice
from tests.harness.real_run import Job, check_same

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_data(tmp_path_factory.mktemp("data") / "toy.npz")


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that met no fault."""
    job = job_of(tmp_path_factory.mktemp("whole"), data)
    run(job.config(), job.workdir)
    return job.workdir


def job_of(folder: Path, data: Path) -> Job:
    settings = {"model.drop_path_rate": 0.0, "model.remat": False, "checkpoint_every": 10}  # less to compile
    return Job(folder, data, steps=80, devices=len(jax.devices()), environment=quick_start(), **settings)


def test_killed_and_started_again_it_ends_bit_for_bit_the_same(data: Path, whole: Path, tmp_path: Path) -> None:
    """kill -9 while a checkpoint is being written; then SIGTERM twice; then it comes to its end in this process."""
    job = job_of(tmp_path / "job", data)
    for fault in (killed_saving, stopped_twice):
        assert any(fault(job, random.Random(seed)) for seed in (2, 6)), f"{fault.__name__} came too late, twice"
    assert not job.finished()
    run(job.config(), job.workdir)
    check_same(whole, job.workdir)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with skipped_without_mount(), small_disk(tmp_path / "disk", megabytes=8):
        yield tmp_path / "disk"


def test_a_full_disk_is_a_sentence_and_the_run_goes_on(data: Path, whole: Path, disk: Path) -> None:
    job = job_of(disk, data)
    filler = disk / "filler"
    filler.write_bytes(bytes(shutil.disk_usage(disk).free - 1_000_000))
    with pytest.raises(CannotWrite, match=rf"{job.workdir}.* \(No space left on device\): make space there; the same"):
        run(job.config(), job.workdir)
    kept = [step.name for step in job.checkpoints()]
    assert kept and kept[-1] != "80", "some checkpoints fitted, not all"
    filler.unlink()
    run(job.config(), job.workdir)
    check_same(whole, job.workdir)


def test_a_read_only_folder_is_a_sentence_and_the_run_goes_on(data: Path, whole: Path, tmp_path: Path) -> None:
    job = job_of(tmp_path / "job", data)
    checkpoints = job.workdir / "checkpoints"
    checkpoints.mkdir(parents=True)
    refused = pytest.raises(CannotWrite, match=rf"{checkpoints} \(Read-only file system\): make it writable; the same")
    with skipped_without_mount(), read_only_folder(checkpoints), refused:
        run(job.config(), job.workdir)
    run(job.config(), job.workdir)
    check_same(whole, job.workdir)


@contextlib.contextmanager
def skipped_without_mount() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        pytest.skip(f"a file system cannot be mounted here: {error}")
