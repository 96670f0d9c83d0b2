"""The page's charts: SVG by matplotlib whose colours are CSS variables, so that they follow the light or dark theme."""

import io
import re
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from avit_jax.report.depth_colours import COLOURS, coloured, ink_on, scale

# matplotlib draws with these colours; in the page they become variables of report.css.
_INK, _MUTED, _RULE, _ACCENT, _SECOND = "#010101", "#020202", "#030303", "#040404", "#050505"
_VARIABLES = {_INK: "--ink", _MUTED: "--muted", _RULE: "--rule", _ACCENT: "--accent", _SECOND: "--second"}
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: it can be searched, and takes the page's font
    "text.parse_math": False,
    "text.usetex": False,
    "font.size": 9.5,
    "axes.edgecolor": _RULE,
    "axes.labelcolor": _MUTED,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _RULE,
    "grid.linewidth": 0.6,
    "text.color": _INK,
    "xtick.color": _RULE,
    "ytick.color": _RULE,
    "xtick.labelcolor": _MUTED,
    "ytick.labelcolor": _MUTED,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "lines.markersize": 5,
}


def _chart(name: str, draw: Callable[[Axes], None], size: tuple[float, float] = (4.7, 2.9)) -> Markup:
    """The SVG of what `draw` does to the axes. name: of the chart; it makes the ids unique. size: inches."""
    with matplotlib.rc_context(_STYLE | {"svg.hashsalt": name}):
        figure = Figure(figsize=size, layout="constrained", facecolor="none")
        axes = figure.subplots()
        axes.set_facecolor("none")
        draw(axes)
        stream = io.StringIO()
        empty = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(stream, format="svg", metadata=empty, transparent=True)
    svg = stream.getvalue()
    svg = svg[svg.index("<svg") :]
    # This style would apply to every element of the page; report.css has it for charts only.
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", svg, flags=re.DOTALL)
    # Ids such as figure_1 and axes_1 are in every chart, and nothing refers to them; shapes have hashed ids.
    svg = re.sub(r'<g id="(?!point-)[^"]*"', "<g", svg)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    return Markup(svg)  # matplotlib escapes the text that it writes


def accuracy_by_depth(bins: Sequence[dict[str, Any]]) -> Markup:
    """Top-1 of the images in each bin of mean depth, with Wilson's 95 % interval."""

    def draw(axes: Axes) -> None:
        x, y = [b["mean_depth"] for b in bins], np.array([b["top1"] for b in bins]) * 100
        ends = np.array([[b["low"], b["high"]] for b in bins]).T * 100
        axes.errorbar(x, y, np.abs(ends - y), color=_ACCENT, ecolor=_MUTED, elinewidth=1, capsize=2.5, marker="o")
        axes.set(xlabel="mean depth of the images in the bin (layers)", ylabel="top-1 (%)")
        axes.set_ylim(max(0, ends.min() - 3), 101)

    return _chart("accuracy_by_depth", draw)


def by_layer(layers: Sequence[dict[str, Any]], mean_depth: float, stops: bool) -> Markup:
    """Tokens that each layer computes, in percent of all; and tokens that stop at it, if they do so for good."""

    def draw(axes: Axes) -> None:
        x = [row["layer"] for row in layers]
        computed = [100 * row["computed"] for row in layers]
        if stops:
            axes.bar(x, [100 * row["stopped"] for row in layers], color=_ACCENT, width=0.72, label="stop at it")
            axes.step(x, computed, where="mid", color=_SECOND, label="computed by it")
            axes.axvline(mean_depth, color=_INK, linestyle=(0, (4, 3)), linewidth=1, label=f"mean {mean_depth:.2f}")
        else:
            axes.bar(x, computed, color=_ACCENT, width=0.72, label="computed by it")
        _layer_axis(axes, len(layers))
        axes.set_ylabel("tokens (%)")
        axes.set_ylim(0, 106)
        axes.legend(loc="upper right", fontsize=8.5)

    return _chart("by_layer", draw)


def class_token(shares: Sequence[float], mean_depth: float) -> Markup:
    """The share of images by the layer at which their class token stops."""

    def draw(axes: Axes) -> None:
        axes.bar(range(1, len(shares) + 1), np.asarray(shares) * 100, color=_ACCENT, width=0.72)
        axes.axvline(mean_depth, color=_INK, linestyle=(0, (4, 3)), linewidth=1, label=f"mean {mean_depth:.2f}")
        _layer_axis(axes, len(shares))
        axes.set_ylabel("images (%)")
        axes.legend(loc="upper left", fontsize=8.5)

    return _chart("class_token", draw)


