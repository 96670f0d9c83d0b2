"""Planned execution, compiled for inference: one program without conditionals, but for batches that do not fit."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int

from avit_jax.execution import packing, planned
from avit_jax.execution.compiled import CompiledModel, check_batch_size, split_model
from avit_jax.execution.plan import PackedPlan
from avit_jax.execution.stages import PlannedPlan
from avit_jax.execution.work import Executed
from avit_jax.model.output import AViTOutput
from avit_jax.model.vit import AViT


class PlannedModel(CompiledModel):
    """A model compiled for planned execution; call it with up to `batch_size` images.

    `batches` counts the calls, and `overflows` those with a batch, or a device's part of one, that did not fit its plan
    and was computed with every token instead.
    """

    made_by = "compile_planned"

    def __init__(self, model: AViT, batch_size: int, plan: PlannedPlan, image_exit: bool, mesh: Mesh | None) -> None:
        self.plan = plan
        self.batches = 0
        self._overflows = jnp.zeros((), int)
        devices = 1 if mesh is None else mesh.shape["data"]
        graphdef, params = split_model(model, mesh)
        jitted = jax.jit(planned_program(graphdef, plan, image_exit, mesh))
        images = NamedSharding(mesh, PartitionSpec("data")) if mesh is not None else None
        super().__init__(model.config, batch_size, jitted, params, images, devices)

    @property
    def overflows(self) -> int:
        """Calls so far in which something did not fit; waits for the last one."""
        return int(self._overflows)

    def _arguments(self, count: int) -> tuple[np.int32]:
        return (np.int32(count),)

    def _output(self, result: Any) -> AViTOutput:
        output, overflow = result
        if not isinstance(overflow, jax.core.Tracer):
            self.batches += 1
            self._overflows = self._overflows + overflow.any()
        return output

    def executed(self, token_depth: Int[np.ndarray, "b n"], images: int) -> Executed:
        """The work of the plan's shapes, the same for every batch that fits."""
        raise NotImplementedError


def planned_program(
    graphdef: nnx.GraphDef, plan: PlannedPlan, image_exit: bool, mesh: Mesh | None
) -> Callable[[Any, Array, Array], tuple[AViTOutput, Array]]:
    """The function that compile_planned compiles: (params, images, number that count) -> output, overflow."""

    def local(params: Any, images: Array, count: Array) -> tuple[AViTOutput, Array]:
        model = nnx.merge(graphdef, params)
        rule = model.config.halting
        assert rule is not None
        output, ran = planned.forward(model, rule, images, plan, count=count, image_exit=image_exit)
        # One group of all images with room for all tokens: every token is computed.
        whole = PackedPlan(plan.num_tokens, len(images), (plan.num_tokens,))
        output = jax.lax.cond(
            ran.overflow, lambda: packing.forward(model, images, count, whole, image_exit), lambda: output
        )
        return output, ran.overflow[None]

    if mesh is None:
        return local
    names = [field.name for field in dataclasses.fields(AViTOutput)]

    def shard(params: Any, images: Array, count: Array) -> tuple[Array, ...]:
        first = jax.lax.axis_index("data") * len(images)
        output, overflow = local(params, images, jnp.clip(count - first, 0, len(images)))
        return *(getattr(output, name) for name in names), overflow

    rows, second = PartitionSpec("data"), PartitionSpec(None, "data")
    sharded = jax.shard_map(
        shard,
        mesh=mesh,
        in_specs=(PartitionSpec(), rows, PartitionSpec()),
        out_specs=(*(second if name in ("head_logits", "halting_scores") else rows for name in names), rows),
        check_vma=False,
    )

    def split(params: Any, images: Array, count: Array) -> tuple[AViTOutput, Array]:
        *fields, overflow = sharded(params, images, count)
        return AViTOutput(**dict(zip(names, fields, strict=True))), overflow

    return split


def compile_planned(
    model: AViT, batch_size: int, plan: PlannedPlan, *, image_exit: bool = True, mesh: Mesh | None = None
) -> PlannedModel:
    """Compile planned execution: the same predictions as model(images), but halted tokens cost nothing.

    plan: see `avit_jax.plan`; for the images of one device. A batch that does not fit it is computed with every token,
    so that the result never changes. image_exit, mesh: see compile_packed. The weights are fixed at this point. Raises
    ValueError for a plan of another model or batch size, and for a model without a halting rule.
    """
    check_batch_size(batch_size)
    config = model.config
    if config.halting is None:
        raise ValueError("planned execution is for a model with a halting rule: this one has none")
    devices = 1 if mesh is None else mesh.shape["data"]
    own = -(-batch_size // devices)
    made_for = plan.num_tokens, plan.depth, plan.batch_size
    if made_for != (config.num_tokens, config.depth, own):
        raise ValueError(
            f"the plan is for {plan.num_tokens} tokens, {plan.depth} layers and {plan.batch_size} images on a device, "
            f"and this is {config.num_tokens}, {config.depth} and {own}: make a new plan"
        )
    return PlannedModel(model, batch_size, plan, image_exit, mesh)
