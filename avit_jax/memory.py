"""How much memory there is for a run."""

from pathlib import Path

from jax.sharding import Mesh

# The limit and the use of a container's memory, by the two versions of Linux's control groups.
_GROUPS = (
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (
        Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
        Path("/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ),
)


def device_memory(mesh: Mesh) -> int | None:
    """Bytes that are free for each device of this process; the cores of a CPU share the machine's. None: not known."""
    devices = mesh.local_devices
    if devices[0].platform == "cpu":
        free = host_memory()
        return None if free is None else free // len(devices)
    stats = devices[0].memory_stats() or {}
    limit = stats.get("bytes_limit")
    return None if limit is None else limit - stats.get("bytes_in_use", 0)


def host_memory() -> int | None:
    """Bytes that this machine, or this container, has free; None where the system does not say."""
    found = []
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        found.append(int(lines["MemAvailable"].split()[0]) * 1024)
    except (OSError, KeyError, ValueError, IndexError):
        pass
    for limit, used in _GROUPS:
        try:
            found.append(int(limit.read_text()) - int(used.read_text()))
        except (OSError, ValueError):  # not there, or "max"
            continue
    return max(min(found), 0) if found else None
