"""Scripts of this folder in a process of their own: JAX's number of devices is fixed when it begins."""

import os
from pathlib import Path

from tests.harness.builders import quick_start
from tests.harness.command_server import run_command
from tests.harness.flags import COMPILE_SOONER


def run_on_devices(script: str, count: int | None = 8) -> str:
    """What the script prints where the CPU is `count` devices, or as many as it says; it must end with status 0."""
    devices = f"--xla_force_host_platform_device_count={count} " if count else ""
    own = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": devices + COMPILE_SOONER}
    done = run_command([str(Path(__file__).with_name(script))], environment=os.environ | quick_start() | own)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
