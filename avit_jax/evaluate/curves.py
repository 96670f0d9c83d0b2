"""Curves of a comparison: each method's accuracy by work and by measured speed, interpolated between settings."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from avit_jax.evaluate.intervals import Interval, bootstrap_means
from avit_jax.evaluate.rows import GROUPS, STATIC, STATIC_SHORT, Row, correct_images

_NEAR_AN_END = 0.02  # of a curve, as a share of the value


@dataclasses.dataclass(frozen=True)
class Point:
    """A method at one budget: means over its seeds. gain: top-1, or agreement with the static model without labels."""

    gain: float  # 0..1
    low: float  # of the seeds
    high: float
    gmacs: float
    speed: float  # images/s at the best batch, scaled: the ratio times the static model's images/s on one day
    ratio: float  # of images/s to the static model with a short last layer, each at its best batch
    ratio_alone: float  # the same at batch 1
    rows: tuple[Row, ...]


@dataclasses.dataclass(frozen=True)
class Curve:
    """A method's points, by GMACs."""

    group: str
    method: str
    points: tuple[Point, ...]

    def nearest(self, budget: float) -> Point:
        """The point whose budget is nearest to this one."""
        return min(self.points, key=lambda point: abs((point.rows[0]["budget"] or 1) - budget))

    def between(self, cost: str, value: float) -> list[tuple[float, Point]] | None:
        """Two neighbouring points and their shares, which add up to 1, for linear interpolation at a value of `cost`.

        cost: "gmacs", "speed" or "ratio". An end of the curve stands for values within 2 % of it, because a setting
        meets its budget only about so well. None if the value lies further outside.
        """
        points = sorted(self.points, key=lambda point: getattr(point, cost))
        costs = [getattr(point, cost) for point in points]
        inside = min(max(value, costs[0]), costs[-1])
        if abs(inside - value) > _NEAR_AN_END * value:
            return None
        value = inside
        right = max(1, int(np.searchsorted(costs, value))) if len(points) > 1 else 0
        left = max(right - 1, 0)
        width = costs[right] - costs[left]
        share = (value - costs[left]) / width if width > 0 else 0.0
        return [(1 - share, points[left]), (share, points[right])]

    def gain_at(self, cost: str, value: float) -> float | None:
        """The interpolated gain; None outside the curve."""
        found = self.between(cost, value)
        return None if found is None else sum(share * point.gain for share, point in found)

    def weighted_at(self, cost: str, value: float) -> list[tuple[float, Row]] | None:
        """The rows whose weighted sum is the interpolated gain; None outside the curve."""
        found = self.between(cost, value)
        if found is None:
            return None
        return [(share / len(point.rows), row) for share, point in found for row in point.rows]

    def difference_at(self, cost: str, value: float, reference: "Sequence[Row] | Curve") -> Interval | None:
        """95 % bootstrap interval over images of the interpolated top-1 minus that of a model, on the same images.

        reference: the rows of a model's seeds, or another method's curve, interpolated at the same value. Seeds are
        averaged before images are drawn. None outside either curve, and without labels.
        """
        own = self.weighted_at(cost, value)
        other = reference.weighted_at(cost, value) if isinstance(reference, Curve) else averaged(reference)
        return paired(own, other) if own and other else None


def averaged(rows: Sequence[Row]) -> list[tuple[float, Row]]:
    """The rows of a model's seeds, each with the same weight."""
    return [(1 / len(rows), row) for row in rows]


def paired(own: Sequence[tuple[float, Row]], other: Sequence[tuple[float, Row]]) -> Interval | None:
    """95 % bootstrap interval over images of a weighted sum of rows' top-1 minus another; None without labels."""
    total = np.zeros(own[0][1]["images"])
    for share, row in [*own, *((-share, row) for share, row in other)]:
        right = correct_images(row)
        if right is None or len(right) != len(total):
            return None
        total += share * right
    return bootstrap_means(total[None])[0]


def fastest(row: Row) -> dict[str, Any]:
    """The speed at a row's own batch, which is the larger of the two that were timed."""
    return row["speed"][max(row["speed"], key=int)]


def gain(row: Row) -> float:
    """Top-1; without labels the agreement with the static model, and without a head the cosine of the features."""
    return next((row[name] for name in ("top1", "agreement", "cosine") if row.get(name) is not None), float("nan"))


def gain_name(rows: Sequence[Row]) -> str:
    """What `gain` is of these rows, in percent, for an axis or a table."""
    if all(row.get("top1") is not None for row in rows):
        return "top-1 (%)"
    if all(row.get("agreement") is not None for row in rows):
        return "agreement with the static model (%)"
    return "cosine with the static model (%)"


def static_row(rows: Sequence[Row]) -> Row | None:
    """The static model with a short last layer, or as it is, without training if it is there; None without any."""
    ordered = [row for group in GROUPS for row in rows if row["group"] == group]
    return next((row for name in (STATIC_SHORT, STATIC) for row in ordered if row["method"] == name), None)


def static_gmacs(rows: Sequence[Row]) -> float | None:
    """GMACs of the static model with all layers whole, of which budgets are shares; None if no row says it."""
    return next((row["static_gmacs"] for row in rows if row.get("static_gmacs")), None)


def static_speed(rows: Sequence[Row]) -> float | None:
    """Images/s of the static model by one of its rows, which makes images/s of ratios; None if there is no such row.

    Rows of different days are compared by their ratios to it, because a machine's own speed changes.
    """
    static = static_row(rows)
    return None if static is None else fastest(static)["images_per_second"] / fastest(static)["ratio"]


def references(rows: Sequence[Row], group: str) -> list[Row]:
    """The static model that a group is compared with: trained for as long if there is one, every seed of it."""
    trained = [row for row in rows if row["group"] == group != GROUPS[0] and row["method"] == STATIC_SHORT]
    static = static_row([row for row in rows if row["group"] == GROUPS[0]])
    return trained or ([] if static is None else [static])


def curves(rows: Sequence[Row]) -> list[Curve]:
    """The curve of every method of every group except the static model, in the order of the rows."""
    scale = static_speed(rows)
    by_method: dict[tuple[str, str], dict[Any, list[Row]]] = {}
    for row in rows:
        if row["method"] in (STATIC, STATIC_SHORT):
            continue
        by_method.setdefault((row["group"], row["method"]), {}).setdefault(row["budget"], []).append(row)
    return [
        Curve(group, method, tuple(sorted((_point(seeds, scale) for seeds in budgets.values()), key=lambda p: p.gmacs)))
        for (group, method), budgets in by_method.items()
    ]


def _point(rows: list[Row], scale: float | None) -> Point:
    def mean(values: list[float]) -> float:
        return float(np.mean(values))

    gains = [gain(row) for row in rows]
    ratio = mean([fastest(row)["ratio"] for row in rows])
    own = mean([fastest(row)["images_per_second"] for row in rows])
    return Point(
        mean(gains),
        min(gains),
        max(gains),
        mean([row["gmacs"] for row in rows]),
        own if scale is None else ratio * scale,
        ratio,
        mean([row["speed"].get("1", fastest(row))["ratio"] for row in rows]),
        tuple(rows),
    )
