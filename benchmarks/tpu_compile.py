"""Compile the train step and packed evaluation for real TPU topologies, without chips: memory, collectives, time.

    pip install -r requirements-tpu.txt
    python benchmarks/tpu_compile.py                            everything, about 40 minutes of one core
    python benchmarks/tpu_compile.py --models=tiny --topologies=v5e:2x4 --programs=train,fsdp

libtpu's compiler runs on this machine's CPU; nothing runs on a TPU. Memory is what the compiler reserves on a chip, and
collectives are those of the program. The train step is that of configs/imagenet_avit.py (bfloat16, remat, mixup, EMA),
with its batch of 1024 on one chip (in parts) and on v5e:2x4, and of 4096 on v5e:16x16; "fsdp" splits the state over 4
chips. Packed evaluation has 256 images per chip, or 128 with Base. It is an error if a program does not fit into a v5e
chip's 16 GB, or if anything but gradients, scalars, [L] statistics and (fsdp) parameters crosses chips. Writes
runs/benchmarks/tpu_compile.json, row by row, and keeps the rows of earlier runs with the same compiler.
"""

import argparse
import importlib.metadata
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ.update(
    TPU_SKIP_MDS_QUERY="1",
    TPU_ACCELERATOR_TYPE="v5litepod-8",
    TPU_WORKER_HOSTNAMES="localhost",
    ALLOW_MULTIPLE_LIBTPU_LOAD="1",
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from avit_jax import AViT
from avit_jax.commands.dry_run import IMAGENET_IMAGES
from avit_jax.execution.packed import packed_program
from avit_jax.execution.plan import default_plan
from avit_jax.model.config import AViTConfig, config_from
from avit_jax.model.settings import given_fields
from avit_jax.runtime.files import write_json
from avit_jax.runtime.mesh import batch_sharding, replicated, state_shardings
from avit_jax.train.setup import prepare
from benchmarks.collectives import collectives, said, what_crosses
from configs import imagenet_avit

GLOBAL_BATCH = {"v5e:1x1": 1024, "v5e:2x4": 1024, "v5e:16x16": 4096}
IMAGES_AT_ONCE = {"tiny": 256, "small": 256, "base": 128}  # on a chip; larger batches are processed in parts
FSDP = 4
CHIP_BYTES = 16e9  # of a v5e
OUT = Path("runs/benchmarks/tpu_compile.json")


def topology_mesh(name: str, fsdp: int = 1) -> Mesh:
    """A mesh of all chips of a topology; v5e:1x1 is one chip of the smallest topology."""
    devices = topologies.get_topology_desc(platform="tpu", topology_name=name.replace("1x1", "2x4")).devices
    devices = devices[:1] if name.endswith("1x1") else devices
    return Mesh(np.asarray(devices).reshape(-1, fsdp), ("data", "fsdp"), axis_types=(AxisType.Auto, AxisType.Auto))


def experiment(size: str, topology: str) -> ConfigDict:
    """configs/imagenet_avit.py at a sensible batch size, in parts if there are too many images for a chip."""
    config = imagenet_avit.get_config(size)
    config.batch_size = GLOBAL_BATCH[topology]
    config.accumulation = max(1, config.batch_size // (topology_mesh(topology).size * IMAGES_AT_ONCE[size]))
    return config


def model_of(config: ConfigDict) -> AViTConfig:
    """The architecture of config.model."""
    preset, fields = given_fields(config.model)
    return config_from(preset, **fields)


def compile_train_step(config: ConfigDict, mesh: Mesh) -> Any:
    """The compiled train step of an experiment, built as training builds it."""
    model = model_of(config)
    shapes = nnx.eval_shape(lambda: AViT(model, rngs=nnx.Rngs(0)))
    setup = prepare(config, shapes, mesh, IMAGENET_IMAGES)
    layout = state_shardings(mesh, setup.state)
    state = jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), setup.state, layout
    )
    shape = (config.batch_size, *model.image_shape, model.in_channels)
    batch = {
        "image": jax.ShapeDtypeStruct(shape, jnp.uint8, sharding=batch_sharding(mesh)),
        "label": jax.ShapeDtypeStruct(shape[:1], jnp.int32, sharding=batch_sharding(mesh)),
    }
    return setup.step.lower(state, batch, None).compile()


