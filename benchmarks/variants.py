"""Programs that benchmarks compare on the same images, and how they are timed in turn."""

import dataclasses
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

import avit_jax
from avit_jax import AViT, compile_packed, compile_planned
from avit_jax.execution.plan import plan_packed
from avit_jax.model.layers import Block
from avit_jax.runtime.mesh import batch_sharding, replicated


@dataclasses.dataclass
class Variant:
    """A program for one batch size; `run` returns when the outputs are ready."""

    name: str
    batch: int
    run: Callable[[], Any]
    compile_seconds: float = 0.0
    memory: int = 0  # bytes: arguments, outputs and temporaries
    seconds: list[float] = dataclasses.field(default_factory=list)

    @property
    def images_per_second(self) -> float:
        """The images per second of the median run."""
        return self.batch / statistics.median(self.seconds)


def compiled_variant(name: str, model: AViT, images: np.ndarray, mesh: Mesh, last_layer: bool) -> Variant:
    """Masked execution (dense without a gate); with last_layer, that layer computes only what the logits read."""
    graphdef, params = nnx.split(model)

    def forward(params: Any, images: jax.Array) -> jax.Array:
        model = nnx.merge(graphdef, params)
        if not last_layer:
            return model(images).logits
        blocks, stacked = nnx.split(model.blocks)

        def block_at(layer: Any) -> Block:
            return nnx.merge(blocks, jax.tree.map(lambda p: p[layer], stacked))

        layers = jnp.arange(model.config.depth - 1)
        x, _ = jax.lax.scan(lambda x, layer: (block_at(layer)(x), None), model.embed(images), layers)
        last = block_at(model.config.depth - 1)
        special = last.read(x, jnp.ones(x.shape[:2], bool), 1)
        return model.head_logits(special).mean(0)

    placed = jax.device_put(params, replicated(mesh)), jax.device_put(images, batch_sharding(mesh))
    began = time.perf_counter()
    program = jax.jit(forward).lower(*placed).compile()
    took = time.perf_counter() - began
    return Variant(name, len(images), lambda: jax.block_until_ready(program(*placed)), took, program_memory(program))


def packed_variant(name: str, model: AViT, images: np.ndarray, mesh: Mesh, sample: np.ndarray | None = None) -> Variant:
    """Packed execution with image exit and the default plan, or the one that plan_packed makes from a sample."""
    plan = None if sample is None else plan_packed(model, sample, len(images), mesh=mesh)
    began = time.perf_counter()
    packed = compile_packed(model, len(images), plan, mesh=mesh)
    took = time.perf_counter() - began
    placed = jax.device_put(images, batch_sharding(mesh))
    return Variant(
        name, len(images), lambda: jax.block_until_ready(packed(placed)), took, program_memory(packed.compiled)
    )


def planned_variant(name: str, model: AViT, images: np.ndarray, mesh: Mesh, sample: np.ndarray) -> Variant:
    """Planned execution with image exit and the plan that avit_jax.plan makes from a sample."""
    plan = avit_jax.plan(model, sample, len(images), mesh=mesh)
    began = time.perf_counter()
    planned = compile_planned(model, len(images), plan, mesh=mesh)
    took = time.perf_counter() - began
    placed = jax.device_put(images, batch_sharding(mesh))
    memory = program_memory(planned.compiled)
    return Variant(name, len(images), lambda: jax.block_until_ready(planned(placed)), took, memory)


def program_memory(program: Any) -> int:
    """Bytes of a compiled program's arguments, outputs and temporaries."""
    found = program.memory_analysis()
    return int(found.argument_size_in_bytes + found.output_size_in_bytes + found.temp_size_in_bytes)


def measure(variants: list[Variant], rounds: int) -> None:
    """Warm up every variant, then time them in turn. Short runs are repeated, and their mean is taken."""
    for timed in [False] + [True] * rounds:
        for variant in variants:
            took = _seconds(variant, 1)
            if took < 0.2:  # threads of the previous variant may still run, and one short run says little
                took = _seconds(variant, math.ceil(0.4 / took))
            if timed:
                variant.seconds.append(took)


def _seconds(variant: Variant, runs: int) -> float:
    began = time.perf_counter()
    for _ in range(runs):
        variant.run()
    return (time.perf_counter() - began) / runs
