"""The name of the machine, for results."""

import platform
import re
from pathlib import Path

import jax

from avit_jax.runtime.mesh import available_cores


def machine() -> str:
    """What computes, its cores and JAX's version, such as "Intel Xeon Processor, 2 cores, jax 0.10.2"."""
    device = jax.devices()[0]
    kind = processor() if device.platform == "cpu" else f"{len(jax.devices())} x {device.device_kind}"
    return f"{kind}, {available_cores()} cores, jax {jax.__version__}"


def processor() -> str:
    """The CPU's name. On Linux it is in a file, because platform.processor() is empty there."""
    cpuinfo = Path("/proc/cpuinfo")
    named = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.M) if cpuinfo.exists() else None
    return re.sub(r"\((R|TM)\)", "", named[1]).strip() if named else platform.processor() or platform.machine()
