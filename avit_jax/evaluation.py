"""What a model is worth: accuracy, depth, work, and speed, each image counted once."""

import dataclasses
import functools
import statistics
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

from avit_jax.config import AViTConfig
from avit_jax.data.pipeline import evaluation_batches
from avit_jax.data.sources import Split
from avit_jax.flops import image_gmacs
from avit_jax.model import AViT, AViTOutput


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Figures over a data set; depths in layers, over all tokens, special ones included."""

    images: int
    top1: float  # 0..1
    top5: float
    loss: float  # cross entropy of the mean logits, nats
    mean_depth: float
    depth_fraction: float  # mean depth / number of layers
    depth_std_tokens: float  # mean over images of the deviation within the image
    depth_std_images: float  # deviation of the images' means
    depth_histogram: tuple[float, ...]  # fraction of tokens that stopped at layer 1..L
    class_token_depth: float
    gmacs: float  # 10^9 multiply-adds per image, from the depths
    image_depths: Float[np.ndarray, " n"]  # mean depth of each image, in the data's order


def config_gmacs(token_depth: Int[Array, "b n"], config: AViTConfig) -> Float[Array, " b"]:
    """10^9 multiply-adds of each image for this architecture (flops.image_gmacs)."""
    return image_gmacs(
        token_depth,
        depth=config.depth,
        embed_dim=config.embed_dim,
        mlp_dim=config.mlp_dim,
        patch_values=config.patch_size**2 * config.in_channels,
        num_special=config.num_special,
        num_classes=config.num_classes,
    )


@functools.partial(jax.jit, static_argnums=0)
def _evaluation_step(graphdef: nnx.GraphDef, params: nnx.State, batch: dict[str, Array]) -> dict[str, Array]:
    model = nnx.merge(graphdef, params)
    output, label, weight = model(batch["image"]), batch["label"], batch["weight"]
    own = jnp.take_along_axis(output.logits, label[:, None], axis=1)
    # Ties and NaN count against the model: a constant or broken one scores nothing.
    rank = output.logits.shape[-1] - (output.logits < own).sum(-1)
    depth = output.token_depth.astype(jnp.float32)
    layers = jnp.arange(1, model.config.depth + 1)
    return {
        "top1": weight @ (rank <= 1),
        "top5": weight @ (rank <= 5),
        "loss": weight @ optax.softmax_cross_entropy_with_integer_labels(output.logits, label),
        "histogram": weight @ (output.token_depth[:, :, None] == layers).mean(1),
        "class_token_depth": weight @ depth[:, 0],
        "gmacs": weight @ config_gmacs(output.token_depth, model.config),
        "std_tokens": weight @ depth.std(1),
        "image_depths": depth.mean(1),
    }


def evaluate(model: AViT, split: Split, batch_size: int) -> Evaluation:
    """Masked execution over a data set, jit-compiled; the short last batch is padded, the padding weighs nothing.

    Raises ValueError where a label lies outside the model's classes.
    """
    if split.labels.min() < 0 or split.labels.max() >= model.config.num_classes:
        raise ValueError(
            f"labels run from {split.labels.min()} to {split.labels.max()}, the model has {model.config.num_classes} "
            "classes: 0..num_classes - 1 is allowed"
        )
    graphdef, params = nnx.split(model)
    sums: dict[str, np.ndarray] = {}
    image_depths = []
    for batch in evaluation_batches(split, model.config, batch_size):
        result = jax.device_get(_evaluation_step(graphdef, params, batch))
        image_depths.append(result.pop("image_depths")[batch["weight"] > 0])
        for name, value in result.items():
            sums[name] = sums.get(name, 0) + np.asarray(value, np.float64)
    means = {name: value / len(split) for name, value in sums.items()}
    depths = np.concatenate(image_depths)
    mean_depth = float(depths.mean(dtype=np.float64))
    return Evaluation(
        images=len(split),
        top1=float(means["top1"]),
        top5=float(means["top5"]),
        loss=float(means["loss"]),
        mean_depth=mean_depth,
        depth_fraction=mean_depth / model.config.depth,
        depth_std_tokens=float(means["std_tokens"]),
        depth_std_images=float(depths.std(dtype=np.float64)),
        depth_histogram=tuple(means["histogram"].tolist()),
        class_token_depth=float(means["class_token_depth"]),
        gmacs=float(means["gmacs"]),
        image_depths=depths,
    )


@functools.partial(jax.jit, static_argnums=0)
def _forward(graphdef: nnx.GraphDef, params: nnx.State, images: Array) -> AViTOutput:
    return nnx.merge(graphdef, params)(images)


def predict(model: AViT, images: Float[np.ndarray, "b h w c"]) -> AViTOutput:
    """The model's output, jit-compiled; masked execution."""
    return _forward(*nnx.split(model), images)


def images_per_second(models: Sequence[AViT], images: Float[np.ndarray, "b h w c"], rounds: int = 7) -> list[float]:
    """Throughput of each model on the same batch: median of `rounds` (at least 5) warm runs, the models in turn.

    The batch lies on the device, outputs are awaited; masked execution.
    """
    batch = jax.device_put(images)
    parts = [nnx.split(model) for model in models]
    times: list[list[float]] = [[] for _ in models]
    for timed in [False] + [True] * max(rounds, 5):
        for (graphdef, params), seconds in zip(parts, times, strict=True):
            began = time.perf_counter()
            jax.block_until_ready(_forward(graphdef, params, batch))
            if timed:
                seconds.append(time.perf_counter() - began)
    return [len(images) / statistics.median(seconds) for seconds in times]
