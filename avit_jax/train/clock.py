"""Where a training step's time goes (data, device, checkpoints); images/s, MFU, memory, and profiler traces."""

import contextlib
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax
from jax.sharding import Mesh

from avit_jax.execution.work import whole_gmacs
from avit_jax.model.config import AViTConfig
from avit_jax.train.settings import parse_profile

# The figures of a log line that differ from run to run.
TIMES = ("images_per_second", "data_wait", "device_wait", "checkpoint_wait", "memory_gigabytes", "mfu")
WAITS = ("data", "device", "checkpoint")


class StepClock:
    """Measures times between two log lines; with config.profile "START:STEPS" it traces those steps into profile/.

    The folder profile/ is in workdir. A trace that is still open is written by `close`. peak_tflops: of a device, 10^12
    operations/s; 0: no MFU.
    """

    def __init__(
        self,
        model_config: AViTConfig,
        mesh: Mesh,
        workdir: Path,
        *,
        batch_size: int,
        profile: str = "",
        peak_tflops: float = 0.0,
    ) -> None:
        self._batch_size = batch_size
        self._first, self._steps = parse_profile(profile)
        self._trace_folder, self._tracing, self._traced = workdir / "profile", False, False
        self._ran = (0, 0)  # the first and the last step that began here
        # Dense multiply-adds, 2 flops each; the backward pass costs twice the forward one. Remat is not counted.
        self._step_flops = 3 * 2e9 * whole_gmacs(model_config) * batch_size
        self._peak_flops = peak_tflops * 1e12 * mesh.size
        self.start(0)

    def start(self, step: int) -> None:
        """Start the time of a new log line after this step."""
        self._began, self._from = time.perf_counter(), step
        self._waited = dict.fromkeys(WAITS, 0.0)
        self._aside = 0.0

    @contextlib.contextmanager
    def waiting_for(self, what: str) -> Iterator[None]:
        """Count this time as waiting for data, device or checkpoint."""
        began = time.perf_counter()
        yield
        self._waited[what] += time.perf_counter() - began

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Leave this time out."""
        began = time.perf_counter()
        yield
        self._aside += time.perf_counter() - began

    def figures(self, step: int) -> dict[str, float]:
        """images/s without evaluation and checkpoints; waits as fractions of the time without evaluation."""
        elapsed = time.perf_counter() - self._began - self._aside
        training = elapsed - self._waited["checkpoint"]
        found = {"images_per_second": (step - self._from) * self._batch_size / training}
        found |= {f"{what}_wait": waited / elapsed for what, waited in self._waited.items()}
        found["memory_gigabytes"] = peak_memory() / 1e9
        if self._peak_flops:
            found["mfu"] = (step - self._from) * self._step_flops / training / self._peak_flops
        return found

    def trace(self, step: int) -> None:
        """Start or end the trace; called before each step. A run that resumes in the middle of the trace has none."""
        if self._steps and step == self._first and not self._tracing:
            # Python's tracer hooks every thread, and it crashed when other threads wrote a checkpoint.
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0
            jax.profiler.start_trace(str(self._trace_folder), create_perfetto_trace=True, profiler_options=options)
            self._tracing = self._traced = True
        if self._tracing and step == self._first + self._steps:
            self._write()
        self._ran = self._ran[0] or step, step

    def close(self) -> None:
        """Write a trace that the run's last step left open, or say that there is none."""
        if self._tracing:
            self._write()
        elif self._steps and not self._traced:
            ran = f"ran steps {self._ran[0]} to {self._ran[1]}" if self._ran[0] else "ran no step"
            wanted = f"config.profile begins at step {self._first}"
            print(f"nothing was profiled: {wanted} and this process {ran}", file=sys.stderr)

    def _write(self) -> None:
        jax.profiler.stop_trace()
        self._tracing = False
        print(f"trace of steps {self._first} to {self._ran[1]}: {self._trace_folder}", file=sys.stderr)


def peak_memory() -> int:
    """Peak memory of the fullest device, in bytes; on a CPU, which does not report it, that of this process."""
    found = [stats["peak_bytes_in_use"] for device in jax.local_devices() if (stats := device.memory_stats())]
    return max(found) if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
