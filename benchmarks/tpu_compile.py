"""The train step and packed evaluation, compiled for real TPU topologies without the chips: memory, collectives, time.

    pip install -r requirements-tpu.txt
    JAX_PLATFORMS=cpu python benchmarks/tpu_compile.py --models=tiny,small,base --topologies=v5e:1x1,v5e:2x4,v5e:16x16

libtpu's compiler runs here, on the CPU: memory is what it reserves for a device; nothing is measured on a TPU. Writes
runs/benchmarks/tpu_compile.json.
"""

import argparse
import json
import os
import re
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

os.environ.update(TPU_SKIP_MDS_QUERY="1", TPU_ACCELERATOR_TYPE="v5litepod-8", TPU_WORKER_HOSTNAMES="localhost")
sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from avit_jax import AViT
from avit_jax.config import AViTConfig, config_from
from avit_jax.mesh import batch_sharding, replicated, state_shardings
from avit_jax.optim import learning_rate_schedule, make_optimizer
from avit_jax.packed import packed_program
from avit_jax.plan import default_plan
from avit_jax.train_step import TrainState, build_train_step
from configs import imagenet_avit

IMAGES_A_CHIP = {"tiny": 256, "small": 256, "base": 128}
CHIP_BYTES = 16 * 2**30
BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4}
COLLECTIVE = re.compile(r"= (.*?) (all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all)(?:-start)?\(")


def topology_mesh(name: str, fsdp: int = 1) -> Mesh:
    """All chips of a topology; v5e:1x1 is one chip of the smallest that there is."""
    devices = topologies.get_topology_desc(platform="tpu", topology_name=name.replace("1x1", "2x4")).devices
    devices = devices[:1] if name.endswith("1x1") else devices
    return Mesh(np.asarray(devices).reshape(-1, fsdp), ("data", "fsdp"), axis_types=(AxisType.Auto, AxisType.Auto))


def abstract_arguments(
    config: ConfigDict, model: AViTConfig, mesh: Mesh
) -> tuple[nnx.GraphDef, Any, TrainState, dict[str, jax.ShapeDtypeStruct]]:
    """The graph, the optimiser, and shapes with their layouts of the state and the batch."""
    graphdef, params = nnx.split(nnx.eval_shape(lambda: AViT(model, rngs=nnx.Rngs(0))), nnx.Param)
    steps = 100_000
    schedule = learning_rate_schedule(config.optim, steps, epochs=config.epochs, batch_size=config.batch_size)
    optimizer = make_optimizer(config.optim, schedule)
    state = jax.eval_shape(
        lambda params: TrainState(jnp.zeros((), jnp.int32), params, params, optimizer.init(params)), params
    )

    def placed(leaf: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    state = jax.tree.map(placed, state, state_shardings(mesh, state))
    shape = (config.batch_size, *model.image_shape, model.in_channels)
    batch = {
        "image": jax.ShapeDtypeStruct(shape, jnp.uint8, sharding=batch_sharding(mesh)),
        "label": jax.ShapeDtypeStruct(shape[:1], jnp.int32, sharding=batch_sharding(mesh)),
    }
    return graphdef, optimizer, state, batch


def compile_train_step(size: str, topology: str, fsdp: int = 1) -> Any:
    """The compiled train step of configs/imagenet_avit.py at a sensible batch."""
    mesh = topology_mesh(topology, fsdp)
    config = imagenet_avit.get_config(size)
    config.batch_size = IMAGES_A_CHIP[size] * mesh.size
    fields = dict(config.model)
    model = config_from(fields.pop("preset"), **fields)
    graphdef, optimizer, state, batch = abstract_arguments(config, model, mesh)
    step = jax.jit(
        build_train_step(graphdef, optimizer, config, mesh, None),
        donate_argnums=0,
        in_shardings=(state_shardings(mesh, state), batch_sharding(mesh), None),
        out_shardings=(state_shardings(mesh, state), replicated(mesh)),
    )
    return step.lower(state, batch, None).compile()


def compile_packed_evaluation(size: str, topology: str) -> Any:
    """The compiled packed program of an A-ViT at the same batch."""
    mesh = topology_mesh(topology)
    data = Mesh(mesh.devices.reshape(-1), ("data",), axis_types=(AxisType.Auto,))
    model = config_from(f"avit_{size}_patch16_224", dtype="bfloat16")
    graphdef, params = nnx.split(nnx.eval_shape(lambda: AViT(model, rngs=nnx.Rngs(0))))
    params = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=replicated(data)), params)
    count = IMAGES_A_CHIP[size] * data.size
    images = jax.ShapeDtypeStruct(
        (count, *model.image_shape, 3), jnp.float32, sharding=NamedSharding(data, PartitionSpec("data"))
    )
    program = packed_program(graphdef, default_plan(model, IMAGES_A_CHIP[size], "tpu"), True, data)
    number = jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated(data))
    return jax.jit(program).lower(params, images, number).compile()


