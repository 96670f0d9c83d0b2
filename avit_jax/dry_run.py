"""What a run would be: model, work, memory, steps, schedule, data; and two steps on made-up data."""

import time
from typing import Any

import jax
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from avit_jax.checks import check_values
from avit_jax.config import AViTConfig, config_from
from avit_jax.data.open import open_dataset
from avit_jax.data.settings import DataSettings
from avit_jax.evaluation import whole_gmacs
from avit_jax.experiment import model_config
from avit_jax.mesh import batch_sharding, global_batch, replicated, state_shardings, training_mesh
from avit_jax.model import AViT
from avit_jax.optim import learning_rate_schedule, make_optimizer, peak_learning_rate
from avit_jax.train_step import build_train_step, initial_state

IMAGENET_IMAGES = 1_281_167


def dry_run(config: ConfigDict) -> str:
    """The account that train.py --dry_run prints.

    Data need not be there; init_from and teacher are not read. Raises ValueError for settings that the run refuses.
    """
    check_values(config)
    settings = DataSettings.from_config(dict(config.data))
    try:
        dataset = open_dataset(settings)
    except ValueError as error:
        fields = dict(config.model)
        wanted, images = config_from(fields.pop("preset", None), **fields), IMAGENET_IMAGES
        data = f"not to be read here ({error}); steps are counted for ImageNet's {images} images"
    else:
        wanted, images = model_config(config, dataset), len(dataset.train)
        data = f"{images} training, {len(dataset.val)} validation, {len(dataset.test)} test images"
    mesh = training_mesh(config.mesh.data, config.mesh.fsdp, config.batch_size, config.accumulation)
    steps = max(1, round(config.epochs * images / config.batch_size))
    schedule = learning_rate_schedule(config.optim, steps, epochs=config.epochs, batch_size=config.batch_size)
    optimizer = make_optimizer(config.optim, schedule)
    model = AViT(wanted, rngs=nnx.Rngs(config.seed))
    graphdef, params = nnx.split(model, nnx.Param)
    state = initial_state(model, optimizer, config.optim.ema_decay, mesh)
    teacher_graphdef, teacher = (nnx.graphdef(model), params) if config.teacher else (None, None)
    layout = state_shardings(mesh, state)
    step = jax.jit(
        build_train_step(graphdef, optimizer, config, mesh, teacher_graphdef),
        donate_argnums=0,
        in_shardings=(layout, batch_sharding(mesh), replicated(mesh)),
        out_shardings=(layout, replicated(mesh)),
    )
    batch = global_batch(made_up_batch(wanted, config.batch_size // jax.process_count()), mesh)
    began = time.perf_counter()
    program = step.lower(state, batch, teacher).compile()
    compiled = time.perf_counter() - began
    memory: Any = program.memory_analysis()
    bytes_needed = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    lines = [f"data      {data}", *_model_lines(wanted, params, config)]
    lines += [
        f"devices   {mesh.size} {mesh.devices.flat[0].device_kind}: data {mesh.shape['data']}, fsdp "
        f"{mesh.shape['fsdp']}; {config.batch_size // mesh.size} images each"
        + (f" in {config.accumulation} parts" if config.accumulation > 1 else ""),
        f"memory    {bytes_needed / 1e9:.2f} GB a device: {memory.argument_size_in_bytes / 1e9:.2f} state and batch, "
        f"{memory.temp_size_in_bytes / 1e9:.2f} for the step (the compiler's account)",
        f"steps     {steps} of {config.batch_size} images: {config.epochs:g} epochs",
        f"schedule  peak {peak_learning_rate(config.optim, config.batch_size):.3g}; at 0, 5, 50, 95 and 100 %: "
        + ", ".join(f"{float(schedule(round(share * (steps - 1)))):.3g}" for share in (0, 0.05, 0.5, 0.95, 1)),
        f"compiled  in {compiled:.0f} s",
    ]
    for number in (1, 2):
        began = time.perf_counter()
        state, metrics = program(state, batch, teacher)
        loss = float(metrics["loss"])
        seconds = time.perf_counter() - began
        lines.append(
            f"step {number}    loss {loss:.4f}, mean depth {float(metrics['mean_depth']):.2f}, {seconds:.1f} s"
        )
    return "\n".join(lines)


def made_up_batch(model: AViTConfig, count: int) -> dict[str, np.ndarray]:
    """Noise for images, every class in turn for labels."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (count, *model.image_shape, model.in_channels), dtype=np.uint8)
    return {"image": images, "label": (np.arange(count) % model.num_classes).astype(np.int32)}


def _model_lines(model: AViTConfig, params: nnx.State, config: ConfigDict) -> list[str]:
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    gate = f"gate {model.gate_scale:g} / {model.gate_center:g}" if model.halts else "never halts"
    height, width = model.image_shape
    return [
        f"model     {config.model.get('preset') or 'of its own'}: {model.depth} layers of width {model.embed_dim}, "
        f"{height}x{width} images in patches of {model.patch_size}, {model.num_classes} classes, {gate}, {model.dtype}",
        f"          {count:,} parameters, {whole_gmacs(model):.3g} GMACs an image with all layers; starts from "
        f"{config.init_from or 'random weights'}",
    ]
