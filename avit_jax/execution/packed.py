"""Packed execution: halted tokens are removed, in one jitted program with static shapes that never waits for the host.

In every layer each image's active tokens are moved to the front, images are sorted by how many they have, and groups of
images run with the smallest of a few static capacities that holds them.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Int

from avit_jax.execution.compiled import CountedModel, check_batch_size, on_each_device, split_model
from avit_jax.execution.gated_packed import GatedPackedModel
from avit_jax.execution.packing import forward
from avit_jax.execution.plan import PackedPlan, check_rule, default_plan, layer_loads, padded_loads
from avit_jax.execution.work import Executed, packed_gmacs
from avit_jax.model.output import AViTOutput
from avit_jax.model.vit import AViT
from avit_jax.runtime.mesh import available_cores, data_devices, mesh_or_all_cores


class PackedModel(CountedModel):
    """A model compiled for packed execution; call it with up to `batch_size` images.

    `jax.export.export(packed.jitted)(*packed.abstract_arguments)` exports the program. The exported program takes
    packed.params, images, and the number of images that count.
    """

    made_by = "compile_packed"
    execution = "packed"

    def __init__(self, model: AViT, batch_size: int, plan: PackedPlan, image_exit: bool, mesh: Mesh | None) -> None:
        self.plan = plan
        self._halting_seen = not model.config.halts or model.config.depth == 1
        graphdef, params = split_model(model, mesh)
        jitted = jax.jit(packed_program(graphdef, plan, image_exit, mesh))
        super().__init__(model.config, batch_size, jitted, params, mesh)

    def _seen(self, output: AViTOutput) -> None:
        """Print one line if the first images show that nothing is saved."""
        if self._halting_seen:
            return
        self._halting_seen = True
        if output.token_depth.is_fully_addressable and (np.asarray(output.token_depth) == self.config.depth).all():
            rule = self.config.halting
            print(
                "packed execution saves nothing: no token of the first images halted before the last layer; "
                f"{rule.advice if rule else ''}"
            )

    def executed(self, token_depth: Int[np.ndarray, "b n"], images: int, output: AViTOutput | None = None) -> Executed:
        """The work done for the first `images` of a batch; the rest are padding, with depths of 0.

        token_depth: by the rule, as without image exit. The work is counted with image exit, whether this program has
        it or not.
        """
        loads = layer_loads(token_depth, self.config, image_exit=True)
        padded = padded_loads(self._by_device(loads), self.plan)
        gmacs = packed_gmacs(self.config, padded, self.plan.group_size, images)
        return Executed(int(loads.sum()), gmacs)


def packed_program(
    graphdef: nnx.GraphDef, plan: PackedPlan, image_exit: bool, mesh: Mesh | None
) -> Callable[[Any, Array, Array], AViTOutput]:
    """The function that compile_packed compiles: (params, images, number of images that count) -> output."""

    def local(params: Any, images: Array, count: Array) -> tuple[AViTOutput, tuple[Array, ...]]:
        return forward(nnx.merge(graphdef, params), images, count, plan, image_exit), ()

    program = on_each_device(local, mesh)
    return lambda params, images, count: program(params, images, count)[0]


def compile_packed(
    model: AViT,
    batch_size: int,
    plan: PackedPlan | None = None,
    *,
    image_exit: bool = True,
    mesh: Mesh | None = None,
) -> PackedModel | GatedPackedModel:
    """Compile packed execution: the same predictions as model(images), but halted tokens cost nothing.

    The result takes up to batch_size images and returns a row for each.

    image_exit: an image ends as soon as the tokens that its logits read have halted (class and distillation token, or
    the patches of a mean). Logits stay the same, token_depth counts the layers computed, and with pool "token" the last
    layer has scores for these tokens only. Without image_exit, depths, ponder costs and scores are those of masked
    execution. A model with gates has no image exit. plan: see plan_packed; it only affects speed. mesh: the batch is
    split over its axis `data`, and each device packs its own images; without one, over all CPU devices (see
    use_all_cores), or on one accelerator.

    Logits differ from masked execution by rounding, about 1e-5. If a token's cumulative score is within rounding of the
    threshold, the token may stop one layer earlier or later, and the logits of its image differ by more (6.9e-4 was
    seen). The weights are fixed at this point: later changes to the model have no effect. Raises ValueError for a plan
    of another model or execution, for a reduction rule, and for a batch size below 1.
    """
    check_batch_size(batch_size)
    check_rule(model.config)
    mesh = mesh_or_all_cores(mesh, batch_size)
    devices = data_devices(mesh)
    own = -(-batch_size // devices)
    if plan is None:
        plan = default_plan(model.config, own, jax.default_backend(), max(1, available_cores() // devices))
    elif not isinstance(plan, PackedPlan):
        raise ValueError(
            f"packed execution takes a PackedPlan and this is a {type(plan).__name__}: make one with "
            f"avit_jax.plan_packed(model, images, {batch_size}), or leave plan out"
        )
    plan = plan.fitted(model.config, own)
    if model.config.gates is not None:
        return GatedPackedModel(model, batch_size, plan, mesh)
    return PackedModel(model, batch_size, plan, image_exit, mesh)
