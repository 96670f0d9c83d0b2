"""Small models and data for the tests."""

import functools
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from avit_jax import AViT, AViTConfig
from avit_jax.execution import shrinking
from avit_jax.execution.shrinking import Reduced
from avit_jax.model.output import AViTOutput
from avit_jax.reduction.groups import Reduction
from configs import npz_avit

Result = TypeVar("Result")


def small_config(**overrides: Any) -> AViTConfig:
    """12 x 8 pixels, patch 4: 6 patches, 4 layers of width 16."""
    fields: dict[str, Any] = {
        "image_size": (12, 8),
        "patch_size": 4,
        "in_channels": 2,
        "num_classes": 5,
        "embed_dim": 16,
        "depth": 4,
        "num_heads": 2,
        "gate_scale": 4.0,
        "gate_center": 1.0,
    }
    return AViTConfig(**(fields | overrides))


def spread_gate(model_config: AViTConfig, seed: int = 0, factor: float = 4.0) -> AViT:
    """A model with weights large enough that its tokens halt at many different layers."""
    return nnx.clone(_spread_gate(model_config, seed, factor))


@functools.cache
def _spread_gate(model_config: AViTConfig, seed: int, factor: float) -> AViT:
    model = AViT(model_config, rngs=nnx.Rngs(seed))
    # In NumPy, which compiles nothing.
    state = jax.tree.map(
        lambda x: jax.device_put(factor * np.asarray(x)) if x.ndim >= 2 else x, nnx.state(model, nnx.Param)
    )
    nnx.update(model, state)
    return model


def answers(model: AViT, images: Any) -> AViTOutput:
    """model(images) as one compiled program, in NumPy: each operation would be a program for each shape."""
    return in_numpy(_answers(*nnx.split(model), images))


def shrunk(model: AViT, images: Any, rule: Reduction, **options: Any) -> tuple[AViTOutput, Reduced]:
    """shrinking.run, in NumPy."""
    output, reduced, _ = shrinking.run(model, images, rule, **options)
    return in_numpy(output), in_numpy(reduced)


def in_numpy(result: Result) -> Result:
    """A dataclass of arrays with NumPy's: a part of a JAX array is a program for each shape."""
    found = object.__new__(type(result))  # the tests' type check of the constructor would refuse them
    for name, value in vars(result).items():
        object.__setattr__(found, name, jax.tree.map(np.asarray, value))
    return found


@functools.partial(jax.jit, static_argnums=0)
def _answers(graphdef: nnx.GraphDef, state: nnx.State, images: jax.Array) -> AViTOutput:
    return nnx.merge(graphdef, state)(images)


def toy_arrays(count: int = 120, classes: int = 3, size: int = 8, seed: int = 0) -> dict[str, Any]:
    """Images whose class is the position of a bright band: learnt within a few steps."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % classes
    images = rng.integers(0, 60, (count, size, size, 1))
    for image, label in zip(images, labels, strict=True):
        image[label * size // classes : (label + 1) * size // classes] += 150
    return {"images": images.astype(np.uint8), "labels": labels}


def toy_data(path: Path) -> Path:
    """toy_arrays as a file; returns its path."""
    np.savez(path, **toy_arrays())
    return path


def tiny_experiment(path: Path, **loss: Any) -> ConfigDict:
    """An experiment of seconds: 8 x 8 pixels, two layers of width 16, 8 steps of 12 images; path: where its data go."""
    config = npz_avit.get_config(str(toy_data(path)))
    config.init_from = config.teacher = ""
    config.loss.update({"distillation": "none", "label_smoothing": 0.1})
    config.model.update({"patch_size": 4, "embed_dim": 16, "depth": 3, "num_heads": 2, "drop_path_rate": 0.0})
    config.model.update({"gate_scale": 4.0, "gate_center": 2.0})
    config.gate_start.update({"target_depth": 2.0, "deviation": 0.5})
    config.augment.update({"rotate": 0.0, "scale": 0.0, "shear": 0.0, "translate": 1.0})
    config.optim.update({"learning_rate": 3e-3, "warmup_steps": 2, "ema_decay": 0.5})
    config.loss.update(loss)
    config.batch_size, config.eval_batch_size, config.epochs = 12, 16, 8 * 12 / 87
    config.log_every, config.eval_every, config.checkpoint_every = 2, 4, 3
    return config


def quick_start() -> dict[str, str]:
    """An environment in which train.py starts sooner: with this session's compiled programs, and without torch.

    tensorboardX would import torch, two seconds: a module of that name stands in its way.
    """
    programs = Path(jax.config.jax_compilation_cache_dir)  # type: ignore[attr-defined]
    modules = programs.with_name(f"{programs.name}_modules")
    modules.mkdir(exist_ok=True)
    (modules / "torch.py").write_text("raise ImportError\n")
    return {
        "PYTHONPATH": str(modules),
        "JAX_COMPILATION_CACHE_DIR": str(programs),
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
