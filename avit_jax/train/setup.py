"""The set-up of training from settings, model, mesh and number of images; --dry_run uses it as training does."""

import dataclasses
from collections.abc import Callable

import jax
import optax
from flax import nnx
from jax.sharding import Mesh

from avit_jax.execution.stages import PlannedPlan
from avit_jax.model.config import rule_of_training
from avit_jax.model.random_patches import check_tokens
from avit_jax.model.vit import AViT
from avit_jax.train.optim import learning_rate_schedule, make_optimizer
from avit_jax.train.planner import Planner, plans
from avit_jax.train.settings import TrainSettings
from avit_jax.train.state import TrainState, state_shapes
from avit_jax.train.step import make_train_step


@dataclasses.dataclass(frozen=True)
class Setup:
    """A training that has not started; nothing in it takes memory on a device."""

    steps: int
    schedule: optax.Schedule
    optimizer: optax.GradientTransformation
    state: TrainState  # shapes and types
    step: jax.stages.Wrapped  # (state, batch, the teacher's weights or None) -> (state, metrics); masked
    planned_step: Callable[[PlannedPlan], jax.stages.Wrapped]  # the same by planned execution
    planner: Planner | None  # None: every step is masked


def prepare(settings: TrainSettings, model: AViT, mesh: Mesh, images: int, teacher: AViT | None = None) -> Setup:
    """Number of steps, optimizer and jitted step for this number of training images.

    model, teacher: their shapes are enough (nnx.eval_shape). Raises ValueError if config.optim's schedule does not fit
    the number of steps, or freezes a model whose rule brings no parameters, and for config.augment.random_* that the
    model, its losses or the execution cannot have.
    """
    steps = settings.steps(images)
    schedule = learning_rate_schedule(settings.optim, steps, epochs=settings.epochs, batch_size=settings.batch_size)
    if settings.optim.frozen_steps and model.rule_module is None:
        raise ValueError(
            f"config.optim.frozen_steps is {settings.optim.frozen_steps} and the model's rule brings no parameters, so "
            "there is nothing to train in these steps: set it to 0"
        )
    optimizer = make_optimizer(settings.optim, schedule)
    state = state_shapes(model, optimizer, settings.optim.ema_decay)
    planner = None
    tokens = settings.augment.random_tokens
    check_tokens(tokens, model.config, "config.augment.random_tokens")
    if tokens and settings.execution == "planned":
        raise ValueError(
            f"config.execution is planned and config.augment.random_tokens {tokens}: planned shapes are for images "
            "with all patches; give config.execution=masked"
        )
    if tokens and rule_of_training(model.config) is None and model.config.reduction is not None:
        raise ValueError(
            f"config.augment.random_tokens is {tokens} and the rule {model.config.reduction.name} fixes the number of "
            "tokens itself: give random_tokens=0, or another rule"
        )
    away = settings.augment.random_patches and settings.augment.random_law != "grid"
    reduction = model.config.reduction
    if away and reduction is not None and reduction.by_cell:
        raise ValueError(
            f"the rule {reduction.name} has a depth for each cell of the grid and patches are cut at random: set "
            "config.augment.random_patches to 0, or choose another rule"
        )
    rule = rule_of_training(model.config)
    losses = settings.rule_loss.of(rule)
    if settings.augment.cuts and rule is not None and rule.teacher_tokens and losses.teacher_tokens_weight:
        raise ValueError(
            f"{losses.key('teacher_tokens_weight')} is {losses.teacher_tokens_weight:g} and patches are cut at random: "
            "the teacher's tokens are those of the grid; set the weight to 0, or config.augment.random_patches and "
            "random_tokens to 0"
        )
    if not tokens and plans(settings.execution, model.config, steps, mesh):
        planner = Planner(model.config, settings.batch_size // (mesh.size * settings.accumulation), steps)
    step_settings = dataclasses.replace(settings.step, counts=planner is not None)

    def step(plan: PlannedPlan | None) -> jax.stages.Wrapped:
        teacher_graphdef = None if teacher is None else nnx.graphdef(teacher)
        return make_train_step(nnx.graphdef(model), optimizer, step_settings, mesh, state, teacher_graphdef, plan)

    return Setup(steps, schedule, optimizer, state, step(None), step, planner)
