"""Figures of a model on a data set: accuracy, depth and work, with each image counted once."""

import collections
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from avit_jax.data.pipeline import evaluation_batches
from avit_jax.data.preprocessing import normalize
from avit_jax.data.sources import Images
from avit_jax.execution.program import compile, suited
from avit_jax.execution.work import output_gmacs
from avit_jax.model.config import AViTConfig
from avit_jax.model.output import GatedOutput
from avit_jax.model.vit import AViT, AViTOutput
from avit_jax.runtime.bars import counted
from avit_jax.runtime.mesh import batch_sharding
from avit_jax.runtime.processes import gathered


@dataclasses.dataclass(frozen=True)
class ImageFigures:
    """The numbers that are kept of each image, 44 bytes, in the data's order."""

    index: Int[np.ndarray, " n"]  # index in the data; bad images that were skipped are left out
    label: Int[np.ndarray, " n"]  # -1: the data have none
    prediction: Int[np.ndarray, " n"]
    confidence: Float[np.ndarray, " n"]  # softmax of the predicted class, 0..1; NaN if the logits are
    rank: Int[np.ndarray, " n"]  # of the label among the logits: 1 is top-1; ties and NaN count against the model
    loss: Float[np.ndarray, " n"]  # cross entropy of the mean logits, nats
    mean_depth: Float[np.ndarray, " n"]  # over all tokens, layers
    depth_std: Float[np.ndarray, " n"]  # deviation between the tokens of the image
    class_token_depth: Int[np.ndarray, " n"]  # 0 if the model has no class token
    gmacs: Float[np.ndarray, " n"]  # 10^9 multiply-adds, from the depths


@dataclasses.dataclass(frozen=True)
class Totals:
    """Sums over a part of a data set. Parts are added with +; sums of depths are integers, and so exact."""

    images: ImageFigures
    depth_histogram: Int[np.ndarray, " l"]  # tokens of depth 1..L
    computed_by_layer: Int[np.ndarray, " l"]  # tokens that layer 1..L computes, by the rule
    depth_by_token: Int[np.ndarray, " n"]  # sum over images, special tokens first
    executed_slots: int  # tokens times layers that were computed, without padding
    executed_gmacs: float  # 10^9 multiply-adds performed, padding included

    def __add__(self, other: "Totals") -> "Totals":
        images = {
            field.name: np.concatenate([getattr(self.images, field.name), getattr(other.images, field.name)])
            for field in dataclasses.fields(ImageFigures)
        }
        sums = {
            field.name: getattr(self, field.name) + getattr(other, field.name)
            for field in dataclasses.fields(Totals)
            if field.name != "images"
        }
        return Totals(images=ImageFigures(**images), **sums)


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Figures over a data set; depths in layers, over all tokens, special ones included.

    If the data have no labels, top1, top5 and loss are NaN.
    """

    images: int
    top1: float  # 0..1
    top5: float
    loss: float  # cross entropy of the mean logits, nats
    mean_depth: float
    depth_fraction: float  # mean depth / number of layers
    depth_std_tokens: float  # mean over images of the deviation within the image
    depth_std_images: float  # deviation of the images' means
    depth_histogram: tuple[float, ...]  # fraction of tokens of depth 1..L; no layer computes the others
    computed_by_layer: tuple[float, ...]  # fraction of tokens that layer 1..L computes, by the rule
    depth_by_token: tuple[float, ...]  # mean over images of each token's depth, special tokens first
    class_token_depth: float
    gmacs: float  # 10^9 multiply-adds per image, from the depths
    # The cost of this execution (packed: with image exit, the default of compile_packed).
    executed_depth: float  # mean layers computed per token
    executed_gmacs: float  # 10^9 multiply-adds per image, padding included
    per_image: ImageFigures

    @property
    def labelled(self) -> bool:
        """Whether the data have labels."""
        return bool((self.per_image.label >= 0).all())

    @property
    def never_computed(self) -> float:
        """The fraction of tokens that no layer computes, 0..1; rounding of the other fractions is taken as none."""
        rest = 1 - sum(self.depth_histogram)
        return rest if rest > 1e-9 else 0.0

    @property
    def image_depths(self) -> Float[np.ndarray, " n"]:
        """Mean depth of each image, in the data's order."""
        return self.per_image.mean_depth


