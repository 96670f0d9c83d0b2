"""What a model is worth: accuracy, depth, work, and speed, each image counted once."""

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from avit_jax.config import AViTConfig
from avit_jax.data.pipeline import evaluation_batches
from avit_jax.data.sources import Images
from avit_jax.flops import image_gmacs
from avit_jax.mesh import batch_sharding, replicated
from avit_jax.model import AViT, AViTOutput
from avit_jax.packed import compile_packed
from avit_jax.plan import executed_gmacs, layer_loads

EXECUTIONS = ("masked", "packed")


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
    executed_depth: float  # layers computed for a token on average, by this execution
    executed_gmacs: float  # 10^9 multiply-adds per image that were performed, padding included
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
def _figures(config: AViTConfig, output: AViTOutput, batch: dict[str, Array]) -> dict[str, Array]:
    """Sums over a batch, by each image's weight."""
    label, weight = batch["label"], batch["weight"]
    own = jnp.take_along_axis(output.logits, label[:, None], axis=1)
    # Ties and NaN count against the model: a constant or broken one scores nothing.
    rank = output.logits.shape[-1] - (output.logits < own).sum(-1)
    depth = output.token_depth.astype(jnp.float32)
    layers = jnp.arange(1, config.depth + 1)
    return {
        "top1": weight @ (rank <= 1),
        "top5": weight @ (rank <= 5),
        "loss": weight @ optax.softmax_cross_entropy_with_integer_labels(output.logits, label),
        "histogram": weight @ (output.token_depth[:, :, None] == layers).mean(1),
        "class_token_depth": weight @ depth[:, 0],
        "gmacs": weight @ config_gmacs(output.token_depth, config),
        "std_tokens": weight @ depth.std(1),
        "image_depths": depth.mean(1),
    }


def evaluate(model: AViT, split: Images, batch_size: int, execution: str = "masked") -> Evaluation:
    """The model over a data set, jit-compiled; the short last batch is padded, the padding weighs nothing.

    execution: "masked" or "packed"; the figures are the rule's and the same for both, except for what was executed
    (packed: with image exit, as compile_packed does by default). A model that never halts is always executed whole.
    Raises ValueError where a label lies outside the model's classes, and for another execution.
    """
    if execution not in EXECUTIONS:
        raise ValueError(f"execution {execution!r} is unknown: choose one of {', '.join(EXECUTIONS)}")
    packed = None
    if execution == "packed" and model.config.halts:
        packed = compile_packed(model, batch_size, image_exit=False)
    labels = split.labels  # None: they are looked at as they come
    if labels is not None and (labels.min() < 0 or labels.max() >= model.config.num_classes):
        raise ValueError(
            f"labels run from {labels.min()} to {labels.max()}, the model has {model.config.num_classes} "
            "classes: 0..num_classes - 1 is allowed"
        )
    program = packed or masked_program(model)
    sums: dict[str, np.ndarray] = {}
    image_depths, loads = [], []
    for batch in evaluation_batches(split, model.config, batch_size):
        output = program(batch["image"])
        result = jax.device_get(_figures(model.config, output, batch))
        image_depths.append(result.pop("image_depths")[batch["weight"] > 0])
        if packed:
            own = np.where(batch["weight"][:, None] > 0, output.token_depth, 0)
            loads.append(layer_loads(own, model.config.num_special, model.config.depth, image_exit=True))
        for name, value in result.items():
            sums[name] = sums.get(name, 0) + np.asarray(value, np.float64)
    depths = np.concatenate(image_depths)
    count = len(depths)  # without the bad ones that were skipped
    means = {name: value / count for name, value in sums.items()}
    mean_depth = float(depths.mean(dtype=np.float64))
    whole = np.full((1, model.config.num_tokens), model.config.depth, np.int32)
    executed_depth = float(model.config.depth)
    performed = float(config_gmacs(jnp.asarray(whole), model.config)[0])
    if packed:
        stacked = np.stack(loads)
        executed_depth = stacked.sum() / (count * model.config.num_tokens)
        # Padding images are empty: the mean is over real ones.
        performed = executed_gmacs(stacked, packed.plan, model.config, count)
    return Evaluation(
        images=count,
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
        executed_depth=executed_depth,
        executed_gmacs=performed,
        image_depths=depths,
    )


@functools.partial(jax.jit, static_argnums=0)
def _forward(graphdef: nnx.GraphDef, params: nnx.State, images: Array) -> AViTOutput:
    return nnx.merge(graphdef, params)(images)


def masked_program(model: AViT, mesh: Mesh | None = None) -> Callable[[Array | np.ndarray], AViTOutput]:
    """The model as it stands, jit-compiled; masked execution, on all devices of the mesh where one is given."""
    graphdef, params = nnx.split(model)
    return functools.partial(_forward, graphdef, jax.device_put(params, replicated(mesh)) if mesh else params)


def predict(model: AViT, images: Float[np.ndarray, "b h w c"]) -> AViTOutput:
    """The model's output, jit-compiled; masked execution."""
    return masked_program(model)(images)


def images_per_second(
    programs: Sequence[Callable[[Array | np.ndarray], AViTOutput]],
    images: Float[np.ndarray, "b h w c"],
    mesh: Mesh,
    rounds: int = 7,
) -> list[float]:
    """Throughput of each program on the same batch: median of `rounds` (at least 5) warm runs, the programs in turn.

    The batch lies on the mesh's devices, split over them; outputs are awaited.
    """
    batch = jax.device_put(images, batch_sharding(mesh))
    times: list[list[float]] = [[] for _ in programs]
    for timed in [False] + [True] * max(rounds, 5):
        for program, seconds in zip(programs, times, strict=True):
            began = time.perf_counter()
            jax.block_until_ready(program(batch))
            if timed:
                seconds.append(time.perf_counter() - began)
    return [len(images) / statistics.median(seconds) for seconds in times]
