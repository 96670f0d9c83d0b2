"""Several processes as one run: joining them, ending together, and checking that they have the same settings."""

import ctypes
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from avit_jax.runtime.jax_private import coordinator_address, on_tpu_pod

HEARTBEAT_SECONDS = 30  # until a process that no longer answers counts as lost; JAX's default is 100
LEAVING_SECONDS = 10.0  # how long a process with an error waits for the others to end with theirs
LOST = (
    "another process of this run has ended or no longer answers: see its own messages, then start all processes again "
    "with the same command; the run goes on from its last checkpoint"
)


def start_distributed(
    requested: bool, coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> None:
    """Join the other processes, on request or if SLURM or a TPU pod started several.

    requested: join in any case. coordinator (HOST:PORT of process 0), num_processes, process_id: needed only if the
    cluster does not provide them. Call this before anything else runs on JAX. Raises ValueError, with the address, if
    the coordinator does not answer.
    """
    if not (requested or _started_among_several()):
        return
    given = (coordinator, num_processes, process_id)
    if any(value is not None for value in given) and None in given:
        raise ValueError("--coordinator, --num_processes and --process_id belong together: give all three or none")
    if process_id is not None and num_processes is not None and not 0 <= process_id < num_processes:
        raise ValueError(f"--process_id {process_id} is not one of 0..{num_processes - 1}")
    timeout = int(os.environ.get("AVIT_COORDINATOR_TIMEOUT", "120"))
    if coordinator is not None and process_id:
        _await_coordinator(coordinator, timeout)
    _at_abort(
        lambda: (
            f"the coordinator {coordinator_address()} does not answer, or not all processes "
            f"have joined it, within {timeout} s (AVIT_COORDINATOR_TIMEOUT): check that process 0 runs there, that the "
            "port is open and that all processes are started"
        )
    )
    try:
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            initialization_timeout=timeout,
            heartbeat_timeout_seconds=int(os.environ.get("AVIT_HEARTBEAT_TIMEOUT", HEARTBEAT_SECONDS)),
        )
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0][:200].rstrip(".")
        if coordinator is None:
            reason += "; give --coordinator=HOST:PORT, --num_processes and --process_id"
        raise ValueError(f"the processes of this run did not find each other: {reason}") from error
    _at_abort(lambda: LOST)


def _await_coordinator(address: str, timeout: int) -> None:
    """Raises ValueError, with the address, if nobody answers there in time; JAX's runtime would call abort()."""
    host, _, port = address.rpartition(":")
    if not (host and port.isdigit()):
        raise ValueError(f"--coordinator {address!r} is not HOST:PORT: give process 0's, as host0:1234")
    until = time.monotonic() + timeout
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=max(1, timeout)).close()
            return
        except OSError as error:
            if time.monotonic() > until:
                raise ValueError(
                    f"the coordinator {address} does not answer within {timeout} s (AVIT_COORDINATOR_TIMEOUT): check "
                    f"that process 0 runs there and that the port is open ({error.strerror or error})"
                ) from error
        time.sleep(0.2)


def _started_among_several() -> bool:
    """Whether SLURM's srun or a TPU pod started this process as one of several."""
    if int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:  # of this step: a large allocation may run one process
        return True
    return on_tpu_pod()


_HANDLER = ctypes.CFUNCTYPE(None, ctypes.c_int)
_abort_handler: Any = None  # kept here, because the system holds no reference to it


def _at_abort(sentence: Callable[[], str]) -> None:
    """End with this sentence and status 1 when JAX's runtime calls abort().

    The runtime calls it when the coordinator or another process is gone. A handler of Python's own signal module would
    run only after abort() returns, which it never does.
    """

    def ended(_: int) -> None:
        os.write(2, f"error: {sentence()}\n".encode())
        os._exit(1)

    global _abort_handler
    _abort_handler = _HANDLER(ended)
    ctypes.CDLL(None).signal(int(signal.SIGABRT), _abort_handler)


def lost_a_process(error: BaseException) -> bool:
    """Whether an error of JAX's runtime shows that another process in a collective is gone."""
    signs = ("gloo", "nccl", "rccl", "coordination", "connection", "heartbeat", "barrier", "unavailable")
    return (
        jax.distributed.is_initialized()
        and isinstance(error, jax.errors.JaxRuntimeError)
        and any(sign in str(error).lower() for sign in signs)
    )


def leave(lost: bool) -> None:
    """End this process, one of several, with status 1; otherwise all would wait for each other for minutes.

    lost: whether another process is already gone. If not, the others get a moment to end with the same error.
    """
    if not lost:
        ending = threading.Thread(target=jax.distributed.shutdown, daemon=True)
        ending.start()
        ending.join(LEAVING_SECONDS)
    end_now()


def end_now() -> None:
    """End this process with status 1 at once, without waiting for anything."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


def check_same(settings: dict[str, Any]) -> None:
    """Raises ValueError, naming the key, if this process's settings are not those of process 0."""
    if jax.process_count() == 1:
        return
    own = np.frombuffer(json.dumps(settings).encode(), np.uint8)
    length = int(multihost_utils.broadcast_one_to_all(np.asarray(len(own))))
    padded = np.zeros(length, np.uint8)
    padded[: min(length, len(own))] = own[:length]
    first = json.loads(np.asarray(multihost_utils.broadcast_one_to_all(padded)).tobytes())
    differing = [name for name in sorted(first.keys() | settings.keys()) if first.get(name) != settings.get(name)]
    # All processes learn of a difference, so that none waits for one that has ended.
    found = multihost_utils.process_allgather(np.asarray(len(differing)))
    if differing:
        name = differing[0]
        raise ValueError(
            f"config.{name} is {settings.get(name)!r} in process {jax.process_index()} and {first.get(name)!r} in "
            "process 0: start all processes with the same command"
        )
    if found.any():
        raise ValueError(f"process {int(np.flatnonzero(found)[0])} has another config than process 0: see its message")


def in_any_process(flag: bool) -> bool:
    """Whether `flag` is True in any process. All processes must call this, and wait for each other here."""
    return flag if jax.process_count() == 1 else bool(multihost_utils.process_allgather(np.asarray(flag)).any())


def gathered(values: np.ndarray) -> np.ndarray:
    """The rows of all processes, in the order of the processes. Their numbers of rows may differ."""
    if jax.process_count() == 1:
        return values
    counts = multihost_utils.process_allgather(np.asarray(len(values)))
    padded = np.zeros((int(counts.max()), *values.shape[1:]), values.dtype)
    padded[: len(values)] = values
    everyone = multihost_utils.process_allgather(padded)
    return np.concatenate([rows[:count] for rows, count in zip(everyone, counts, strict=True)])
