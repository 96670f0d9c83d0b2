"""Images per second of each way to run a model, in turn on one batch; and what they were measured on."""

import platform
import shlex
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from avit_jax.data.pipeline import evaluation_images
from avit_jax.data.sources import Images
from avit_jax.evaluation import images_per_second, masked_program
from avit_jax.mesh import available_cores, data_mesh
from avit_jax.model import AViT
from avit_jax.packed import compile_packed
from avit_jax.preprocessing import normalize

ROUNDS = 7


def measure_speeds(
    variants: dict[str, tuple[AViT, str]], split: Images, indices: Int[np.ndarray, " n"], batch_size: int
) -> dict[str, Any]:
    """images/s of each (model, "masked" or "packed") on one batch, spread evenly over `indices` of the data.

    Evenly, because data may be sorted by class, and classes differ in depth.
    Medians of 7 warm runs, the variants in turn; arrays on the devices, outputs awaited.
    """
    count = min(batch_size, len(indices))
    chosen = indices[np.linspace(0, len(indices) - 1, count).round().astype(int)]
    mesh = data_mesh(count)
    first = next(iter(variants.values()))[0]
    images = normalize(evaluation_images(split, chosen, first.config), first.config)
    packed = {
        name: compile_packed(model, count, mesh=mesh)
        for name, (model, execution) in variants.items()
        if execution == "packed"
    }
    programs = [packed.get(name) or masked_program(model, mesh) for name, (model, _) in variants.items()]
    measured = images_per_second(programs, images, mesh, ROUNDS)
    return {
        "batch_size": count,
        "rounds": ROUNDS,
        "devices": int(mesh.size),
        "plan": str(next(iter(packed.values())).plan) if packed else None,
        "images_per_second": dict(zip(variants, measured, strict=True)),
    }


def environment() -> dict[str, Any]:
    """The machine, the versions, and the command."""
    devices = jax.devices()
    names = ("jax", "jaxlib", "flax", "numpy")
    return {
        "processor": _processor(),
        "cores": available_cores(),
        "devices": f"{len(devices)} x {devices[0].device_kind}",
        "backend": jax.default_backend(),
        "system": platform.platform(terse=True),
        "versions": {"python": platform.python_version()} | {name: metadata.version(name) for name in names},
        "command": shlex.join(["python", *sys.argv]),
    }


def _processor() -> str:
    """The CPU's name; Linux tells it in a file, and platform.processor() there is empty."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()