_normalized = jax.jit(normalize, static_argnums=1)


@functools.partial(jax.jit, static_argnums=0)
def _of_images(config: AViTConfig, output: AViTOutput, label: Int[Array, " b"]) -> dict[str, Array]:
    """ImageFigures of a batch."""
    logits, depth = output.logits, output.token_depth.astype(jnp.float32)
    own = jnp.take_along_axis(logits, jnp.maximum(label, 0)[:, None], axis=1)
    return {
        "prediction": logits.argmax(-1),
        "confidence": jax.nn.softmax(logits).max(-1),
        # Ties and NaN count against the model: a constant or broken one scores nothing.
        "rank": logits.shape[-1] - (logits < own).sum(-1),
        "loss": optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(label, 0)),
        "mean_depth": depth.mean(1),
        "depth_std": depth.std(1),
        "class_token_depth": output.token_depth[:, 0] if config.class_token else jnp.zeros(len(label), jnp.int32),
        "gmacs": output_gmacs(config, output),
    }


def evaluate(
    model: AViT,
    split: Images,
    batch_size: int,
    execution: str = "masked",
    mesh: Mesh | None = None,
    *,
    before_batch: Callable[[], None] | None = None,
) -> Evaluation:
    """Evaluate the model on a data set, jit-compiled. The short last batch is padded, and padding does not count.

    batch_size: images of all processes together. execution: as in compile, if the rule leaves a choice
    (program.suited). All figures follow from the rule and are the same for every execution, except executed_depth and
    executed_gmacs. Packed execution runs without image exit here, because all depths are needed; its work is counted
    with image exit, the default of compile_packed. mesh: batches are split over it; None: one device. before_batch:
    called before every batch; it may raise, to stop the evaluation.

    If all labels are -1, the data have none. Raises ValueError for a label outside the model's classes, for a model
    without a head, and for an unknown execution.
    """
    share = totals(model, split, batch_size, execution, mesh, before_batch=before_batch)
    return figures(share if jax.process_count() == 1 else _of_all_processes(share), model.config)


def _of_all_processes(share: Totals) -> Totals:
    """The sum of the processes' totals, images in the data's order."""
    images = {field.name: gathered(getattr(share.images, field.name)) for field in dataclasses.fields(ImageFigures)}
    order = np.argsort(images["index"], kind="stable")

    def total(value: Any) -> Any:
        return gathered(np.asarray(value)[None]).sum(0)

    return Totals(
        ImageFigures(**{name: values[order] for name, values in images.items()}),
        total(share.depth_histogram),
        total(share.computed_by_layer),
        total(share.depth_by_token),
        int(total(share.executed_slots)),
        float(total(share.executed_gmacs)),
    )


