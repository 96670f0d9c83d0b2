"""Devices and shardings. The batch is split over all devices, the training state over the axis `fsdp`."""

import dataclasses
import os
import warnings
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from avit_jax.runtime.settings import Settings, setting

_JAX_CHOOSES = -1  # of jax.config.jax_num_cpu_devices


@dataclasses.dataclass(frozen=True)
class MeshSettings(Settings):
    """config.mesh: how many devices split what. Raises ValueError for numbers that cannot be."""

    section = "mesh"

    data: int = setting(-1, "Groups of devices that split each batch; -1: as many as fsdp leaves.", resume="free")
    fsdp: int = setting(1, "Devices that split the training state as well.", resume="free")

    def __post_init__(self) -> None:
        if self.fsdp < 1 or (self.data < 1 and self.data != -1):
            raise ValueError(
                f"config.mesh is data={self.data}, fsdp={self.fsdp}: give numbers of devices, or data=-1 for the rest"
            )


def available_cores() -> int:
    """CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def use_all_cores(most: int = 8) -> None:
    """Make every CPU core a JAX device (at most `most` devices). Call it once, before anything else runs on JAX.

    A single device leaves cores idle in small operations; with a device for each core, every core works on its own
    images. `compile`, `plan` and their kin use all of these devices if they are given no mesh. Results stay the same.
    Other backends are left alone, and so is a count given in XLA_FLAGS, JAX_NUM_CPU_DEVICES or jax.config. Warns if JAX
    has started already, because its number of devices is fixed then.
    """
    wanted = min(available_cores(), most)
    given = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if given or jax.config.jax_num_cpu_devices != _JAX_CHOOSES:  # type: ignore[attr-defined]
        return
    try:
        jax.config.update("jax_num_cpu_devices", wanted)
    except RuntimeError:  # JAX has started
        if jax.default_backend() == "cpu" and (found := jax.local_device_count()) < wanted:
            warnings.warn(
                f"use_all_cores() comes too late: JAX has already started with {found} CPU device for {wanted} cores; "
                "call it before the first JAX operation of the process (results are the same, only slower)",
                stacklevel=2,
            )


def check_platform() -> None:
    """Raises ValueError if JAX_PLATFORMS names a platform that this machine, or this JAX, does not have.

    JAX itself fails with an assertion, or with an error that suggests no fix. This call starts the backend, so several
    processes have to be joined before it (processes.start_distributed).
    """
    try:
        jax.local_devices()
    except (RuntimeError, AssertionError) as error:
        platforms = os.environ.get("JAX_PLATFORMS") or "the default"
        reason = (str(error).splitlines() or ["it has no device of that kind"])[0][:200].rstrip(".")
        raise ValueError(
            f"JAX cannot use the platform {platforms!r} (JAX_PLATFORMS) here: {reason}; install JAX for it, for "
            "instance pip install 'jax[cuda12]' for an NVIDIA GPU, or set JAX_PLATFORMS=cpu"
        ) from error


def data_mesh(batch_size: int) -> Mesh:
    """A mesh with one axis, `data`, over as many of this process's devices as divide the batch."""
    devices = jax.local_devices()
    count = max(n for n in range(1, len(devices) + 1) if batch_size % n == 0)
    return _over(devices[:count])


def _over(devices: list[jax.Device]) -> Mesh:
    return jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices)


def mesh_or_all_cores(mesh: Mesh | None, batch_size: int) -> Mesh | None:
    """The mesh; or without one, a mesh of this process's CPU devices if there are several, otherwise None.

    CPU devices exist to be used together. There is no device without an image. Raises ValueError for a mesh without an
    axis `data`.
    """
    if mesh is not None and "data" not in mesh.shape:
        raise ValueError(
            f"the mesh has the axes {mesh.axis_names} and images are split over an axis 'data': give one that name"
        )
    if mesh is not None or jax.default_backend() != "cpu":
        return mesh
    devices = jax.local_devices()[:batch_size]
    return None if len(devices) == 1 else _over(devices)


def data_devices(mesh: Mesh | None) -> int:
    """The parts that images are split into: devices along the axis `data`; None: one device."""
    return 1 if mesh is None else mesh.shape["data"]


def training_mesh(settings: MeshSettings, batch_size: int, parts: int = 1) -> Mesh:
    """The mesh of config.mesh: the batch is split over `data` and `fsdp`, the training state over `fsdp`.

    data, fsdp: devices along each axis. data -1 takes all devices that fsdp leaves, or on one machine without
    accelerators, as many of them as divide the batch. batch_size: images of a step, in all processes. parts:
    config.accumulation; each part is split over all devices. Raises ValueError if the product of the axes is not the
    number of devices, or if the devices do not divide a part.
    """
    data, fsdp = settings.data, settings.fsdp
    devices = jax.devices()
    if data == -1 and jax.process_count() == 1 and jax.default_backend() == "cpu":
        fitting = [n for n in range(1, len(devices) // fsdp + 1) if batch_size % (n * fsdp * parts) == 0]
        devices = devices[: fitting[-1] * fsdp] if fitting else devices
    count = len(devices) // fsdp if data == -1 else data
    if count * fsdp != len(devices):
        raise ValueError(
            f"config.mesh is data={data}, fsdp={fsdp} and there are {len(devices)} devices: their product must be "
            "the number of devices; data=-1 takes the rest"
        )
    if batch_size % (slots := len(devices) * parts):
        in_parts = f"in {parts} parts " if parts > 1 else ""
        raise ValueError(
            f"config.batch_size {batch_size} cannot be split {in_parts}over {len(devices)} devices: "
            f"choose {max(1, round(batch_size / slots)) * slots}"
        )
    axes = (AxisType.Auto, AxisType.Auto)
    return jax.make_mesh((count, fsdp), ("data", "fsdp"), axis_types=axes, devices=devices)


def replicated(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """The sharding that puts the same array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding that splits the leading axis over all axes of the mesh."""
    return NamedSharding(mesh, PartitionSpec(mesh.axis_names))


def state_shardings(mesh: Mesh | AbstractMesh, state: Any) -> Any:
    """The sharding of each array of a training state: over `fsdp`, along the longest axis that `fsdp` divides.

    The layer axis of stacked blocks is never split, because it is scanned over. An array without a suitable axis is
    copied to every device.
    """
    parts = mesh.shape["fsdp"]

    def of(path: Any, leaf: Any) -> NamedSharding:
        first = 1 if "blocks" in jax.tree_util.keystr(path) else 0
        axes = [axis for axis in range(first, leaf.ndim) if leaf.shape[axis] % parts == 0]
        if parts == 1 or not axes:
            return replicated(mesh)
        longest = max(axes, key=lambda axis: leaf.shape[axis])
        return NamedSharding(mesh, PartitionSpec(*[None] * longest, "fsdp"))

    return jax.tree_util.tree_map_with_path(of, state)


def global_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """A batch over all processes, from the rows that each process has."""
    sharding = batch_sharding(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()}


def place(tree: Any, shardings: Any) -> Any:
    """`device_put` that also works across processes, where jax.device_put takes neither local nor moved arrays.

    tree: arrays; local ones must be the same in all processes. shardings: one for all arrays, or a tree of them.
    """
    if isinstance(shardings, NamedSharding):
        shardings = jax.tree.map(lambda _: shardings, tree)
    if jax.process_count() == 1:
        return jax.device_put(tree, shardings)

    def one(leaf: Any, sharding: NamedSharding) -> jax.Array:
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            return jax.jit(lambda x: x, out_shardings=sharding)(leaf)
        host = np.asarray(leaf)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return jax.tree.map(one, tree, shardings)
