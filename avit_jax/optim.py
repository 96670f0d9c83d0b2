"""The optimiser: AdamW with warm-up and cosine decay, weight decay by parameter name, and the moving average."""

from typing import Any

import jax
import optax
from ml_collections import ConfigDict


def learning_rate_schedule(config: ConfigDict, steps: int) -> optax.Schedule:
    """Linear warm-up to config.learning_rate over warmup_steps, then cosine decay to final_learning_rate at `steps`.

    Raises ValueError where the warm-up is longer than the training.
    """
    if config.warmup_steps >= steps:
        raise ValueError(
            f"config.optim.warmup_steps {config.warmup_steps} is not below the {steps} steps of this training: "
            "lower it or raise config.epochs"
        )
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=config.learning_rate,
        warmup_steps=config.warmup_steps,
        decay_steps=steps,
        end_value=config.final_learning_rate,
    )


def weight_decay_mask(params: Any) -> Any:
    """True for the kernels of linear layers alone: by name, because stacked biases and scales have two axes."""
    return jax.tree_util.tree_map_with_path(lambda path, _: "kernel" in jax.tree_util.keystr(path), params)


def make_optimizer(config: ConfigDict, steps: int) -> optax.GradientTransformation:
    """Gradient clipping by global norm, then AdamW (config.optim)."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            learning_rate_schedule(config, steps),
            b1=config.beta1,
            b2=config.beta2,
            weight_decay=config.weight_decay,
            mask=weight_decay_mask,
        ),
    )


def update_average(average: Any, params: Any, decay: float) -> Any:
    """Exponential moving average: decay * average + (1 - decay) * params."""
    return optax.incremental_update(params, average, 1 - decay)
