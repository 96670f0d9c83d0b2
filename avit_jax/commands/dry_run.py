"""The dry run: a run's model, work, memory, steps, schedule and data, and two steps on made-up data."""

import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from avit_jax.commands.typed_config import parse
from avit_jax.data.open import open_dataset
from avit_jax.data.settings import DataSettings
from avit_jax.execution.work import whole_gmacs
from avit_jax.model.config import AViTConfig, Preprocessing
from avit_jax.model.presets import config_from
from avit_jax.model.vit import AViT, model_of_shapes
from avit_jax.runtime.files import expanded
from avit_jax.runtime.memory import device_memory
from avit_jax.runtime.mesh import global_batch, training_mesh
from avit_jax.train.optim import peak_learning_rate
from avit_jax.train.settings import TrainSettings
from avit_jax.train.setup import prepare
from avit_jax.train.start import check_starts, resolve_model_config
from avit_jax.train.state import TrainState, initial_state, teacher_weights

IMAGENET_IMAGES = 1_281_167


def dry_run(config: ConfigDict) -> Iterator[str]:
    """The lines that train.py --dry_run prints; the line on memory comes before anything uses that memory.

    Missing data are replaced by made-up images. Raises ValueError for settings that training refuses; also, after those
    lines, if a step needs more memory than the machine has, and at the end if init_from or teacher does not exist.
    """
    settings = parse(config)
    model_config, images, data = _data(settings)
    mesh = training_mesh(settings.mesh, settings.batch_size, settings.accumulation)
    # Only shapes: the program is compiled before there is anything in memory.
    shapes = model_of_shapes(model_config)
    weights = nnx.state(shapes)
    setup = prepare(settings, shapes, mesh, images, teacher=shapes if settings.teacher else None)
    steps, schedule = setup.steps, setup.schedule
    yield f"data      {data}"
    yield from _model_lines(model_config, weights, settings)
    began = time.perf_counter()
    batch_shapes = _batch_shapes(model_config, settings.batch_size)
    program = setup.step.lower(setup.state, batch_shapes, weights if settings.teacher else None).compile()
    compiled = time.perf_counter() - began
    yield (
        f"devices   {mesh.size} {mesh.devices.flat[0].device_kind}: data {mesh.shape['data']}, fsdp "
        f"{mesh.shape['fsdp']}; {settings.batch_size // mesh.size} images each"
        + (f" in {settings.accumulation} parts" if settings.accumulation > 1 else "")
    )
    memory: Any = program.memory_analysis()
    needed = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    limit = device_memory(mesh)
    yield (
        f"memory    {needed / 1e9:.2f} GB a device"
        + (f" of {limit / 1e9:.2f} that are free" if limit else "")
        + f": {memory.argument_size_in_bytes / 1e9:.2f} state and batch, {memory.temp_size_in_bytes / 1e9:.2f} for the "
        "step (the compiler's estimate)"
    )
    yield f"steps     {steps} of {settings.batch_size} images: {settings.epochs:g} epochs"
    yield (
        f"schedule  peak {peak_learning_rate(settings.optim, settings.batch_size):.3g}; at 0, 5, 50, 95 and 100 %: "
        + ", ".join(f"{float(schedule(round(share * (steps - 1)))):.3g}" for share in (0, 0.05, 0.5, 0.95, 1))
    )
    yield f"compiled  in {compiled:.0f} s"
    if limit and needed > limit:
        raise ValueError(
            f"a step needs {needed / 1e9:.2f} GB a device and {limit / 1e9:.2f} GB are free: lower config.batch_size, "
            "raise config.accumulation, or set config.model.remat=True"
        )
    model = AViT(model_config, rngs=nnx.Rngs(settings.seed))
    start = initial_state(model, setup.optimizer, settings.optim.ema_decay, mesh)
    teacher = teacher_weights(model if settings.teacher else None, mesh)
    batch = global_batch(made_up_batch(model_config, settings.batch_size // jax.process_count()), mesh)
    yield from _two_steps(program, start, batch, teacher)
    check_starts(settings)


def _data(settings: TrainSettings) -> tuple[AViTConfig, int, str]:
    """The model configuration that fits the data, the number of training images, and a line about them."""
    try:
        dataset = open_dataset(settings.data)
    except ValueError as error:
        if not _may_be_missing(settings.data):
            raise
        fields = settings.model.given
        line = f"cannot be read here ({error}); steps are counted for ImageNet's {IMAGENET_IMAGES} images"
        channels = fields.get("in_channels", 3)
        stand_in = Preprocessing((0.5,) * channels, (0.5,) * channels)  # any numbers normalise made-up images
        return config_from(settings.model.preset, **fields, preprocessing=stand_in), IMAGENET_IMAGES, line
    images = len(dataset.train)
    line = f"{images} training, {len(dataset.val)} validation, {len(dataset.test)} test images"
    return resolve_model_config(settings.model, settings.data, dataset), images, line


def _may_be_missing(settings: DataSettings) -> bool:
    """Whether there is nothing at all at the path of the data: the only error of the data that a dry run ignores."""
    if settings.source == "tfds":
        root = expanded(settings.path or "~/tensorflow_datasets")
        return bool(settings.name) and not (root / settings.name.partition(":")[0]).exists()
    return settings.source != "mnist" and bool(settings.path) and not expanded(settings.path).exists()


def _two_steps(program: Any, state: TrainState, batch: Any, teacher: Any) -> Iterator[str]:
    for number in (1, 2):
        began = time.perf_counter()
        state, metrics = program(state, batch, teacher)
        loss = float(metrics["loss"])
        yield f"step {number}    loss {loss:.4f}, {time.perf_counter() - began:.1f} s"
    depth = float(metrics["mean_depth"])
    yield f"          mean depth {depth:.2f}; with random weights and made-up images it means nothing"


def _batch_shapes(model_config: AViTConfig, count: int) -> dict[str, jax.ShapeDtypeStruct]:
    images = jax.ShapeDtypeStruct((count, *model_config.image_shape, model_config.in_channels), np.uint8)
    return {"image": images, "label": jax.ShapeDtypeStruct((count,), np.int32)}


def made_up_batch(model_config: AViTConfig, count: int) -> dict[str, np.ndarray]:
    """A batch of noise as images, with every class in turn as labels."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (count, *model_config.image_shape, model_config.in_channels), dtype=np.uint8)
    return {"image": images, "label": (np.arange(count) % model_config.num_classes).astype(np.int32)}


def _model_lines(model_config: AViTConfig, params: nnx.State, settings: TrainSettings) -> Iterator[str]:
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    rule = model_config.rule_in_force
    said = "never halts" if rule is None else rule.describe()
    height, width = model_config.image_shape
    yield (
        f"model     {settings.model.preset or 'of its own'}: {model_config.depth} layers of width "
        f"{model_config.embed_dim}, {height}x{width} images in patches of {model_config.patch_size}, "
        f"{model_config.num_classes} classes, {said}, {model_config.dtype}"
    )
    yield (
        f"          {count:,} parameters, {whole_gmacs(model_config):.3g} GMACs an image with all layers; starts from "
        f"{settings.init_from or 'random weights'}"
    )
