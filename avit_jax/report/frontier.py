"""The charts of a comparison of rules: accuracy against work and against measured speed, and where the work goes."""

import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from avit_jax.evaluate.curves import Curve, curves, fastest, gain, gain_name, references, static_row, static_speed
from avit_jax.evaluate.rows import GROUPS, STATIC, Row
from avit_jax.report.method_style import INK, MUTED, STYLE, direct_labels, error_scale, label, styles
from avit_jax.report.pictures import save_picture

SAME_BUDGET = 0.6  # of the static model's work: where methods are shown beside each other
_COLUMNS = 4  # of small panels
_LINE = 72  # characters below a panel


def draw_comparison(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Draw every chart that the rows have data for, as PNG files in the folder; returns their paths."""
    found = curves(rows)
    charts: dict[str, Callable[[Sequence[Row], list[Curve]], Figure | None]] = {
        "accuracy_by_work.png": _by_work,
        "accuracy_by_speed.png": _by_speed,
        "speed_by_saved_work.png": _speed_by_saved_work,
        "work_by_image.png": _work_by_image,
        "tokens_by_layer.png": _tokens_by_layer,
    }
    drawn = []
    for name, draw in charts.items():
        with matplotlib.rc_context(STYLE):
            figure = draw(rows, found)
            if figure is not None:
                drawn.append(save_picture(figure, folder / name))
    return drawn


def _by_work(rows: Sequence[Row], found: list[Curve]) -> Figure | None:
    return _frontier(rows, found, "gmacs", "GMACs per image (10⁹ multiply-adds)", right=False)


def _by_speed(rows: Sequence[Row], found: list[Curve]) -> Figure | None:
    machines = textwrap.fill("; ".join(dict.fromkeys(row["machine"] for row in rows if row.get("machine"))), _LINE)
    said = "" if static_speed(rows) is None else ", scaled by the ratio to the static model in the same rounds"
    return _frontier(rows, found, "speed", f"images/s{said}\n{machines}", right=True)


def _frontier(rows: Sequence[Row], found: list[Curve], cost: str, xlabel: str, *, right: bool) -> Figure | None:
    """A panel for each group: the gain of every method against a cost, with the range of the seeds."""
    groups = [group for group in GROUPS if any(curve.group == group for curve in found)]
    if not groups:
        return None
    look = styles(curve.method for curve in found)
    figure = Figure(figsize=(6.6 * len(groups), 5.0), layout="constrained")
    panels = figure.subplots(1, len(groups), squeeze=False)[0]
    for axes, group in zip(panels, groups, strict=True):
        own = [curve for curve in found if curve.group == group]
        against = references(rows, group)
        gains = [100 * value for curve in own for point in curve.points for value in (point.low, point.high)]
        gains += [100 * gain(row) for row in against]
        error_scale(axes, min(gains), max(gains))
        for curve in own:
            x = [getattr(point, cost) for point in curve.points]
            y, low, high = (
                np.array([getattr(p, name) for p in curve.points]) * 100 for name in ("gain", "low", "high")
            )
            axes.errorbar(x, y, np.abs([y - low, high - y]), elinewidth=1, capsize=2, **look[curve.method])
        if against:
            whole = next((row for row in rows if row["method"] == STATIC), None)
            _mark_static(axes, against, cost, whole, static_speed(rows))
        axes.set(xlabel=xlabel, ylabel=f"{gain_name(rows)}, logarithmic in the error", title=group)
        axes.xaxis.set_major_locator(MaxNLocator(6))
        ends = [max(curve.points, key=lambda p: getattr(p, cost) * (1 if right else -1)) for curve in own]
        direct_labels(
            axes,
            [
                (getattr(end, cost), 100 * end.gain, label(curve.method), look[curve.method]["color"])
                for curve, end in zip(own, ends, strict=True)
            ],
            right=right,
        )
    return figure


def _mark_static(axes: Axes, against: Sequence[Row], cost: str, whole: Row | None, speed: float | None) -> None:
    """The static model as a diamond with a line at its height; white: with a whole last layer, in its own group."""

    def place(row: Row) -> float:
        if cost == "gmacs":
            return row["gmacs"]
        assert speed is not None, "there is a row of the static model"
        return speed * fastest(row)["ratio"]

    gains = [100 * gain(row) for row in against]
    middle, x = float(np.mean(gains)), float(np.mean([place(row) for row in against]))
    spread = np.abs([[min(gains) - middle], [max(gains) - middle]])
    axes.errorbar(x, middle, spread, fmt="D", color=INK, markersize=6, elinewidth=1, capsize=2, zorder=4)
    name = "static, last layer short"
    if against[0]["group"] != GROUPS[0]:
        name += ", trained for as long"
    elif whole is not None:
        axes.plot(place(whole), 100 * gain(whole), "D", color=INK, mfc="white", markersize=6, zorder=4)
        name = "static (filled: last layer short)"
    axes.axhline(middle, color=MUTED, linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
    at_left = cost != "gmacs"
    axes.annotate(
        name,
        (0.0 if at_left else 1.0, middle),
        xycoords=axes.get_yaxis_transform(),
        xytext=(2 if at_left else -2, 5),
        textcoords="offset points",
        ha="left" if at_left else "right",
        fontsize=8,
        color=INK,
    )


def _speed_by_saved_work(rows: Sequence[Row], found: list[Curve]) -> Figure | None:
    """Measured speed-up against what the saved work allows, at the best batch and at batch 1."""
    static = static_row(rows)
    if static is None or not found:
        return None
    look = styles(curve.method for curve in found)
    found = [curve for curve, _ in _beside(found)]
    figure = Figure(figsize=(11.5, 5.0), layout="constrained")
    panels = figure.subplots(1, 2)
    for axes, (name, title) in zip(
        panels, (("ratio", "each at its best batch"), ("ratio_alone", "batch 1")), strict=True
    ):
        ends, most = [], 1.0
        for curve in found:
            x = [static["gmacs"] / point.gmacs for point in curve.points]
            y = [getattr(point, name) for point in curve.points]
            order = np.argsort(x)
            x, y = [x[i] for i in order], [y[i] for i in order]
            axes.plot(x, y, **look[curve.method])
            ends.append((x[-1], y[-1], label(curve.method), look[curve.method]["color"]))
            most = max(most, *x)
        axes.plot([1, most], [1, most], color=MUTED, linewidth=0.9, linestyle=(0, (4, 3)))
        axes.annotate(
            "all saved work\nbecomes time", (1 + 0.72 * (most - 1), 1 + 0.72 * (most - 1)), xytext=(-6, 8),
            textcoords="offset points", ha="right", fontsize=8, color=MUTED,
        )  # fmt: skip
        axes.axhline(1, color=MUTED, linewidth=0.6)
        axes.set(xlabel="GMACs of the static model / of the rule", ylabel="images/s, rule / static model", title=title)
        direct_labels(axes, ends, right=True)
    return figure


def _beside(found: list[Curve]) -> list[tuple[Curve, Row]]:
    """Every method once, with its row at the same budget: a fine-tuned one, of its first seed, if there is no other."""
    chosen: dict[str, tuple[Curve, Row]] = {}
    for curve in sorted(found, key=lambda curve: GROUPS.index(curve.group)):
        if curve.method not in chosen:
            chosen[curve.method] = curve, curve.nearest(SAME_BUDGET).rows[0]
    return list(chosen.values())


def _work_by_image(rows: Sequence[Row], found: list[Curve]) -> Figure | None:
    """For each rule with a varying cost: the histogram of GMACs per image, and accuracy by decile of it."""
    shown = [(curve, row) for curve, row in _beside(found) if row.get("histogram")]
    if not shown:
        return None
    look = styles(curve.method for curve in found)
    top1 = [decile["top1"] for _, row in shown for decile in row["deciles"] if decile["top1"] is not None]
    columns = min(_COLUMNS, len(shown))
    count = -(-len(shown) // columns)
    figure = Figure(figsize=(3.3 * columns + 0.4, 2.7 * count + 0.5), layout="constrained")
    panels = figure.subplots(count, columns, squeeze=False).ravel()
    for axes, (curve, row) in zip(panels, shown, strict=False):
        edges, counts = np.array(row["histogram"]["edges"]), np.array(row["histogram"]["counts"])
        colour = look[curve.method]["color"]
        axes.bar(edges[:-1], 100 * counts / counts.sum(), np.diff(edges), align="edge", color=colour, alpha=0.35)
        axes.set_title(f"{label(curve.method)} at {row['gmacs']:.3g} GMACs", fontsize=9)
        axes.set(xlabel="GMACs per image", ylabel="images (%)")
        axes.xaxis.set_major_locator(MaxNLocator(4))
        deciles = row["deciles"]
        if deciles and deciles[0]["top1"] is not None:
            twin: Any = axes.twinx()
            twin.plot([d["gmacs"] for d in deciles], [100 * d["top1"] for d in deciles], "o-", color=INK, markersize=3)
            twin.set_ylabel("top-1 by decile (%)", color=INK)
            twin.set_ylim(100 * min(top1) - 3, 101)
            twin.grid(visible=False)
            twin.spines["right"].set_visible(True)
    for axes in panels[len(shown) :]:
        axes.set_visible(False)
    return figure


def _tokens_by_layer(rows: Sequence[Row], found: list[Curve]) -> Figure | None:
    """The mean number of tokens that each layer computes, at the same budget."""
    shown = [(curve, row) for curve, row in _beside(found) if row.get("tokens")]
    if not shown:
        return None
    look = styles(curve.method for curve in found)
    figure = Figure(figsize=(8, 4.6), layout="constrained")
    axes = figure.subplots()
    ends = []
    for curve, row in shown:
        layers = np.arange(1, len(row["tokens"]) + 1)
        axes.plot(layers, row["tokens"], **look[curve.method])
        ends.append((float(layers[-1]), float(row["tokens"][-1]), label(curve.method), look[curve.method]["color"]))
    axes.set(xlabel="layer", ylabel="tokens computed (mean over images)", ylim=(0, None))
    axes.set_title(f"at {SAME_BUDGET:.0%} of the static model's work, or the setting nearest to it", fontsize=9)
    axes.set_xticks(range(1, 1 + max(len(row["tokens"]) for _, row in shown)))
    direct_labels(axes, ends, right=True)
    return figure
