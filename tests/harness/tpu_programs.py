"""The train step and packed evaluation, compiled for TPU topologies by libtpu, without the chips.

Import it before a backend starts: it tells libtpu that there are no chips, and JAX to compute on the CPU.
"""

import os
from collections.abc import Callable
from typing import Any

os.environ.update(
    TPU_SKIP_MDS_QUERY="1",
    TPU_ACCELERATOR_TYPE="v5litepod-8",
    TPU_WORKER_HOSTNAMES="localhost",
    ALLOW_MULTIPLE_LIBTPU_LOAD="1",
)

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from avit_jax.commands.dry_run import IMAGENET_IMAGES
from avit_jax.execution.packed import packed_program
from avit_jax.execution.plan import default_plan
from avit_jax.execution.planned_model import planned_program
from avit_jax.execution.stages import PlannedPlan
from avit_jax.model.config import AViTConfig
from avit_jax.model.presets import config_from
from avit_jax.model.vit import model_of_shapes
from avit_jax.runtime.mesh import batch_sharding, replicated, state_shardings
from avit_jax.train.settings import TrainSettings
from avit_jax.train.setup import prepare
from tests.harness.collectives import collectives, said, what_crosses

jax.config.update("jax_platforms", os.environ.get("JAX_PLATFORMS") or "cpu")


def topology_mesh(name: str, fsdp: int = 1) -> Mesh:
    """A mesh of all chips of a topology; v5e:1x1 is one chip of the smallest topology."""
    devices = topologies.get_topology_desc(platform="tpu", topology_name=name.replace("1x1", "2x4")).devices
    devices = devices[:1] if name.endswith("1x1") else devices
    return Mesh(np.asarray(devices).reshape(-1, fsdp), ("data", "fsdp"), axis_types=(AxisType.Auto, AxisType.Auto))


def model_of(settings: TrainSettings) -> AViTConfig:
    """The architecture of config.model."""
    return config_from(settings.model.preset, **settings.model.given)


def compile_train_step(settings: TrainSettings, mesh: Mesh, plan: PlannedPlan | None = None) -> Any:
    """The compiled train step of an experiment, built as training builds it. plan: of planned execution."""
    model = model_of(settings)
    shapes = model_of_shapes(model)
    setup = prepare(settings, shapes, mesh, IMAGENET_IMAGES)
    layout = state_shardings(mesh, setup.state)
    state = jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), setup.state, layout
    )
    shape = (settings.batch_size, *model.image_shape, model.in_channels)
    batch = {
        "image": jax.ShapeDtypeStruct(shape, jnp.uint8, sharding=batch_sharding(mesh)),
        "label": jax.ShapeDtypeStruct(shape[:1], jnp.int32, sharding=batch_sharding(mesh)),
    }
    step = setup.step if plan is None else setup.planned_step(plan)
    return step.lower(state, batch, None).compile()


def compile_packed_evaluation(model_config: AViTConfig, images_a_chip: int, mesh: Mesh) -> Any:
    """The compiled packed program, in which every chip has its own images."""
    data = Mesh(mesh.devices.reshape(-1), ("data",), axis_types=(AxisType.Auto,))
    plan = default_plan(model_config, images_a_chip, "tpu")
    return _compiled(model_config, images_a_chip, data, lambda graphdef: packed_program(graphdef, plan, True, data))


def compile_planned_evaluation(model_config: AViTConfig, plan: PlannedPlan, mesh: Mesh) -> Any:
    """The compiled planned program with image exit, on a mesh of one chip."""
    return _compiled(model_config, plan.batch_size, mesh, lambda graphdef: planned_program(graphdef, plan, True, None))


def compile_masked_evaluation(model_config: AViTConfig, images: int, mesh: Mesh) -> Any:
    """The compiled program that computes every token, on a mesh of one chip."""
    return _compiled(
        model_config,
        images,
        mesh,
        lambda graphdef: lambda params, images, count: nnx.merge(graphdef, params)(images).logits,
    )


def _compiled(
    model_config: AViTConfig, images_a_chip: int, mesh: Mesh, program: Callable[[Any], Callable[..., Any]]
) -> Any:
    """program(graphdef), a function of weights, images and their number, compiled for the mesh."""
    graphdef, params = nnx.split(model_of_shapes(model_config))
    params = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=replicated(mesh)), params)
    images = jax.ShapeDtypeStruct(
        (images_a_chip * mesh.size, *model_config.image_shape, model_config.in_channels),
        jnp.float32,
        sharding=NamedSharding(mesh, PartitionSpec("data")),
    )
    number = jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated(mesh))
    return jax.jit(program(graphdef)).lower(params, images, number).compile()


def bytes_needed(compiled: Any) -> int:
    """The bytes that a program reserves on each chip: for arguments, results, work space and code."""
    memory = compiled.memory_analysis()
    needed = memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes
    return needed + memory.output_size_in_bytes - memory.alias_size_in_bytes


def check_crossing(compiled: Any, model_config: AViTConfig, allowed: set[str], fsdp: int) -> dict[str, Any]:
    """What crosses chips in a program. Raises ValueError if that is more than `allowed`."""
    _, params = nnx.split(model_of_shapes(model_config), nnx.Param)
    shapes = [(jax.tree_util.keystr(path), leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(params)]
    found = collectives(compiled.as_text())
    crossing = what_crosses(found, shapes, model_config.depth, fsdp)
    if more := crossing.keys() - allowed:
        raise ValueError(f"{', '.join(sorted(more))} crosses chips and should not: {said(crossing)}\n{found}")
    return crossing
