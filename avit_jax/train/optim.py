"""The optimiser: AdamW with warm-up and cosine decay, weight decay by parameter name, and the moving average."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

SCHEDULES = ("step", "epoch")


def peak_learning_rate(config: ConfigDict, batch_size: int) -> float:
    """config.learning_rate, in proportion to batch_size / config.reference_batch where a reference batch is given."""
    return config.learning_rate * (batch_size / config.reference_batch if config.reference_batch else 1.0)


def learning_rate_schedule(config: ConfigDict, steps: int, *, epochs: float, batch_size: int) -> optax.Schedule:
    """The learning rate of each step (config.optim).

    schedule "step": linear warm-up over warmup_steps, then cosine decay to final_learning_rate at the last step.
    "epoch", as timm and DeiT have it: constant within an epoch e, w + e (peak - w) / warmup_epochs in the warm-up with
    w = warmup_learning_rate, then final + (peak - final) (1 + cos(pi e / epochs)) / 2: the cosine counts from epoch 0.
    Raises ValueError for another name, and where the warm-up is as long as the training.
    """
    peak = peak_learning_rate(config, batch_size)
    if config.schedule not in SCHEDULES:
        raise ValueError(f"config.optim.schedule {config.schedule!r} is unknown: choose one of {', '.join(SCHEDULES)}")
    if config.schedule == "step":
        if config.warmup_steps >= steps:
            raise ValueError(
                f"config.optim.warmup_steps {config.warmup_steps} is not below the {steps} steps of this training: "
                "lower it or raise config.epochs"
            )
        return optax.warmup_cosine_decay_schedule(
            init_value=0.0,
            peak_value=peak,
            warmup_steps=config.warmup_steps,
            decay_steps=steps,
            end_value=config.final_learning_rate,
        )
    if config.warmup_epochs >= epochs:
        raise ValueError(
            f"config.optim.warmup_epochs {config.warmup_epochs} is not below config.epochs {epochs}: "
            "lower config.optim.warmup_epochs"
        )

    # The first step of each epoch: few images make epochs of a step and a half, or several epochs of one step.
    count = max(math.ceil(epochs), 1)
    first_steps = np.array([math.ceil(epoch * steps / epochs) if epochs else 0 for epoch in range(count)], np.int32)

    def by_epoch(step: Int[Array, ""] | int) -> Float[Array, ""]:
        epoch = jnp.searchsorted(jnp.asarray(first_steps), jnp.asarray(step), side="right") - 1
        start = config.warmup_learning_rate
        warmup = start + epoch * (peak - start) / max(config.warmup_epochs, 1)
        final = config.final_learning_rate
        decay = final + (peak - final) * (1 + jnp.cos(math.pi * epoch / (epochs or 1))) / 2
        return jnp.where(epoch < config.warmup_epochs, warmup, decay)

    return by_epoch


def weight_decay_mask(params: Any) -> Any:
    """True for the kernels of linear layers alone: by name, because stacked biases and scales have two axes."""
    return jax.tree_util.tree_map_with_path(lambda path, _: "kernel" in jax.tree_util.keystr(path), params)


def make_optimizer(
    config: ConfigDict, schedule: optax.Schedule, factors: Mapping[str, float] | None = None
) -> optax.GradientTransformation:
    """AdamW (config.optim), after gradient clipping by global norm where clip_norm is not 0.

    factors: by part of a parameter's path, such as "rule_module", what its learning rate is multiplied with.
    """
    adamw = optax.adamw(
        schedule, b1=config.beta1, b2=config.beta2, weight_decay=config.weight_decay, mask=weight_decay_mask
    )
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    return optax.chain(clip, adamw, *([_scaled(factors)] if factors else []))


def _scaled(factors: Mapping[str, float]) -> optax.GradientTransformation:
    """Updates multiplied with the factor of each part of a path that is in theirs."""

    def scale(path: Any, update: Array) -> Array:
        name = jax.tree_util.keystr(path)
        return update * math.prod(factor for part, factor in factors.items() if part in name)

    return optax.stateless(lambda updates, _: jax.tree_util.tree_map_with_path(scale, updates))


def update_average(average: Any, params: Any, decay: float) -> Any:
    """Exponential moving average: decay * average + (1 - decay) * params."""
    return optax.incremental_update(params, average, 1 - decay)
