"""The optimiser: AdamW with warm-up and cosine decay, weight decay by parameter name, and the moving average."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from avit_jax.runtime.settings import Settings, setting

SCHEDULES = ("step", "epoch")


@dataclasses.dataclass(frozen=True)
class OptimSettings(Settings):
    """config.optim. Raises ValueError for a value out of range."""

    section = "optim"

    learning_rate: float = setting(1e-3, "The peak learning rate, after the warm-up.", least=0)
    reference_batch: int = setting(
        0, "The batch size that learning_rate is for; it is scaled in proportion to batch_size. 0: no scaling.", least=0
    )
    final_learning_rate: float = setting(1e-5, "The learning rate that the cosine decay ends at.", least=0)
    schedule: str = setting(
        "step",
        "step: warm-up and decay change with each step; epoch: with each epoch, as in timm and DeiT.",
        choices=SCHEDULES,
    )
    warmup_steps: int = setting(0, "Steps of linear warm-up from 0, with schedule step.", least=0)
    warmup_epochs: int = setting(0, "Epochs of linear warm-up from warmup_learning_rate, with schedule epoch.", least=0)
    warmup_learning_rate: float = setting(0.0, "The learning rate of the first epoch, with schedule epoch.", least=0)
    weight_decay: float = setting(0.05, "AdamW's weight decay, for the kernels of linear layers.", least=0)
    beta1: float = setting(0.9, "AdamW's decay rate of the mean gradient.", least=0, below=1)
    beta2: float = setting(0.999, "AdamW's decay rate of the mean squared gradient.", least=0, below=1)
    clip_norm: float = setting(0.0, "The global norm that gradients are clipped to; 0: no clipping.", least=0)
    ema_decay: float = setting(
        0.0,
        "Decay of the moving average of the weights, which is evaluated and kept; 0: no average.",
        least=0,
        below=1,
    )
    rule_factor: float = setting(1.0, "Factor of the learning rate for the parameters that a rule brings.", least=0)
    frozen_steps: int = setting(
        0, "Steps at the start in which only the parameters that a rule brings are trained.", least=0
    )
    compare_ema: bool = setting(
        False, "Also evaluate the raw weights, and keep those that are better on the validation images."
    )


def peak_learning_rate(settings: OptimSettings, batch_size: int) -> float:
    """learning_rate, multiplied by batch_size / reference_batch if there is a reference batch."""
    return settings.learning_rate * (batch_size / settings.reference_batch if settings.reference_batch else 1.0)


def learning_rate_schedule(settings: OptimSettings, steps: int, *, epochs: float, batch_size: int) -> optax.Schedule:
    """The learning rate of each step (config.optim), for a run of `steps` steps.

    schedule "step": linear warm-up over warmup_steps, then cosine decay to final_learning_rate at the last step.
    "epoch", as in timm and DeiT: constant within an epoch e, w + e (peak - w) / warmup_epochs in the warm-up with w =
    warmup_learning_rate, then final + (peak - final) (1 + cos(pi e / epochs)) / 2: the cosine counts from epoch 0.
    Raises ValueError if the warm-up is as long as the training.
    """
    peak = peak_learning_rate(settings, batch_size)
    if settings.schedule == "step":
        if settings.warmup_steps >= steps:
            raise ValueError(
                f"config.optim.warmup_steps {settings.warmup_steps} is not below the {steps} steps of this training: "
                "lower it or raise config.epochs"
            )
        return optax.warmup_cosine_decay_schedule(
            init_value=0.0,
            peak_value=peak,
            warmup_steps=settings.warmup_steps,
            decay_steps=steps,
            end_value=settings.final_learning_rate,
        )
    if settings.warmup_epochs and settings.warmup_epochs >= epochs:
        raise ValueError(
            f"config.optim.warmup_epochs {settings.warmup_epochs} is not below config.epochs {epochs}: "
            "lower config.optim.warmup_epochs"
        )

    # The first step of each epoch. With few images an epoch may have one and a half steps, or less than one.
    count = max(math.ceil(epochs), 1)
    first_steps = np.array([math.ceil(epoch * steps / epochs) if epochs else 0 for epoch in range(count)], np.int32)

    def by_epoch(step: Int[Array, ""] | int) -> Float[Array, ""]:
        epoch = jnp.searchsorted(jnp.asarray(first_steps), jnp.asarray(step), side="right") - 1
        start = settings.warmup_learning_rate
        warmup = start + epoch * (peak - start) / max(settings.warmup_epochs, 1)
        final = settings.final_learning_rate
        decay = final + (peak - final) * (1 + jnp.cos(math.pi * epoch / (epochs or 1))) / 2
        return jnp.where(epoch < settings.warmup_epochs, warmup, decay)

    return by_epoch


def weight_decay_mask(params: Any) -> Any:
    """True only for the kernels of linear layers, found by name because stacked biases and scales have two axes too."""
    return jax.tree_util.tree_map_with_path(lambda path, _: "kernel" in jax.tree_util.keystr(path), params)


def make_optimizer(settings: OptimSettings, schedule: optax.Schedule) -> optax.GradientTransformation:
    """AdamW (config.optim), after gradient clipping by global norm if clip_norm is not 0."""
    adamw = optax.adamw(
        schedule, b1=settings.beta1, b2=settings.beta2, weight_decay=settings.weight_decay, mask=weight_decay_mask
    )
    clip = optax.clip_by_global_norm(settings.clip_norm) if settings.clip_norm else optax.identity()
    scaled = [_rule_scaled(settings.rule_factor)] if settings.rule_factor != 1 else []
    frozen = [_others_frozen(settings.frozen_steps)] if settings.frozen_steps else []
    return optax.chain(clip, adamw, *scaled, *frozen)


def _rule_scaled(factor: float) -> optax.GradientTransformation:
    """Multiplies the updates of the rule's own parameters."""

    def scale(path: Any, update: Array) -> Array:
        return update * factor if _of_rule(path) else update

    return optax.stateless(lambda updates, _: jax.tree_util.tree_map_with_path(scale, updates))


def _others_frozen(steps: int) -> optax.GradientTransformation:
    """Sets the updates of all parameters but the rule's own to zero in the first steps."""
    released = optax.scale_by_schedule(lambda step: jnp.where(step < steps, 0.0, 1.0))
    return optax.masked(
        released, lambda params: jax.tree_util.tree_map_with_path(lambda path, _: not _of_rule(path), params)
    )


def _of_rule(path: Any) -> bool:
    """Whether a parameter belongs to what a rule brings."""
    return "rule_module" in jax.tree_util.keystr(path)


def update_average(average: Any, params: Any, decay: float) -> Any:
    """Exponential moving average: decay * average + (1 - decay) * params."""
    return optax.incremental_update(params, average, 1 - decay)
