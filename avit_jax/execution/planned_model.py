"""Planned execution, compiled for inference: one program, whose one conditional is for batches that do not fit."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Int

from avit_jax.execution import packing, planned
from avit_jax.execution.compiled import CountedModel, check_batch_size, on_each_device, split_model
from avit_jax.execution.plan import PackedPlan, layer_loads
from avit_jax.execution.stages import PlannedPlan
from avit_jax.execution.work import Executed, packed_gmacs
from avit_jax.model.output import AViTOutput
from avit_jax.model.vit import AViT
from avit_jax.runtime.mesh import data_devices, mesh_or_all_cores


class PlannedModel(CountedModel):
    """A model compiled for planned execution; call it with up to `batch_size` images.

    `batches` counts the calls. `overflows` counts those with a batch, or a device's part of one, that did not fit the
    plan and was computed again with every token.
    """

    made_by = "compile_planned"
    execution = "planned"

    def __init__(self, model: AViT, batch_size: int, plan: PlannedPlan, image_exit: bool, mesh: Mesh | None) -> None:
        self.plan = plan
        self.batches = 0
        self._overflows = jnp.zeros((), int)
        self._image_exit = image_exit
        graphdef, params = split_model(model, mesh)
        jitted = jax.jit(planned_program(graphdef, plan, image_exit, mesh))
        super().__init__(model.config, batch_size, jitted, params, mesh)

    @property
    def overflows(self) -> int:
        """Calls so far in which something did not fit; waits for the last one."""
        return int(self._overflows)

    def _output(self, result: Any) -> AViTOutput:
        output, overflow = result
        if not isinstance(overflow, jax.core.Tracer):
            self.batches += 1
            self._overflows = self._overflows + overflow.any()
        return output

    def executed(self, token_depth: Int[np.ndarray, "b n"], images: int, output: AViTOutput | None = None) -> Executed:
        """The work done for the first `images` of a batch; the rest are padding, with depths of 0.

        It is that of the plan's shapes, and that of every token again for a device whose images did not fit.
        token_depth: by the rule, as without image exit.
        """
        config, plan = self.config, self.plan
        loads = layer_loads(token_depth, config, image_exit=self._image_exit)
        shapes = np.stack([plan.capacities()] * self._devices)
        gmacs = packed_gmacs(config, shapes, plan.group_size, images, image_exit=self._image_exit)
        if again := sum(not plan.fits(own) for own in self._by_device(loads)):
            whole = np.full((again, config.depth, 1), config.num_tokens)
            gmacs += packed_gmacs(config, whole, plan.batch_size, images, image_exit=self._image_exit)
        return Executed(int(loads.sum()), gmacs)


def planned_program(
    graphdef: nnx.GraphDef, plan: PlannedPlan, image_exit: bool, mesh: Mesh | None
) -> Callable[[Any, Array, Array], tuple[AViTOutput, Array]]:
    """The function that compile_planned compiles: (params, images, number that count) -> output, overflow by device."""

    def local(params: Any, images: Array, count: Array) -> tuple[AViTOutput, tuple[Array]]:
        model = nnx.merge(graphdef, params)
        rule = model.config.halting
        assert rule is not None
        output, ran = planned.forward(model, rule, images, plan, count=count, image_exit=image_exit)
        # One group of all images with room for all tokens: every token is computed.
        whole = PackedPlan(plan.num_tokens, len(images), (plan.num_tokens,))
        # The only conditional: on a GPU each one makes the host wait.
        output = jax.lax.cond(
            ran.overflow, lambda: packing.forward(model, images, count, whole, image_exit), lambda: output
        )
        return output, (ran.overflow[None],)

    program = on_each_device(local, mesh)

    def run(params: Any, images: Array, count: Array) -> tuple[AViTOutput, Array]:
        output, (overflow,) = program(params, images, count)
        return output, overflow

    return run


def compile_planned(
    model: AViT, batch_size: int, plan: PlannedPlan, *, image_exit: bool = True, mesh: Mesh | None = None
) -> PlannedModel:
    """Compile planned execution: the same predictions as model(images), without the work of halted tokens.

    plan: made by `avit_jax.plan`, for the images of one device. A batch that does not fit is computed again with every
    token, so the result never depends on the plan. image_exit, mesh: see compile_packed. The weights are fixed at this
    point. Raises ValueError for a plan of another model, batch size or execution, and for a model without a halting
    rule.
    """
    check_batch_size(batch_size)
    if model.config.halting is None:
        raise ValueError("planned execution is for a model with a halting rule: this one has none")
    if not isinstance(plan, PlannedPlan):
        raise ValueError(
            f"planned execution needs a plan and this is a {type(plan).__name__}: make one with "
            f"avit_jax.plan(model, images, {batch_size})"
        )
    mesh = mesh_or_all_cores(mesh, batch_size)
    plan.check(model.config, -(-batch_size // data_devices(mesh)))
    return PlannedModel(model, batch_size, plan, image_exit, mesh)
