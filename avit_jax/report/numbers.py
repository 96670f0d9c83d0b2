"""The report's numbers, as plain JSON; the page shows no others."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from avit_jax.evaluate.calibration import reliability
from avit_jax.evaluate.figures import Evaluation, ImageFigures
from avit_jax.evaluate.intervals import bootstrap_difference, bootstrap_means, share
from avit_jax.execution.work import whole_gmacs
from avit_jax.model.config import AViTConfig
from avit_jax.report.names import class_names, printable

DEPTH_BINS = 10


def only_layer(shares: Sequence[float]) -> int | None:
    """The layer, from 1, that has the whole, which is 1; None if there are several, or tokens of no layer."""
    whole = np.flatnonzero(np.asarray(shares) == 1)
    return int(whole[0]) + 1 if len(whole) == 1 else None


def evaluation_numbers(result: Evaluation, model_config: AViTConfig) -> dict[str, Any]:
    """The numbers of one model: a summary, and depth and accuracy by layer, position, class and confidence."""
    numbers = {
        "summary": summary(result, model_config),
        "by_layer": _by_layer(result),
        "class_token": _shares(result.per_image.class_token_depth, model_config.depth),
        "by_position": np.reshape(result.depth_by_token[model_config.num_special :], model_config.patch_grid).tolist(),
        "special_tokens": list(result.depth_by_token[: model_config.num_special]),
    }
    if result.labelled:
        numbers["by_depth"] = by_depth(result.per_image)
        numbers["right_and_wrong"] = _right_and_wrong(result.per_image)
        numbers["by_class"] = by_class(result.per_image, class_names(model_config))
        numbers["calibration"] = _calibration(result.per_image)
    return numbers


def summary(result: Evaluation, model_config: AViTConfig) -> dict[str, Any]:
    """The figures of eval.py; those that are means over images have a 95 % bootstrap interval over images."""
    images = result.per_image
    columns = {"mean_depth": images.mean_depth, "class_token_depth": images.class_token_depth, "gmacs": images.gmacs}
    if result.labelled:
        columns |= {"top1": images.rank <= 1, "top5": images.rank <= 5, "loss": images.loss}
    intervals = bootstrap_means(np.stack(list(columns.values())).astype(np.float64))
    found: dict[str, Any] = {
        name: {"value": getattr(result, name), "low": low, "high": high}
        for name, (low, high) in zip(columns, intervals, strict=True)
    }
    return found | {
        "images": result.images,
        "labelled": result.labelled,
        "one_depth": bool(np.ptp(images.mean_depth) == 0),  # all images have the same mean depth
        "not_finite": int((~np.isfinite(images.confidence)).sum()),
        "never_computed": result.never_computed,
        "depth_fraction": result.depth_fraction,
        "depth_std_tokens": result.depth_std_tokens,
        "depth_std_images": result.depth_std_images,
        "gmacs_whole": whole_gmacs(model_config),
        "executed_gmacs": result.executed_gmacs,
        "executed_depth": result.executed_depth,
    }


def _shares(values: np.ndarray, depth: int) -> list[float]:
    return (np.bincount(values, minlength=depth + 1)[1:] / len(values)).tolist()


def _by_layer(result: Evaluation) -> list[dict[str, Any]]:
    """For each layer the tokens that it computes, and those of this depth, as fractions of all tokens."""
    pairs = zip(result.computed_by_layer, result.depth_histogram, strict=True)
    return [{"layer": layer, "computed": c, "stopped": s} for layer, (c, s) in enumerate(pairs, start=1)]


def by_depth(images: ImageFigures, bins: int = DEPTH_BINS) -> list[dict[str, Any]]:
    """Images ordered by mean depth, in bins of equal numbers; images of the same depth stay in the data's order."""
    order = np.argsort(images.mean_depth, kind="stable")
    found = []
    for part in np.array_split(order, min(bins, len(order))):
        right = int((images.rank[part] <= 1).sum())
        low, high = share(right, len(part))
        depths = images.mean_depth[part].astype(np.float64)
        found.append(
            {
                "images": len(part),
                "depth_low": float(depths.min()),
                "depth_high": float(depths.max()),
                "mean_depth": float(depths.mean()),
                "top1": right / len(part),
                "low": low,
                "high": high,
            }
        )
    return found


