"""The table of a comparison in Markdown: each method's accuracy at equal work and at equal measured speed."""

from collections.abc import Sequence

import numpy as np

from avit_jax.evaluate.curves import (
    Curve,
    averaged,
    curves,
    fastest,
    gain,
    gain_name,
    paired,
    references,
    static_gmacs,
    static_row,
)
from avit_jax.evaluate.rows import GROUPS, Row
from avit_jax.report.method_style import label

WORKS = (0.82, 0.71, 0.6, 0.49)  # of the static model with all layers whole
SPEED_UPS = (1.1, 1.25, 1.5, 1.75)  # over the static model with a short last layer


def comparison_table(
    rows: Sequence[Row],
    works: Sequence[float] | None = None,
    speed_ups: Sequence[float] = SPEED_UPS,
    reference: str | None = None,
) -> str:
    """Two tables for each group: at equal GMACs, and at equal images/s. Each curve is interpolated linearly.

    works: shares of the static model's GMACs; None: the budgets of the rows, or WORKS if they are many. Without rows
    that say those GMACs there is no table at equal work. speed_ups: ratios of images/s. A cell has the gain in percent
    and, with labels, the paired 95 % interval of its difference to the static model in points, or to the curve of the
    method `reference`; a dash is outside the curve. Fine-tuned rules are compared with the static model that was
    trained for as long, if it is there. Before their two tables stands one with each trained setting: its speed-ups as
    they were measured, and its images/s, scaled by them. Raises ValueError if no row is of `reference`.
    """
    found, static, whole = curves(rows), static_row(rows), static_gmacs(rows)
    budgets = sorted({row["budget"] for row in rows if row["budget"] is not None}, reverse=True)
    works = works or (budgets if len(budgets) <= len(WORKS) else WORKS)
    methods = dict.fromkeys(curve.method for curve in found)
    if reference not in (None, *methods):
        raise ValueError(f"no row is of {reference!r}: the methods are {', '.join(methods)}")
    parts = []
    if static is not None and static["group"] == GROUPS[0]:
        parts.append(
            f"Static model, last layer short: {gain_name(rows)} {100 * gain(static):.2f}, {static['gmacs']:.4g} GMACs, "
            f"{fastest(static)['images_per_second']:.0f} images/s; {static['images']} images, {static['machine']}."
        )
    for group in GROUPS:
        own = [curve for curve in found if curve.group == group]
        if not own:
            continue
        trained = references(rows, group)
        if trained and trained[0]["group"] != GROUPS[0]:
            parts.append(_trained(trained))
        if group == GROUPS[1]:
            parts.append(_trained_settings(own, trained))
        against = next((curve for curve in own if curve.method == reference), None) if reference else trained
        minus = f", minus {label(reference)}" if reference else ""
        at_work = {f"{work * whole:.4g} GMACs ({work:.0%})": work * whole for work in works} if whole else {}
        at_speed = {f"{ratio:g} x static": ratio for ratio in speed_ups}
        title = f"{group}: {gain_name(rows)} at equal"
        parts += _table(f"{title} work{minus}", own, "gmacs", at_work, against)
        parts += _table(f"{title} measured images/s{minus}", own, "ratio", at_speed, against)
    return "\n\n".join(parts)


def _trained_settings(own: Sequence[Curve], trained: Sequence[Row]) -> str:
    """One line for each method and budget: means over the seeds, and how far the seeds' top-1 reach."""
    heads = (
        "top-1 (%)",
        "seeds",
        "minus static, 95 %",
        "GMACs",
        "images/s, scaled",
        "speed-up",
        "at batch 1",
        "by position",
    )
    lines = ["| fine-tuned | " + " | ".join(heads) + " |", "|---" * (1 + len(heads)) + "|"]
    points = [(curve, point) for curve in own for point in curve.points]
    for curve, point in sorted(points, key=lambda pair: -(pair[1].rows[0]["budget"] or 1)):
        budget = point.rows[0]["budget"]
        shares = np.array([row.get("explained_by_position") for row in point.rows], float)  # None becomes NaN
        interval = paired(averaged(point.rows), averaged(trained)) if trained else None
        cells = [label(curve.method) + ("" if budget is None else f", {budget:.0%}"), f"{100 * point.gain:.2f}"]
        cells += [
            f"{100 * point.low:.2f} to {100 * point.high:.2f} ({len(point.rows)})" if len(point.rows) > 1 else "1"
        ]
        cells += ["-" if interval is None else f"{100 * interval[0]:+.2f} to {100 * interval[1]:+.2f}"]
        cells += [f"{point.gmacs:.4f}", f"{point.speed:.0f}", f"{point.ratio:.2f}", f"{point.ratio_alone:.2f}"]
        cells += [f"{shares.mean():.2f}".replace("nan", "-")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _table(
    title: str, own: Sequence[Curve], cost: str, columns: dict[str, float], against: Sequence[Row] | Curve | None
) -> list[str]:
    """The table, without the columns that no curve reaches; nothing if there is none left."""
    shown = {head: value for head, value in columns.items() if any(curve.between(cost, value) for curve in own)}
    if not shown:
        return []
    lines = [f"| {title} | " + " | ".join(shown) + " |", "|---" * (1 + len(shown)) + "|"]
    for curve in own:
        cells = [_cell(curve, cost, value, against) for value in shown.values()]
        lines.append(f"| {label(curve.method)} | " + " | ".join(cells) + " |")
    return ["\n".join(lines)]


def _trained(against: Sequence[Row]) -> str:
    gains = [100 * gain(row) for row in against]
    spread = f" ({min(gains):.2f} to {max(gains):.2f}, {len(gains)} seeds)" if len(gains) > 1 else ""
    return f"Static model, last layer short, trained for as long: {sum(gains) / len(gains):.2f}{spread}."


def _cell(curve: Curve, cost: str, value: float, against: Sequence[Row] | Curve | None) -> str:
    found = curve.gain_at(cost, value)
    if found is None:
        return "-"
    interval = None if against is None or against is curve else curve.difference_at(cost, value, against)
    said = "" if interval is None else f" ({100 * interval[0]:+.1f} to {100 * interval[1]:+.1f})"
    return f"{100 * found:.1f}{said}"
