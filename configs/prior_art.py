"""Rules of other papers, fine-tuned on Fashion-MNIST at the same work and with the same objective as A-ViT.

    python train.py --config=configs/prior_art.py:tome,0.71            one training: METHOD,WORK
    python benchmarks/prior_art.py                                     all trainings of docs/results.md, and their tests

METHOD is static, layers (the first layers of the static model), the name of a rule, or "frozen_backbone" after
DynamicViT's (its own losses and learning rates). WORK is the part of the static model's multiply-adds that an image may
cost, if the last layer computes only what the logits read.

All methods start from checkpoints/fashion_mnist_dense, which is also the teacher, and train for two epochs. The
learning rate of each was chosen from 3e-4, 1e-3 and 2e-3 by validation top-1 at work 0.6 after half an epoch with one
seed; methods without a search of their own take the rate of their nearest relative.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from avit_jax.execution.work import shrinking_gmacs
from avit_jax.model.config import AViTConfig
from avit_jax.model.vit import AViT
from avit_jax.reduction.tome import ToMe
from configs import fashion_mnist

RATES_TRIED = (3e-4, 1e-3, 2e-3)
RATES = {"static": 1e-3, "layers": 1e-3, "avit": 1e-3, "tome": 1e-3}
# The architecture of checkpoints/fashion_mnist_dense.
STATIC = AViTConfig(image_size=28, patch_size=4, in_channels=1, num_classes=10, embed_dim=64, num_heads=4)
WHOLE_GMACS = shrinking_gmacs(STATIC, short_last_layer=False)
# Rules with the same number of tokens in every image, under settings that save nothing.
FIXED: dict[str, Any] = {"tome": ToMe(r=0)}
# Mean depths at which A-ViT's gate starts, in layers, and the work there on validation images.
GATE_START = {5.5: 0.439, 6.0: 0.478, 7.0: 0.558, 8.0: 0.635, 9.0: 0.711, 9.5: 0.749}


def get_config(arg: str = "static") -> ConfigDict:
    """The experiment; arg: METHOD,WORK. Raises ValueError for an unknown method or work outside 0..1."""
    method, _, text = arg.partition(",")
    if method not in RATES:
        raise ValueError(f"{method!r} is not one of {', '.join(RATES)}")
    work = float(text) if text else 1.0
    if not 0 < work <= 1:
        raise ValueError(f"work is {work}: give a part of the static model's multiply-adds, above 0 and at most 1")
    config = fashion_mnist.get_config("avit" if method == "avit" else "dense_more")
    config.name = f"prior_art_{method}" + (f"_{text}" if text else "")
    config.epochs = 2.0
    config.eval_every = 552
    config.checkpoint_every = 138
    config.keep_checkpoints = 1
    config.optim.update({"learning_rate": RATES[method], "warmup_steps": 50})
    if method == "layers":
        config.model.depth = layers_for(work)
        config.init_from = first_layers_path(config.model.depth)
    elif method == "avit":
        works, depths = list(GATE_START.values()), list(GATE_START)
        depth = round(float(np.interp(work, works, depths)), 2)
        config.gate_start.target_depth = depth
        config.loss.prior_target_depth = depth + 0.6
    elif method in FIXED:
        config.model.rule = rule_text(fixed_rule(method, work))
    return config


def share(config: AViTConfig) -> float:
    """The work of a model with fixed counts as a part of the static model's, with a short last layer."""
    return shrinking_gmacs(config, short_last_layer=True) / WHOLE_GMACS


def layers_for(work: float) -> int:
    """The number of layers whose work is nearest."""
    return min(range(1, 13), key=lambda depth: abs(share(dataclasses.replace(STATIC, depth=depth)) - work))


def first_layers_path(layers: int) -> str:
    """Where benchmarks/prior_art.py writes the model that `first_layers` returns."""
    return f"runs/prior_art/start/layers_{layers}"


def first_layers(model: AViT, layers: int) -> AViT:
    """The first layers of a model, with its final norm and head."""
    config = dataclasses.replace(model.config, depth=layers)
    arrays = nnx.to_pure_dict(nnx.state(model))
    arrays["blocks"] = _map(arrays["blocks"], lambda array: array[:layers])
    graphdef, state = nnx.split(nnx.eval_shape(lambda: AViT(config, rngs=nnx.Rngs(0))))
    nnx.replace_by_pure_dict(state, arrays)
    return nnx.merge(graphdef, state)


def fixed_rule(method: str, work: float) -> Any:
    """The rule whose counts cost this work. Raises ValueError if no setting is within 1 % of it."""
    level = FIXED[method].levels(_Configured(STATIC), np.zeros((0, 28, 28, 1), np.float32))
    rule = at_work(level, lambda rule: share(dataclasses.replace(STATIC, rule=rule)), work)
    return rule


def at_work(level: Callable[[float], Any], cost: Callable[[Any], float], work: float, tolerance: float = 0.01) -> Any:
    """The rule whose cost is nearest to `work`, by bisection over its level.

    level: see Rule.levels. cost: the work of a rule, in the unit of `work`. tolerance: of the result, as a part of
    `work`. Raises ValueError if no setting is so near.
    """
    low, high, best = 0.0, 1.0, None
    for _ in range(16):
        middle = (low + high) / 2
        rule = level(middle)
        found = cost(rule)
        if best is None or abs(found - work) < best[0]:
            best = abs(found - work), rule, found
        low, high = (low, middle) if found > work else (middle, high)
        if best[0] <= tolerance / 10 * work:
            break
    assert best is not None
    if best[0] > tolerance * work:
        raise ValueError(f"no setting costs {work:g}: the nearest costs {best[2]:.4g} ({best[1].describe()})")
    return best[1]


def rule_text(rule: Any) -> str:
    """The rule as config.model.rule has it, such as "tome(r=8)"."""
    settings = ", ".join(f"{field.name}={getattr(rule, field.name)!r}" for field in dataclasses.fields(rule))
    return f"{rule.name}({settings})"


@dataclasses.dataclass(frozen=True)
class _Configured:
    """What levels() reads of a model if its settings depend on counts alone."""

    config: AViTConfig


def _map(tree: Any, function: Callable[[Any], Any]) -> Any:
    return {name: _map(value, function) for name, value in tree.items()} if isinstance(tree, dict) else function(tree)
