"""How a comparison's charts look: one colour and marker for each method, and direct labels beside its curve."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator

from avit_jax.rules import RULES

STYLE: dict[Any, Any] = {
    "text.parse_math": False,
    "text.usetex": False,
    "font.size": 9,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.edgecolor": "#8a8a8a",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.5,
    "lines.markersize": 4.5,
    "legend.frameon": False,
}
INK, MUTED = "#222222", "#8a8a8a"
_COLOURS = (
    "#3aa0dd", "#c98a00", "#8f9000", "#0072b2", "#b8488a", "#7f7fd5", "#0e8f8a", "#6a3d9a", "#b2182b",
    "#1b7837", "#5f6a72", "#a05a2c", "#4d4d00", "#009e73", "#e06c9f", "#000075", "#8c564b", "#d55e00",
)  # fmt: skip
_MARKERS = "os^Dv<>Pp*hXd"
_OTHERS = ("fewer layers", "A-ViT, gate from hidden units")  # methods that are no rules, of benchmarks/prior_art.py
_NO_ERROR = 100.5  # percent: 100 stays finite
_MOST_TICKS = 10
_STEPS: tuple[Sequence[float], ...] = (
    np.arange(0, 100.1, 0.5).tolist(),
    np.arange(0, 101).tolist(),
    [0, 20, 40, 50, 60, 70, 75, 80, 85, 90, 92, 94, 96, 98, 99, 100],
    [0, 20, 40, 60, 70, 80, 85, 90, 95, 98, 100],
    [0, 50, 75, 90, 95, 99],
)
_LEADER, _CHARACTER = 0.3, 0.06  # inches: of the line before a label, and of a letter
_GAP = 0.052  # between two labels, as a share of the panel's height


def styles(methods: Iterable[str]) -> dict[str, dict[str, Any]]:
    """A colour and a marker for each method; a rule has the same ones in every picture."""
    names = list(dict.fromkeys(methods))
    ordered = [*RULES, *_OTHERS]
    ordered += [name for name in names if name not in ordered]
    return {
        name: {"color": _COLOURS[i % len(_COLOURS)], "marker": _MARKERS[i % len(_MARKERS)]}
        for i, name in enumerate(ordered)
        if name in names
    }


def label(method: str) -> str:
    """The method as a picture or a table names it."""
    return RULES[method].label if method in RULES else method


def direct_labels(axes: Axes, ends: Sequence[tuple[float, float, str, str]], *, right: bool) -> None:
    """Write each curve's name beside its last point, without overlaps, and join the two by a thin line.

    ends: x, y, text and colour of each curve; scales and limits of the panel are final. Makes room on that side of it.
    """
    if not ends:
        return
    low, high = axes.get_xlim()
    longest = max(len(text) for *_, text, _ in ends)
    grid = axes.get_subplotspec()
    figure: Any = axes.figure
    inches = 0.88 * figure.get_size_inches()[0] / (1 if grid is None else grid.get_gridspec().ncols)  # about
    width = min(0.5, (_LEADER + _CHARACTER * longest) / inches)  # of the labels, as a share of the panel
    room = (high - low) * width / (1 - width)
    ticks = [tick for tick in axes.get_xticks() if low <= tick <= high]
    axes.set_xlim((low, high + room) if right else (low - room, high))
    axes.set_xticks(ticks)
    to_panel = axes.transData + axes.transAxes.inverted()
    heights = [float(to_panel.transform((x, y))[1]) for x, y, *_ in ends]
    wanted = sorted(range(len(ends)), key=heights.__getitem__)
    gap = min(_GAP, 0.96 / len(ends))
    places = [heights[i] for i in wanted]
    for i in range(1, len(places)):
        places[i] = max(places[i], places[i - 1] + gap)
    places[-1] = min(places[-1], 0.98)
    for i in range(len(places) - 2, -1, -1):
        places[i] = min(places[i], places[i + 1] - gap)
    # Names that are close together are centred on their curves.
    shift = sum(place - heights[i] for i, place in zip(wanted, places, strict=True)) / len(places)
    shift = max(min(shift, places[0] - 0.02), places[-1] - 0.98)
    edge = width - 0.8 * _LEADER / inches
    edge = 1 - edge if right else edge
    for i, place in zip(wanted, places, strict=True):
        x, y, text, colour = ends[i]
        axes.annotate(
            text,
            (x, y),
            xytext=(edge, place - shift),
            textcoords="axes fraction",
            color=colour,
            ha="left" if right else "right",
            va="center",
            fontsize=8,
            arrowprops={
                "arrowstyle": "-",
                "relpos": (0.0 if right else 1.0, 0.5),
                "color": colour,
                "linewidth": 0.6,
                "alpha": 0.6,
                "shrinkA": 1,
                "shrinkB": 3,
            },
        )


def error_scale(axes: Axes, low: float, high: float) -> None:
    """A vertical axis in percent, logarithmic in the error: it shows small differences near the top, and low values.

    low, high: of the values, in percent.
    """

    def forward(value: Any) -> Any:
        return -np.log(np.maximum(_NO_ERROR - np.asarray(value, np.float64), 1e-3))

    def backward(scaled: Any) -> Any:
        return _NO_ERROR - np.exp(-np.asarray(scaled, np.float64))

    bottom, top = forward(low), forward(high)
    margin = 0.06 * max(top - bottom, 0.05)
    axes.set_yscale("function", functions=(forward, backward))
    axes.set_ylim(float(backward(bottom - margin)), float(backward(top + margin)))
    # The finest steps of which there are not too many.
    for steps in _STEPS:
        inside = [step for step in steps if axes.get_ylim()[0] <= step <= axes.get_ylim()[1]]
        if len(inside) <= _MOST_TICKS:
            break
    axes.set_yticks(inside, [f"{step:g}" for step in inside])
    axes.yaxis.set_minor_locator(NullLocator())
