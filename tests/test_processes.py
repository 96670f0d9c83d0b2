"""Several real processes: the same training as one, what each says of the others, and what happens without one."""

import os
import shutil
import signal
import socket
import time
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
import pytest
from jax._src.clusters import cloud_tpu_cluster

from avit_jax.commands.run import run
from avit_jax.runtime import processes as distributed
from avit_jax.runtime.processes import LOST, start_distributed
from avit_jax.train.logs import read_metrics
from tests.harness.builders import quick_start, toy_data
from tests.harness.flags import COMPILE_SOONER
from tests.harness.real_run import Job


def job_of(
    folder: Path, processes: int, devices: int, environment: Mapping[str, str] | None = None, **settings: object
) -> Job:
    own = {"checkpoint_every": 10, "log_every": 10, "eval_every": 30, "model.drop_path_rate": 0.0, "model.remat": False}
    data = toy_data(folder.parent / "toy.npz")
    environment = quick_start() | {"XLA_FLAGS": COMPILE_SOONER} | (environment or {})
    return Job(folder, data, steps=60, processes=processes, devices=devices, environment=environment, **own, **settings)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in this process, on one device."""
    job = job_of(tmp_path_factory.mktemp("whole") / "job", 1, 1)
    run(job.config(), job.workdir)
    return job.workdir


def check_close(whole: Path, other: Path) -> None:
    """The same lines, to rounding."""
    one, two = read_metrics(whole), read_metrics(other)
    assert [(line["split"], line["step"]) for line in one] == [(line["split"], line["step"]) for line in two]
    for a, b in zip(one, two, strict=True):
        # Adam turns rounding into updates, later lines grow apart by it; the first has the step before any of them.
        tolerance = 1e-6 if a["step"] == one[0]["step"] else 1e-3
        np.testing.assert_allclose(b["loss"], a["loss"], rtol=tolerance)
        np.testing.assert_allclose(b["mean_depth"], a["mean_depth"], rtol=tolerance)


@pytest.mark.slow
def test_two_processes_lose_each_other_and_train_as_one(whole: Path, tmp_path: Path) -> None:
    """SIGTERM to one of them, then kill -9; each time the same command again. benchmarks/faults.py kills either one."""
    job = job_of(tmp_path / "job", 2, 2, **{"mesh.fsdp": 2})
    processes = job.start()
    while processes[1].alive() and "[Gloo]" not in processes[1].said():  # they have met
        time.sleep(0.01)
    processes[1].send(signal.SIGTERM)
    for process in processes:
        process.expect(0, "stopped by preemption after step ")
    processes = job.start()
    assert job.await_checkpoints(processes, 2), [process.said() for process in processes]
    processes[0].kill()
    processes[1].expect(1, LOST, within=60)
    # What the second process wrote of the newest checkpoint is damaged: both go back.
    newest = job.checkpoints()[-1]
    for file in (newest / "model" / "ocdbt.process_1").rglob("*"):
        if file.is_file():
            os.truncate(file, file.stat().st_size // 2)
    job.finish()
    assert newest.with_name(f"damaged-{newest.name}").is_dir()
    check_close(whole, job.workdir)

    # As if it had been killed before its last checkpoint; it goes on in one process on one device.
    alone = job_of(tmp_path / "alone", 1, 1)
    shutil.copytree(job.workdir, alone.workdir)
    (alone.workdir / "summary.json").unlink()
    shutil.rmtree(alone.workdir / "model")
    shutil.rmtree(alone.checkpoints()[-1])
    run(alone.config(), alone.workdir)
    check_close(whole, alone.workdir)


@pytest.mark.slow
def test_four_processes_of_two_devices_train_as_one_of_eight(tmp_path: Path) -> None:
    own = {"mesh.fsdp": 2, "batch_size": 16}
    one, four = (job_of(tmp_path / str(count), count, 8 // count, **own) for count in (1, 4))
    one.finish()
    four.finish()
    check_close(one.workdir, four.workdir)


def test_processes_with_different_configs_say_so(tmp_path: Path) -> None:
    """Started as SLURM's srun starts them: nothing else tells that there are two."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    step = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2"}
    processes = []
    for rank, weight in enumerate((0.002, 0.5)):
        own = step | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": "0", "JAX_COORDINATOR_PORT": str(port)}
        job = job_of(tmp_path / str(rank), 1, 1, environment=own, **{"loss.ponder_weight": weight})
        processes += job.start()
    processes[1].expect(
        1,
        "config.loss.ponder_weight is 0.5 in process 1 and 0.002 in process 0: "
        "start all processes with the same command",
    )
    processes[0].expect(1, "process 1 has another config than process 0")


def test_half_an_address_is_refused() -> None:
    with pytest.raises(ValueError, match="--coordinator, --num_processes and --process_id belong together"):
        start_distributed(True, "localhost:1", None, 0)
    with pytest.raises(ValueError, match="--process_id 2 is not one of 0..1"):
        start_distributed(True, "localhost:1", 2, 2)
    with pytest.raises(ValueError, match="--coordinator 'host0' is not HOST:PORT"):
        start_distributed(True, "host0", 2, 1)


def test_a_coordinator_that_does_not_answer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AVIT_COORDINATOR_TIMEOUT", "0")
    with pytest.raises(
        ValueError, match=r"the coordinator localhost:1 does not answer within 0 s .*Connection refused"
    ):
        start_distributed(True, "localhost:1", 2, 1)


@pytest.mark.parametrize(
    ("where", "several"),
    [
        ({}, False),
        ({"SLURM_NTASKS": "4"}, False),  # an allocation for four, in which a shell runs one
        ({"SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "4"}, True),
        ({"TPU_WORKER_HOSTNAMES": "host0,host1"}, True),
        ({"TPU_WORKER_HOSTNAMES": "host0"}, False),
        ({"metadata": "host0,host1"}, True),  # a TPU machine of Google Compute Engine
        ({"metadata": "host0"}, False),
    ],
)
def test_it_starts_by_itself_where_a_cluster_started_several(
    monkeypatch: pytest.MonkeyPatch, where: dict[str, str], several: bool
) -> None:
    started = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *_, **__: started.append(True))
    monkeypatch.setattr(distributed, "_at_abort", lambda _: None)
    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", not any("SLURM" in name for name in where))
    metadata = {"worker-network-endpoints": where.pop("metadata", "host0"), "agent-worker-number": "0", "tpu-env": ""}
    monkeypatch.setattr(cloud_tpu_cluster, "get_metadata", lambda key: (metadata[key], 200))
    monkeypatch.delenv("TPU_SKIP_MDS_QUERY", raising=False)
    for name, value in where.items():
        monkeypatch.setenv(name, value)
    start_distributed(False)
    assert started == [True] * several
