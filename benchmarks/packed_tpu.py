"""Compile packed execution for a TPU v5e without the chip, and report how a block's cost falls with its capacity.

    pip install -r requirements-tpu.txt
    python benchmarks/packed_tpu.py --preset=avit_tiny_patch16_224 --batch=256

libtpu's own compiler runs on this machine's CPU. The costs are its estimates for one chip, not measurements. Writes
runs/benchmarks/packed_tpu.json.
"""

import argparse
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
from flax import nnx
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from avit_jax.execution.packed import packed_program
from avit_jax.execution.plan import capacities_every, default_plan
from avit_jax.model.presets import config_from
from avit_jax.model.vit import model_of_shapes
from benchmarks.results import save_results


def main() -> None:
    """Compile, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="avit_tiny_patch16_224")
    parser.add_argument("--batch", type=int, default=256)
    options = parser.parse_args()
    config = config_from(options.preset, dtype="bfloat16")
    chip = SingleDeviceSharding(topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4").devices[0])
    plan = default_plan(config, options.batch, "tpu")
    graphdef, params = nnx.split(model_of_shapes(config))

    def on_chip(tree: Any) -> Any:
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=chip), tree)

    images = jax.ShapeDtypeStruct((options.batch, *config.image_shape, config.in_channels), jnp.float32)
    count = jax.ShapeDtypeStruct((), jnp.int32)
    result: dict[str, Any] = {"preset": options.preset, "batch": options.batch, "plan": str(plan), "blocks": []}
    blocks, stacked = nnx.split(nnx.merge(graphdef, params).blocks)
    first = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape[1:], p.dtype), stacked)
    for capacity in capacities_every(16, config):
        x = jax.ShapeDtypeStruct((plan.group_size, capacity, config.embed_dim), jnp.float32)
        run = jax.jit(lambda params, x: nnx.merge(blocks, params)(x, jnp.ones(x.shape[:2], bool)))
        cost: Any = run.lower(on_chip(first), on_chip(x)).compile().cost_analysis()
        row = {
            "capacity": capacity,
            "optimal_seconds": cost.get("optimal_seconds"),
            "flops": cost["flops"],
            "bytes": cost["bytes accessed"],
        }
        result["blocks"].append(row)
        print(row, flush=True)
    for name, program in (
        ("dense", lambda params, images, count: nnx.merge(graphdef, params)(images).logits),
        ("packed", packed_program(graphdef, plan, True, None)),
    ):
        began = time.perf_counter()
        compiled = jax.jit(program).lower(on_chip(params), on_chip(images), on_chip(count)).compile()
        memory: Any = compiled.memory_analysis()
        megabytes = (memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes) / 1e6
        result[name] = {"compile_seconds": time.perf_counter() - began, "megabytes": megabytes}
        print(name, result[name], flush=True)
    save_results(Path("runs/benchmarks/packed_tpu.json"), result)


if __name__ == "__main__":
    main()
