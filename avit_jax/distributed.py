"""Several processes as one run: starting them, seeing that they mean the same, adding up what each has found."""

import json
import os
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

HEARTBEAT_SECONDS = 30  # after which a process that ended without a word is given up; JAX's default is 100


def start_distributed(
    requested: bool, coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> None:
    """Join the other processes: on request, and by itself where SLURM or a TPU pod started several.

    coordinator (host:port of process 0), num_processes and process_id where nothing tells them by itself. Call it
    before anything else runs on JAX. Raises ValueError, with the address, where the coordinator does not answer.
    """
    several = int(os.environ.get("SLURM_NTASKS", "1")) > 1 or "," in os.environ.get("TPU_WORKER_HOSTNAMES", "")
    if not (requested or several):
        return
    given = (coordinator, num_processes, process_id)
    if any(value is not None for value in given) and None in given:
        raise ValueError("--coordinator, --num_processes and --process_id belong together: give all three or none")
    if process_id is not None and num_processes is not None and not 0 <= process_id < num_processes:
        raise ValueError(f"--process_id {process_id} is not one of 0..{num_processes - 1}")
    timeout = int(os.environ.get("AVIT_COORDINATOR_TIMEOUT", "120"))
    try:
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            initialization_timeout=timeout,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        )
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0][:200]
        if coordinator is None:
            raise ValueError(
                f"nothing here tells which processes belong together ({reason}): give --coordinator=HOST:PORT, "
                "--num_processes and --process_id"
            ) from error
        raise ValueError(
            f"the coordinator {coordinator} does not answer within {timeout} s (AVIT_COORDINATOR_TIMEOUT): see that "
            f"process 0 runs there and that the port is open ({reason})"
        ) from error


def check_same(settings: dict[str, Any]) -> None:
    """Raises ValueError, naming the key, where this process's settings are not those of process 0."""
    if jax.process_count() == 1:
        return
    own = np.frombuffer(json.dumps(settings).encode(), np.uint8)
    length = int(multihost_utils.broadcast_one_to_all(np.asarray(len(own))))
    padded = np.zeros(length, np.uint8)
    padded[: min(length, len(own))] = own[:length]
    first = json.loads(np.asarray(multihost_utils.broadcast_one_to_all(padded)).tobytes())
    differing = [name for name in sorted(first.keys() | settings.keys()) if first.get(name) != settings.get(name)]
    # All learn of it, so that none waits for one that has gone.
    found = multihost_utils.process_allgather(np.asarray(len(differing)))
    if differing:
        name = differing[0]
        raise ValueError(
            f"config.{name} is {settings.get(name)!r} in process {jax.process_index()} and {first.get(name)!r} in "
            "process 0: start all with the same command"
        )
    if found.any():
        raise ValueError(f"process {int(np.flatnonzero(found)[0])} has another config than process 0: see its message")


def gathered(values: np.ndarray) -> np.ndarray:
    """Every process's rows, one process's after the other's; their numbers of rows may differ."""
    if jax.process_count() == 1:
        return values
    counts = multihost_utils.process_allgather(np.asarray(len(values)))
    padded = np.zeros((int(counts.max()), *values.shape[1:]), values.dtype)
    padded[: len(values)] = values
    everyone = multihost_utils.process_allgather(padded)
    return np.concatenate([rows[:count] for rows, count in zip(everyone, counts, strict=True)])
