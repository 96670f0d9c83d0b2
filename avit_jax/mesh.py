"""Devices and shardings: the batch is split over `data`, the training state is on every device."""

import os

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


def available_cores() -> int:
    """CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def use_all_cores(most: int = 8) -> None:
    """Make every CPU core a JAX device (at most `most`); call it before anything else runs on JAX.

    One device leaves cores idle in the small operations: two devices on two cores make a training step a fifth faster.
    Other backends, and a count given in XLA_FLAGS or JAX_NUM_CPU_DEVICES, are not touched.
    """
    given = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if not given and "JAX_NUM_CPU_DEVICES" not in os.environ:
        jax.config.update("jax_num_cpu_devices", min(available_cores(), most))


def data_mesh(batch_size: int) -> Mesh:
    """A mesh with one axis, `data`, over as many devices as divide the batch."""
    devices = jax.devices()
    count = max(n for n in range(1, len(devices) + 1) if batch_size % n == 0)
    return jax.make_mesh((count,), ("data",), axis_types=(AxisType.Auto,), devices=devices[:count])


def replicated(mesh: Mesh) -> NamedSharding:
    """The same array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The leading axis split over `data`."""
    return NamedSharding(mesh, PartitionSpec("data"))