def collectives(text: str, layers: int) -> dict[str, dict[str, int]]:
    """Each kind of collective in a step: how many run, and the bytes of their results on a device.

    What stands outside the entry computation is in the loop over layers, and counted once for each.
    """
    count: Counter[str] = Counter()
    size: Counter[str] = Counter()
    times = 1
    for line in text.splitlines():
        if line.endswith("{") and not line.startswith(" "):
            times = 1 if line.startswith("ENTRY") else layers
        for shapes, kind in COLLECTIVE.findall(line):
            count[kind] += times
            for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", shapes):
                one = BYTES.get(dtype, 0) * int(np.prod([int(d) for d in dims.split(",") if d], dtype=np.int64))
                size[kind] += times * one
    return {kind: {"count": count[kind], "bytes": size[kind]} for kind in count}


def row(name: str, size: str, topology: str, compiled: Any, seconds: float) -> dict[str, Any]:
    """What is reported of a program, printed."""
    memory = compiled.memory_analysis()
    needed = memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes
    needed += memory.output_size_in_bytes - memory.alias_size_in_bytes
    found = collectives(compiled.as_text(), layers=12)
    result = {
        "program": name,
        "model": size,
        "topology": topology,
        "images_a_chip": IMAGES_A_CHIP[size],
        "gigabytes": needed / 1e9,
        "fits": needed <= CHIP_BYTES,
        "compile_seconds": seconds,
        "collectives": found,
    }
    said = ", ".join(f"{v['count']} {kind} {v['bytes'] / 1e6:.2f} MB" for kind, v in found.items()) or "none"
    print(
        f"{name:20}{size:6}{topology:11}{IMAGES_A_CHIP[size]:6} images a chip{needed / 1e9:7.2f} GB"
        f"{'' if result['fits'] else ' DOES NOT FIT'}{seconds:7.0f} s   {said}",
        flush=True,
    )
    return result


def main() -> None:
    """Print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="tiny,small,base", type=lambda text: text.split(","))
    parser.add_argument("--topologies", default="v5e:1x1,v5e:2x4,v5e:16x16", type=lambda text: text.split(","))
    parser.add_argument("--no-packed", action="store_true")
    parser.add_argument(
        "--fsdp", type=int, default=0, help="one more compile of the step, the state split so many ways"
    )
    options = parser.parse_args()
    rows = []
    for size in options.models:
        for topology in options.topologies:
            programs: dict[str, Any] = {"train step": lambda: compile_train_step(size, topology)}  # noqa: B023
            if options.fsdp and not topology.endswith("1x1"):
                programs[f"train step, fsdp {options.fsdp}"] = lambda: compile_train_step(size, topology, options.fsdp)  # noqa: B023
            if not options.no_packed:
                programs["packed evaluation"] = lambda: compile_packed_evaluation(size, topology)  # noqa: B023
            for name, build in programs.items():
                began = time.perf_counter()
                compiled = build()
                rows.append(row(name, size, topology, compiled, time.perf_counter() - began))
    out = Path("runs/benchmarks/tpu_compile.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"jax": jax.__version__, "rows": rows}, indent=2) + "\n")
    print(f"written: {out}")


if __name__ == "__main__":
    main()