def _right_and_wrong(images: ImageFigures) -> dict[str, Any]:
    """Mean depth of the images that are classified wrongly and rightly, and the difference with its interval.

    finding: whether the wrong ones, which are harder, cost "more" or "less"; "no difference" if the interval contains
    0; None if there are too few to compare.
    """
    right = images.rank <= 1
    depth = images.mean_depth.astype(np.float64)
    low, high = bootstrap_difference(depth[~right], depth[right])
    return {
        "wrong": int((~right).sum()),
        "depth_right": float(depth[right].mean()) if right.any() else math.nan,
        "depth_wrong": float(depth[~right].mean()) if (~right).any() else math.nan,
        "low": low,
        "high": high,
        "finding": None if math.isnan(low) else "more" if low > 0 else "less" if high < 0 else "no difference",
    }


def by_class(images: ImageFigures, names: tuple[str, ...]) -> list[dict[str, Any]]:
    """Accuracy, depth and work of each class that the data have, in the order of `names`, the class names."""
    counts = np.bincount(images.label, minlength=len(names))

    def means(values: np.ndarray) -> np.ndarray:
        return np.bincount(images.label, weights=values, minlength=len(names)) / np.maximum(counts, 1)

    right = np.bincount(images.label, weights=images.rank <= 1, minlength=len(names)).astype(int)
    depth, token, gmacs = (means(v) for v in (images.mean_depth, images.class_token_depth, images.gmacs))
    return [
        {
            "name": names[k],
            "images": int(counts[k]),
            "top1": right[k] / counts[k],
            "mean_depth": depth[k],
            "class_token_depth": token[k],
            "gmacs": gmacs[k],
        }
        for k in np.flatnonzero(counts)
    ]


def _calibration(images: ImageFigures) -> dict[str, Any]:
    found = reliability(images.confidence, images.rank <= 1)
    rows = zip(found.edges[:-1], found.edges[1:], found.counts, found.confidence, found.accuracy, strict=True)
    names = ("above", "up_to", "images", "confidence", "accuracy")
    confidence = float(np.nan_to_num(images.confidence).mean(dtype=np.float64))
    bins = [dict(zip(names, row, strict=True)) for row in rows if row[2]]
    return {"ece": found.ece, "mean_confidence": confidence, "all_bins": len(found.counts), "bins": bins}


def disagreements(ours: Evaluation, theirs: Evaluation) -> dict[str, Any]:
    """Two models on the same images: where their answers differ, and the difference in top-1 with its interval."""
    a, b = ours.per_image, theirs.per_image
    found: dict[str, Any] = {"images": ours.images, "differ": int((a.prediction != b.prediction).sum())}
    if ours.labelled:
        right, other = a.rank <= 1, b.rank <= 1
        ((low, high),) = bootstrap_means((right.astype(np.float64) - other)[None])
        found |= {
            "both_right": int((right & other).sum()),
            "only_ours": int((right & ~other).sum()),
            "only_theirs": int((~right & other).sum()),
            "both_wrong": int((~right & ~other).sum()),
            "difference": {"value": ours.top1 - theirs.top1, "low": low, "high": high},
        }
    return found


def as_json(value: Any) -> Any:
    """Plain JSON: NumPy's scalars as Python's, tuples as lists, and None for a number that is not finite.

    Text is made printable, because file names and command lines may contain what no page and no terminal can show.
    """
    if isinstance(value, dict):
        return {name: as_json(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_json(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, str):
        return printable(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value
