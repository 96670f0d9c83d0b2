"""The memory that is free for a run."""

from pathlib import Path
from typing import Any

from jax.sharding import Mesh

# The folder and files that give a container's memory limit and use, in Linux's control groups 2 and 1.
_GROUPS = (
    (Path("/sys/fs/cgroup"), "memory.max", "memory.current"),
    (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.usage_in_bytes"),
)


def device_memory(mesh: Mesh) -> int | None:
    """Free bytes for each device of this process; None if unknown. The devices of a CPU share the machine's memory."""
    devices = mesh.local_devices
    if devices[0].platform == "cpu":
        free = host_memory()
        return None if free is None else free // len(devices)
    stats = devices[0].memory_stats() or {}
    limit = stats.get("bytes_limit")
    return None if limit is None else limit - stats.get("bytes_in_use", 0)


def host_memory() -> int | None:
    """Free bytes of this machine or container; None if the system does not say."""
    found = []
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        found.append(int(lines["MemAvailable"].split()[0]) * 1024)
    except (OSError, KeyError, ValueError, IndexError):
        pass
    for folder, limit, used in _GROUPS:
        try:
            # The use includes cached files, whose memory is freed when it is needed.
            taken = int((folder / used).read_text()) - _cached_files(folder / "memory.stat")
            found.append(int((folder / limit).read_text()) - taken)
        except (OSError, ValueError):  # not there, or "max"
            continue
    return max(min(found), 0) if found else None


def _cached_files(path: Path) -> int:
    """Bytes of cached files in a control group's memory.stat; 0 if it does not say."""
    try:
        counts = dict(line.split() for line in path.read_text().splitlines())
        return int(counts["active_file"]) + int(counts["inactive_file"])
    except (OSError, KeyError, ValueError):
        return 0


def program_memory(program: Any) -> int:
    """Bytes that a compiled program needs: its arguments, its outputs, and what it keeps in between."""
    found = program.memory_analysis()
    return int(found.argument_size_in_bytes + found.output_size_in_bytes + found.temp_size_in_bytes)