def totals(
    model: AViT,
    split: Images,
    batch_size: int,
    execution: str = "masked",
    mesh: Mesh | None = None,
    *,
    before_batch: Callable[[], None] | None = None,
) -> Totals:
    """The sums that evaluate computes its figures from; arguments as for evaluate.

    Totals of the parts of a data set, added with +, are those of the whole. With several processes, these are the
    totals of this process's share, which is a part of every batch.
    """
    process, processes = jax.process_index(), jax.process_count()
    own = batch_size // processes
    config = model.config
    chosen = suited(config, execution).execution
    if not config.num_classes:
        raise ValueError("the model has no head (num_classes 0), so there is nothing to evaluate: load one with a head")
    if split.labels is not None:  # otherwise each batch is checked
        _check_labels(split.labels, config)
    program = compile(model, own, execution=chosen, image_exit=False, mesh=mesh)
    images: list[dict[str, np.ndarray]] = []
    histogram, computed = np.zeros((2, config.depth), np.int64)
    by_token = np.zeros(config.num_tokens, np.int64)
    slots = 0
    performed: collections.Counter[float] = collections.Counter()  # images by their GMACs; mostly there is one number
    batches = evaluation_batches(split, config, batch_size, process_index=process, process_count=processes)
    if process == 0:  # only one of several processes shows progress
        batches = counted(batches, "evaluating", -(-len(split) // batch_size), "batches")
    for number, batch in enumerate(batches):
        if before_batch is not None:
            before_batch()
        real = np.asarray(batch["weight"]) > 0
        _check_labels(batch["label"][real], config)
        pixels = jax.device_put(batch["image"], batch_sharding(mesh)) if mesh else batch["image"]
        output = program(_normalized(pixels, config) if pixels.dtype == np.uint8 else pixels)
        found = jax.device_get(_of_images(config, output, batch["label"]))
        found |= {"label": batch["label"], "index": number * batch_size + process * own + np.arange(own)}
        images.append({name: values[real] for name, values in found.items()})
        depth = np.where(real[:, None], output.token_depth, 0)
        of_depth = np.bincount(depth.ravel(), minlength=config.depth + 1)[1:]
        histogram += of_depth
        if isinstance(output, GatedOutput):
            computed += np.rint(np.asarray(output.computed)[:, real].sum(1)).astype(np.int64)
        else:
            computed += _at_least(of_depth)
        by_token += depth.sum(0)
        count = int(real.sum())
        if count:  # in the last batch a process may have no images
            executed = program.executed(depth, count, output)
            slots += executed.slots
            performed[executed.gmacs] += count
    columns = {name: np.concatenate([part[name] for part in images]) for name in images[0]}
    gmacs = sum(each * count for each, count in performed.items())
    return Totals(ImageFigures(**columns), histogram, computed, by_token, slots, float(gmacs))


def _at_least(of_depth: Int[np.ndarray, " l"]) -> Int[np.ndarray, " l"]:
    """Tokens of at least this depth; a layer computes them if a token that stops never comes back."""
    return of_depth[::-1].cumsum()[::-1]


def _check_labels(labels: Int[np.ndarray, " n"], config: AViTConfig) -> None:
    low, high = labels.min(initial=config.num_classes), labels.max(initial=-1)
    if high >= config.num_classes or (low < 0 and not low == high == -1):
        raise ValueError(
            f"labels run from {low} to {high}, the model has {config.num_classes} classes: labels must be "
            "0..num_classes - 1, or all -1 if there are none"
        )


def figures(found: Totals, config: AViTConfig) -> Evaluation:
    """The figures of a data set from its totals."""
    images = found.images
    count = len(images.label)

    def mean(values: np.ndarray) -> float:
        return float(values.mean(dtype=np.float64))

    labelled = bool((images.label >= 0).all())
    tokens = count * config.num_tokens
    mean_depth = float(found.depth_by_token.sum() / tokens)
    return Evaluation(
        images=count,
        top1=mean(images.rank <= 1) if labelled else math.nan,
        top5=mean(images.rank <= 5) if labelled else math.nan,
        loss=mean(images.loss) if labelled else math.nan,
        mean_depth=mean_depth,
        depth_fraction=mean_depth / config.depth,
        depth_std_tokens=mean(images.depth_std),
        depth_std_images=float(images.mean_depth.std(dtype=np.float64)),
        depth_histogram=tuple((found.depth_histogram / tokens).tolist()),
        computed_by_layer=tuple((found.computed_by_layer / tokens).tolist()),
        depth_by_token=tuple((found.depth_by_token / count).tolist()),
        class_token_depth=mean(images.class_token_depth),
        gmacs=mean(images.gmacs),
        executed_depth=found.executed_slots / tokens,
        executed_gmacs=found.executed_gmacs / count,
        per_image=images,
    )
