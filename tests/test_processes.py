"""Several real processes: the same training as one, and what each says of the others."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from avit_jax.distributed import start_distributed
from avit_jax.logs import read_metrics


def started(folder: Path, processes: int, devices: int) -> list[subprocess.Popen[str]]:
    """The processes of a run, each with so many devices."""
    folder.mkdir(exist_ok=True)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    environment = os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_PLATFORMS": "cpu",
    }
    return [
        subprocess.Popen(
            [sys.executable, "-m", "tests.train_on_processes", str(folder), address, str(processes), str(process)],
            env=environment,
            cwd=Path(__file__).parents[1],
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for process in range(processes)
    ]


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    for processes, devices in ((1, 4), (2, 2)):
        for process in started(tmp_path / str(processes), processes, devices):
            output, _ = process.communicate(timeout=240)
            assert process.returncode == 0, output
    one, two = (read_metrics(tmp_path / name / "run") for name in ("1", "2"))
    assert [(line["split"], line["step"]) for line in one] == [(line["split"], line["step"]) for line in two]
    assert len(one) == 6
    for a, b in zip(one, two, strict=True):
        # Adam turns rounding into updates, later lines grow apart by it; the first has the step before any of them.
        tolerance = 1e-6 if a["step"] == one[0]["step"] else 1e-3
        np.testing.assert_allclose(b["loss"], a["loss"], rtol=tolerance)
        np.testing.assert_allclose(b["mean_depth"], a["mean_depth"], rtol=tolerance)


def test_processes_with_different_configs_say_so(tmp_path: Path) -> None:
    outputs = []
    for process in started(tmp_path / "other", 2, 1):
        outputs.append(process.communicate(timeout=120)[0])
        assert process.returncode != 0
    assert "config.loss.ponder_weight is 0.5 in process 1 and 0.002 in process 0: start all with the same" in outputs[1]
    assert "process 1 has another config than process 0" in outputs[0]


def test_half_an_address_is_refused() -> None:
    with pytest.raises(ValueError, match="--coordinator, --num_processes and --process_id belong together"):
        start_distributed(True, "localhost:1", None, 0)
    with pytest.raises(ValueError, match="--process_id 2 is not one of 0..1"):
        start_distributed(True, "localhost:1", 2, 2)
