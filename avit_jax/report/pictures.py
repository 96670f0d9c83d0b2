"""Pictures of a run: depth maps beside their images, the histogram of depths, the curves of training."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from jaxtyping import Float, Int, UInt8
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from avit_jax.data.pipeline import evaluation_images
from avit_jax.data.preprocessing import normalize
from avit_jax.data.sources import Images
from avit_jax.evaluate.figures import Evaluation
from avit_jax.execution.compiled import predict
from avit_jax.model.config import AViTConfig
from avit_jax.model.vit import AViT
from avit_jax.report.depth_colours import COLOURS, scale, ticks
from avit_jax.report.names import class_names, verdict
from avit_jax.report.numbers import only_layer
from avit_jax.runtime.files import replacing, writing

_TITLE = 16  # characters of a class name that fit over a picture
# Names are plain text: "$x$" is not a formula, and LaTeX is never run.
plain_text = matplotlib.rc_context({"text.parse_math": False, "text.usetex": False})
_DENSE, _ADAPTIVE = "#7a7a7a", "#21698a"


def depth_map(token_depth: Int[np.ndarray, " n"], model_config: AViTConfig) -> Int[np.ndarray, "rows columns"]:
    """The depths of one image's patches, laid out as the image is: row 0 at the top."""
    return token_depth[model_config.num_special :].reshape(model_config.patch_grid)


