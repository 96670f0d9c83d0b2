"""The one place that chooses how a model is run."""

from jax.sharding import Mesh

from avit_jax.execution.compiled import Program
from avit_jax.execution.masked import MaskedModel
from avit_jax.execution.packed import compile_packed
from avit_jax.execution.plan import PackedPlan
from avit_jax.model.config import AViTConfig
from avit_jax.model.vit import AViT

EXECUTIONS = ("masked", "packed")
AUTO = "auto"


def compile(
    model: AViT,
    batch_size: int,
    *,
    execution: str = AUTO,
    plan: PackedPlan | None = None,
    image_exit: bool = True,
    mesh: Mesh | None = None,
) -> Program:
    """Compile the model for up to batch_size images: a function of images [b, h, w, c] that gives an AViTOutput.

    execution: "masked" (every token is computed), "packed" (halted tokens are gone), or "auto", which takes packed for
    a model whose tokens halt and masked for one without a rule. All give the same result but for rounding. plan and
    image_exit belong to packed execution, see compile_packed. mesh: devices that the images are split over, with an
    axis `data`; one without it. The weights are those of this moment: later changes of the model do not reach the
    result. Raises ValueError for an unknown execution, one that does not fit the model's rule, a plan without packed
    execution, and a batch size below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}: it must be at least 1")
    chosen = checked_execution(model.config, execution)
    if plan is not None and chosen != "packed":
        raise ValueError(f"a plan is for packed execution and this one is {chosen}: leave plan out")
    if chosen == "packed":
        return compile_packed(model, batch_size, plan, image_exit=image_exit, mesh=mesh)
    return MaskedModel(model, batch_size, mesh)


def fitting_executions(config: AViTConfig) -> tuple[str, ...]:
    """The executions that can run the model's rule; the one that "auto" takes comes first."""
    return ("packed", "masked") if config.halts else ("masked", "packed")


def checked_execution(config: AViTConfig, execution: str) -> str:
    """The execution's own name, for "auto" too. Raises ValueError for one that is unknown or does not fit."""
    if execution not in (*EXECUTIONS, AUTO):
        raise ValueError(f"execution {execution!r} is unknown: choose one of {', '.join((*EXECUTIONS, AUTO))}")
    fitting = fitting_executions(config)
    if execution == AUTO:
        return fitting[0]
    if execution not in fitting:
        raise ValueError(f"{execution} execution does not fit this model's rule: choose one of {', '.join(fitting)}")
    return execution


def suited_execution(config: AViTConfig, execution: str) -> str:
    """The execution asked for where a halting rule leaves a choice, else the one that "auto" takes.

    For commands whose flag applies to every model that they are given. Raises ValueError for an unknown execution.
    """
    if execution in EXECUTIONS and not (config.halts and execution in fitting_executions(config)):
        execution = AUTO
    return checked_execution(config, execution)