def compile_packed_evaluation(model_config: AViTConfig, images_a_chip: int, mesh: Mesh) -> Any:
    """The compiled packed program, in which every chip has its own images."""
    data = Mesh(mesh.devices.reshape(-1), ("data",), axis_types=(AxisType.Auto,))
    graphdef, params = nnx.split(nnx.eval_shape(lambda: AViT(model_config, rngs=nnx.Rngs(0))))
    params = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=replicated(data)), params)
    images = jax.ShapeDtypeStruct(
        (images_a_chip * data.size, *model_config.image_shape, model_config.in_channels),
        jnp.float32,
        sharding=NamedSharding(data, PartitionSpec("data")),
    )
    program = packed_program(graphdef, default_plan(model_config, images_a_chip, "tpu"), True, data)
    number = jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated(data))
    return jax.jit(program).lower(params, images, number).compile()


def bytes_needed(compiled: Any) -> int:
    """The bytes that a program reserves on each chip: for arguments, results, work space and code."""
    memory = compiled.memory_analysis()
    needed = memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes
    return needed + memory.output_size_in_bytes - memory.alias_size_in_bytes


def check_crossing(compiled: Any, model_config: AViTConfig, allowed: set[str], fsdp: int) -> dict[str, Any]:
    """What crosses chips in a program. Raises ValueError if that is more than `allowed`."""
    _, params = nnx.split(nnx.eval_shape(lambda: AViT(model_config, rngs=nnx.Rngs(0))), nnx.Param)
    shapes = [(jax.tree_util.keystr(path), leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(params)]
    found = collectives(compiled.as_text())
    crossing = what_crosses(found, shapes, model_config.depth, fsdp)
    if more := crossing.keys() - allowed:
        raise ValueError(f"{', '.join(sorted(more))} crosses chips and should not: {said(crossing)}\n{found}")
    return crossing


def compiled_row(program: str, size: str, topology: str) -> dict[str, Any]:
    """Compile one program and report it. Raises ValueError if it needs too much memory or communication."""
    fsdp = FSDP if program == "fsdp" else 1
    mesh = topology_mesh(topology, fsdp)
    began = time.perf_counter()
    if program == "packed":
        model = config_from(f"avit_{size}_patch16_224", dtype="bfloat16")
        images, parts, allowed = IMAGES_AT_ONCE[size], 1, set[str]()
        compiled = compile_packed_evaluation(model, images, mesh)
    else:
        config = experiment(size, topology)
        model, images, parts = model_of(config), config.batch_size // mesh.size, config.accumulation
        allowed = {"gradients", "scalars", "statistics"} | ({"parameters"} if fsdp > 1 else set())
        compiled = compile_train_step(config, mesh)
    seconds = time.perf_counter() - began
    row = {"program": program, "model": size, "topology": topology, "images_a_chip": images, "parts": parts}
    needed = bytes_needed(compiled)
    if needed > CHIP_BYTES:
        raise ValueError(f"{row} needs {needed / 1e9:.1f} GB per chip, but there are only {CHIP_BYTES / 1e9:.0f}")
    crossing = check_crossing(compiled, model, allowed, fsdp)
    print(
        f"{program:8}{size:7}{topology:11}{images:6}{parts:6}{needed / 1e9:9.2f}{seconds:8.0f}   {said(crossing)}",
        flush=True,
    )
    return row | {"gigabytes": needed / 1e9, "compile_seconds": seconds, "crossing": crossing}


def main() -> None:
    """Compile, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def several(text: str) -> list[str]:
        return text.split(",")

    parser.add_argument("--models", default=list(IMAGES_AT_ONCE), type=several)
    parser.add_argument("--topologies", default=list(GLOBAL_BATCH), type=several)
    parser.add_argument("--programs", default=["train", "fsdp", "packed"], type=several)
    options = parser.parse_args()
    versions = {name: importlib.metadata.version(name) for name in ("jax", "libtpu")}
    earlier = json.loads(OUT.read_text()) if OUT.is_file() else {}
    rows = earlier.get("rows", []) if earlier.get("versions") == versions else []
    OUT.parent.mkdir(parents=True, exist_ok=True)
    print("program model  topology   images parts GB a chip seconds   what crosses chips in a step")
    for size in options.models:
        for topology in options.topologies:
            for program in options.programs:
                if program == "fsdp" and topology.endswith("1x1"):
                    continue
                row = compiled_row(program, size, topology)
                named = ("program", "model", "topology")
                rows = [other for other in rows if any(other[name] != row[name] for name in named)] + [row]
                write_json(OUT, {"versions": versions, "rows": rows})
    print(f"written: {OUT}")


if __name__ == "__main__":
    main()