@plain_text
def draw_depth_maps(
    model: AViT, split: Images, image_depths: Float[np.ndarray, " n"], path: Path, columns: int = 8
) -> Path:
    """Draw the images with the lowest and the highest mean depth, each above its map of token depths, in layers.

    image_depths: the mean depth of each image. columns: images in a row. Under a reduction rule all images have the
    same mean depth, so the first and the last ones are drawn. Returns the path.
    """
    columns = min(columns, len(split) // 2 or 1)
    order = np.argsort(image_depths, kind="stable")
    config = model.config
    names = class_names(config, _TITLE)
    rule, titles = config.rule_in_force, ("fewest\nlayers", "most\nlayers")
    said_of = "The test images on which A-ViT spends the fewest and the most layers"
    if rule is not None and rule.name != "avit":
        said_of = f"The test images with the fewest and the most layers: {rule.describe()}"
    if config.reduction is not None:
        said_of, titles = f"Test images, and where their tokens stop: {config.reduction.describe()}", ("", "")
    figure = Figure(figsize=(1.5 * columns + 1.2, 7.2), layout="constrained")
    axes = figure.subplots(4, columns, squeeze=False)
    for row, (title, chosen) in enumerate(zip(titles, (order[:columns], order[::-1][:columns]), strict=True)):
        images = evaluation_images(split, chosen, config)
        output = predict(model, normalize(images, config))
        depths, predicted = np.asarray(output.token_depth), np.asarray(output.logits.argmax(-1))
        for column, index in enumerate(chosen):
            above, below = axes[2 * row][column], axes[2 * row + 1][column]
            show_image(above, images[column])
            label, guess = int(split[int(index)]["label"]), int(predicted[column])
            right = guess == label if label >= 0 else None
            said = verdict(names[guess], names[label] if label >= 0 else None, right)
            colour = "#b00020" if right is False else "black"
            above.set_title(said.replace(", ", ",\n", 1) if right is False else said, fontsize=8.5, color=colour)
            below.imshow(depth_map(depths[column], config), cmap=COLOURS, norm=scale(config.depth))
            below.set_title(f"mean {image_depths[index]:.2f}", fontsize=8.5)
        axes[2 * row][0].set_ylabel(title, fontsize=10)
        axes[2 * row + 1][0].set_ylabel("token\ndepth", fontsize=10)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    bar = ScalarMappable(scale(config.depth), cmap=COLOURS)
    figure.colorbar(bar, ax=axes, label="layers that computed the token", ticks=ticks(config.depth), shrink=0.7)
    figure.suptitle(said_of, fontsize=11)
    return save_picture(figure, path)


def show_image(axis: Any, image: UInt8[np.ndarray, "h w c"]) -> None:
    """Show an image for people on an axis."""
    if image.shape[-1] == 3:
        axis.imshow(image)
    else:  # one channel, or the first of several that are not colours
        axis.imshow(image[..., 0], cmap="gray", vmin=0, vmax=255)


@plain_text
def draw_depth_histogram(result: Evaluation, path: Path, class_token: bool = True) -> Path:
    """Draw the share of tokens of each depth, their mean depth and, if there is one, the class token's.

    If all tokens have the same depth, the picture is a sentence. class_token: whether the model has one. Returns the
    path.
    """
    if layer := only_layer(result.depth_histogram):
        figure = Figure(figsize=(7, 0.7))
        depth = len(result.depth_histogram)
        said = f"All tokens of the {result.images:,} images have a depth of {layer} of {depth} layers."
        figure.text(0.5, 0.5, said, ha="center", va="center", fontsize=11)
        return save_picture(figure, path)
    shares = [result.never_computed, *result.depth_histogram]
    least = 0 if shares[0] else 1
    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.subplots()
    axis.bar(np.arange(least, len(shares)), np.asarray(shares[least:]) * 100, color=_ADAPTIVE)
    axis.axvline(result.mean_depth, color="black", linestyle="--", label=f"mean depth {result.mean_depth:.2f}")
    if class_token:
        text = f"class token {result.class_token_depth:.2f}"
        axis.axvline(result.class_token_depth, color="#b5541c", linestyle=":", label=text)
    axis.set(xlabel="layers that computed the token", ylabel="tokens (%)")
    axis.xaxis.set_major_locator(MaxNLocator(12, integer=True))
    axis.set_title(f"Token depths over {result.images:,} images")
    axis.legend()
    return save_picture(figure, path)


@plain_text
def draw_curves(lines: Sequence[dict[str, Any]], path: Path, depth: int) -> Path:
    """Draw loss, accuracy and mean depth over the steps of training, for training and validation; returns the path.

    lines: of metrics.jsonl. depth: layers of the model.
    """
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    axes = figure.subplots(1, 3)
    for axis, (name, label) in zip(
        axes, (("loss", "loss (nats)"), ("accuracy", "top-1 (%)"), ("mean_depth", "mean depth (layers)")), strict=True
    ):
        for split, colour, text in (("train", _DENSE, "training"), ("val", _ADAPTIVE, "validation")):
            points = [line for line in lines if line["split"] == split]
            factor = 100 if name == "accuracy" else 1
            marker = "o" if split == "val" or len(points) == 1 else None  # a line of one point is invisible
            axis.plot(
                [p["step"] for p in points],
                [p[name] * factor for p in points],
                color=colour,
                label=text,
                marker=marker,
                markersize=3,
            )
        axis.set(xlabel="step", ylabel=label)
        axis.grid(alpha=0.3)
    axes[0].legend()
    axes[2].set_ylim(0, depth + 0.5)
    halting = any(line.get("ponder") or line.get("prior") for line in lines)  # other rules have no such terms
    terms = "its loss includes the weighted ponder and prior terms; " if halting else ""
    figure.suptitle(f"Training ({terms}validation: only cross entropy)", fontsize=10)
    return save_picture(figure, path)


def draw_run(
    model: AViT, images: Images, result: Evaluation, lines: Sequence[dict[str, Any]], workdir: Path
) -> list[Path]:
    """Draw the pictures of a run in its folder; for a model without a rule only the curves.

    images: the test images that `result` is of. lines: of the run's metrics.jsonl. Returns the files.
    """
    pictures = [draw_curves(lines, workdir / "curves.png", model.config.depth)]
    if model.config.rule_in_force is not None:
        pictures.append(draw_depth_maps(model, images, result.image_depths, workdir / "depth_maps.png"))
        has_one = model.config.class_token
        pictures.append(draw_depth_histogram(result, workdir / "depth_histogram.png", class_token=has_one))
    return pictures


def save_picture(figure: Figure, path: Path) -> Path:
    """Write the picture. Characters that matplotlib's font lacks are drawn as boxes, without a warning."""
    with warnings.catch_warnings(), writing(path), replacing(path) as partial:
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure.savefig(partial, dpi=130, format="png")
    return path
