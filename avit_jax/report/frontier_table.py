"""The table of a comparison in Markdown: each method's accuracy at equal work and at equal measured speed."""

from collections.abc import Sequence

from avit_jax.evaluate.curves import Curve, curves, fastest, gain, gain_name, static_row
from avit_jax.evaluate.rows import GROUPS, Row
from avit_jax.report.method_style import label

WORKS = (0.82, 0.71, 0.6, 0.49)  # of the static model with all layers whole
SPEED_UPS = (1.1, 1.25, 1.5, 1.75)  # over the static model with a short last layer


def comparison_table(
    rows: Sequence[Row], works: Sequence[float] = WORKS, speed_ups: Sequence[float] = SPEED_UPS
) -> str:
    """Two tables for each group: at equal GMACs, and at equal images/s. Each curve is interpolated linearly.

    works: shares of the static model's GMACs. speed_ups: ratios of images/s. A cell has the gain in percent and, with
    labels, the paired 95 % interval of its difference to the static model in points; a dash is outside the curve.
    """
    found, static = curves(rows), static_row(rows)
    whole = max(row["gmacs"] for row in rows)
    parts = []
    if static is not None:
        parts.append(
            f"Static model, last layer short: {gain_name(rows)} {100 * gain(static):.2f}, {static['gmacs']:.4g} GMACs, "
            f"{fastest(static)['images_per_second']:.0f} images/s; {static['images']} images, {static['machine']}."
        )
    for group in GROUPS:
        own = [curve for curve in found if curve.group == group]
        if not own:
            continue
        heads = [f"{work * whole:.4g} GMACs ({work:.0%})" for work in works]
        values = [work * whole for work in works]
        parts.append(_table(f"{group}: {gain_name(rows)} at equal work", own, "gmacs", heads, values, static))
        heads = [f"{ratio:g} x static" for ratio in speed_ups]
        title = f"{group}: {gain_name(rows)} at equal measured images/s"
        parts.append(_table(title, own, "ratio", heads, list(speed_ups), static))
    return "\n\n".join(parts)


def _table(
    title: str, own: Sequence[Curve], cost: str, heads: Sequence[str], values: Sequence[float], static: Row | None
) -> str:
    lines = [f"| {title} | " + " | ".join(heads) + " |", "|---" * (1 + len(heads)) + "|"]
    for curve in own:
        cells = [_cell(curve, cost, value, static) for value in values]
        lines.append(f"| {label(curve.method)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(curve: Curve, cost: str, value: float, static: Row | None) -> str:
    found = curve.gain_at(cost, value)
    if found is None:
        return "-"
    interval = None if static is None else curve.difference_at(cost, value, static)
    said = "" if interval is None else f" ({100 * interval[0]:+.1f} to {100 * interval[1]:+.1f})"
    return f"{100 * found:.1f}{said}"