def _layer_axis(axes: Axes, depth: int) -> None:
    axes.set_xlabel("layer")
    axes.set_xlim(0.3, depth + 0.7)
    axes.xaxis.set_major_locator(MaxNLocator(12, integer=True))
    axes.grid(visible=False, axis="x")


def position_map(depths: Sequence[Sequence[float]], depth: int) -> Markup:
    """Mean depth at each patch, laid out as the images are, in the page's colours of depth (depth: layers).

    Small grids have their numbers written in.
    """
    grid = np.asarray(depths)
    rows, columns = grid.shape

    def draw(axes: Axes) -> None:
        axes.pcolormesh(grid, cmap=COLOURS, norm=scale(depth), edgecolor="face", linewidth=0.4)
        axes.set_aspect("equal")
        axes.set(xlim=(0, columns), ylim=(rows, 0), xticks=[], yticks=[])  # row 0 at the top
        axes.spines[:].set_visible(False)
        axes.grid(visible=False)
        if max(rows, columns) <= 8:
            for (row, column), value in np.ndenumerate(grid):
                place = (column + 0.5, row + 0.5)
                colour = ink_on(coloured(np.asarray(value), depth))
                axes.annotate(f"{value:.1f}", place, ha="center", va="center", fontsize=8, color=colour)

    return _chart("position_map", draw, (4.7, max(2.0, min(4.6, 3.7 * rows / columns))))


def reliability(bins: Sequence[dict[str, Any]]) -> Markup:
    """Accuracy against mean confidence; the size of a point shows the share of the images in its bin."""

    def draw(axes: Axes) -> None:
        x, y = (np.array([b[name] for b in bins]) * 100 for name in ("confidence", "accuracy"))
        counts = np.array([b["images"] for b in bins])
        axes.plot(
            [0, 100], [0, 100], color=_MUTED, linestyle=(0, (4, 3)), linewidth=1, label="confidence equals accuracy"
        )
        axes.vlines(x, np.minimum(x, y), np.maximum(x, y), color=_SECOND, linewidth=1.2, label="gap")
        axes.scatter(x, y, s=18 + 160 * np.sqrt(counts / counts.sum()), color=_ACCENT, zorder=3)
        axes.set(xlabel="mean confidence (%)", ylabel="accuracy (%)", xlim=(-3, 106), ylim=(-3, 106))
        axes.legend(loc="upper left", fontsize=8.5)

    return _chart("reliability", draw)


def trade_off(settings: Sequence[dict[str, Any]], cost: str, label: str, reference: dict[str, Any] | None) -> Markup:
    """Top-1 against a cost of each setting; Pareto-optimal ones are filled and joined.

    cost: key of the settings; label: its axis. reference: the baseline's figures. Setting i has the id point-COST-i, by
    which the page's slider marks it.
    """

    def draw(axes: Axes) -> None:
        best = sorted((s[cost], 100 * s["top1"]) for s in settings if s["unbeaten"][cost])
        axes.plot(*zip(*best, strict=True), color=_ACCENT, linewidth=1)
        for index, setting in enumerate(settings):
            side = 5 if index % 2 else -12  # neighbours' labels on either side
            place, filled = (setting[cost], 100 * setting["top1"]), setting["unbeaten"][cost]
            face, edge = (_ACCENT, _ACCENT) if filled else ("none", _MUTED)
            axes.plot(*place, "o", markersize=7, mfc=face, mec=edge, gid=f"point-{cost}-{index}")
            text = f"{setting['value']:g}"
            axes.annotate(text, place, xytext=(5, side), textcoords="offset points", fontsize=8, color=_MUTED)
        if reference:
            axes.plot(reference[cost], 100 * reference["top1"], "D", color=_SECOND, markersize=6)
            place = (reference[cost], 100 * reference["top1"])
            axes.annotate(
                reference["name"], place, xytext=(7, -4), textcoords="offset points", fontsize=8, color=_SECOND
            )
        axes.set(xlabel=label, ylabel="top-1 (%)")
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.margins(0.14)

    return _chart(f"trade_off_{cost}", draw)
