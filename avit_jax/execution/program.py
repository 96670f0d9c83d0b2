"""The one place that chooses how a model is run."""

import dataclasses

import jax
from jax.sharding import Mesh

from avit_jax.execution.compiled import Program, check_batch_size
from avit_jax.execution.masked import MaskedModel
from avit_jax.execution.packed import compile_packed
from avit_jax.execution.plan import PackedPlan
from avit_jax.execution.planned_model import compile_planned
from avit_jax.execution.shrinking import ShrinkingModel
from avit_jax.execution.stages import PlannedPlan
from avit_jax.model.config import AViTConfig
from avit_jax.model.vit import AViT
from avit_jax.runtime.mesh import mesh_or_all_cores

# What each execution does, as tables say it.
EXECUTIONS = {
    "masked": "every token is computed",
    "packed": "halted tokens are gone",
    "planned": "halted tokens are gone, by shapes fixed ahead",
    "shrinking": "merged and dropped tokens are gone",
}
AUTO = "auto"

# What "auto" takes for a halting rule without a plan, by platform, and why.
_WITHOUT_PLAN = {
    "cpu": ("packed", "the fastest on a CPU, where it was measured"),
    "tpu": ("masked", "packed moves single numbers, slowly on a TPU; with a plan (avit_jax.plan) it is planned"),
    "gpu": ("masked", "packed makes a GPU wait for its host in every layer; with a plan (avit_jax.plan) it is planned"),
}


@dataclasses.dataclass(frozen=True)
class Choice:
    """An execution, and in a few words why it was chosen."""

    execution: str
    reason: str


def compile(
    model: AViT,
    batch_size: int,
    *,
    execution: str = AUTO,
    plan: PackedPlan | PlannedPlan | None = None,
    image_exit: bool = True,
    mesh: Mesh | None = None,
) -> Program:
    """Compile the model for up to batch_size images: a function of images [b, h, w, c] that returns an AViTOutput.

    execution: "masked" (every token is computed), "packed" (halted tokens are removed), "planned" (halted tokens are
    removed, with shapes fixed ahead by a plan), "shrinking" (merged and dropped tokens are removed), or "auto":
    shrinking for a reduction rule, masked without a rule, and for a halting rule the execution of the plan, or without
    a plan what suits the platform. The result's `execution` and `reason` say which it is and why. All executions that
    fit a rule give the same result up to rounding. Without a rule, shrinking computes only what the logits read of the
    last layer. plan: of packed or planned execution (compile_packed, compile_planned); the others have none.
    image_exit: see compile_packed; of packed and planned execution. mesh: the images are split over its axis `data`;
    None: all CPU devices, or one accelerator.

    The weights are fixed at this point: later changes to the model have no effect. Raises ValueError for an unknown
    execution, one that does not fit the model's rule, a plan of another execution, planned execution without a plan,
    and a batch size below 1.
    """
    check_batch_size(batch_size)
    mesh = mesh_or_all_cores(mesh, batch_size)
    choice = choose(model.config, execution, plan)
    program = _compiled(model, batch_size, choice.execution, plan, image_exit, mesh)
    program.reason = choice.reason
    return program


def _compiled(
    model: AViT,
    batch_size: int,
    chosen: str,
    plan: PackedPlan | PlannedPlan | None,
    image_exit: bool,
    mesh: Mesh | None,
) -> Program:
    if chosen == "planned":
        if not isinstance(plan, PlannedPlan):
            raise ValueError(
                "planned execution needs a plan of its shapes: make one from a few hundred images with "
                f"avit_jax.plan(model, images, {batch_size})"
            )
        return compile_planned(model, batch_size, plan, image_exit=image_exit, mesh=mesh)
    if chosen == "packed":
        assert not isinstance(plan, PlannedPlan)
        return compile_packed(model, batch_size, plan, image_exit=image_exit, mesh=mesh)
    program = ShrinkingModel if chosen == "shrinking" else MaskedModel
    return program(model, batch_size, mesh)


def choose(
    config: AViTConfig,
    execution: str = AUTO,
    plan: PackedPlan | PlannedPlan | None = None,
    platform: str | None = None,
) -> Choice:
    """The execution that compile takes, and why.

    "auto" takes shrinking for a reduction rule and masked without a rule. For a halting rule it takes the execution
    that a plan is for; without a plan packed on a CPU, and masked elsewhere, as for gates. platform: JAX's name, such
    as "gpu"; None: the one that JAX uses. Raises ValueError for an execution that is unknown or does not fit the rule,
    and for a plan of another execution.
    """
    choice = _chosen(config, execution, plan, platform or jax.default_backend())
    if plan is None:
        return choice
    if not isinstance(plan, PackedPlan | PlannedPlan):
        raise ValueError(
            f"plan is a {type(plan).__name__}: give a PackedPlan or a PlannedPlan, such as PlannedPlan.load(path)"
        )
    kind = "planned" if isinstance(plan, PlannedPlan) else "packed"
    if kind != choice.execution:
        instead = f", or give execution={kind!r}" if kind in fitting_executions(config) else ""
        raise ValueError(
            f"the plan is for {kind} execution and this one is {choice.execution}: leave plan out{instead}"
        )
    return choice


def _chosen(config: AViTConfig, execution: str, plan: PackedPlan | PlannedPlan | None, platform: str) -> Choice:
    if execution not in (*EXECUTIONS, AUTO):
        raise ValueError(f"execution {execution!r} is unknown: choose one of {', '.join((*EXECUTIONS, AUTO))}")
    fitting = fitting_executions(config)
    if execution == AUTO:
        if config.reduction is not None:
            return Choice("shrinking", "its rule leaves a number of tokens that is known ahead")
        if config.gates is not None:
            if platform == "cpu":
                return Choice("packed", "on a CPU it leaves out what the gates turn off")
            return Choice("masked", "packed execution of gates is made for CPUs")
        if config.halting is None:
            return Choice("masked", "without a rule every token is computed")
        if plan is not None:
            return Choice("planned" if isinstance(plan, PlannedPlan) else "packed", "the plan is for it")
        unknown = "masked", "nothing is known about this platform"
        return Choice(*_WITHOUT_PLAN.get(platform, unknown))
    if execution not in fitting:
        rule = config.rule_in_force
        kind = "a model without a rule" if rule is None else f"the rule {rule.name!r}"
        raise ValueError(f"{execution} execution cannot run {kind}: choose {' or '.join((*fitting, AUTO))}")
    return Choice(execution, "it was asked for")


def fitting_executions(config: AViTConfig) -> tuple[str, ...]:
    """The executions that can run the model's rule. Planned needs a plan."""
    if config.reduction is not None:
        return ("shrinking",)
    if config.gates is not None:
        return ("packed", "masked")
    return ("packed", "masked", "planned") if config.halting is not None else ("masked", "packed", "shrinking")


def suited(config: AViTConfig, execution: str) -> Choice:
    """The given execution if a halting rule leaves a choice, otherwise the one that "auto" chooses.

    For commands whose flag applies to every model that they load. Raises ValueError for an unknown execution.
    """
    choice = config.halting is not None or config.gates is not None
    if execution in EXECUTIONS and (not choice or execution not in fitting_executions(config)):
        execution = AUTO
    return choose(config, execution)
