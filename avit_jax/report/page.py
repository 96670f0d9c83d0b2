"""The report's page: one HTML file that loads nothing from the network."""

import base64
import hashlib
import math
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from avit_jax.runtime.files import replace_text

_MISSING = "\N{EN DASH}"


def render(report: dict[str, Any], pictures: dict[str, Any]) -> str:
    """The page as HTML.

    report: the content of report.json; every number comes from it. pictures: charts, frames, covers, maps and legend.
    Names and labels are escaped. A content security policy forbids all loading; the one script is allowed by its hash.
    """
    loader = PackageLoader("avit_jax.report")
    pages = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    pages.filters |= {
        "percent": percent,
        "number": number,
        "speed": speed,
        "whole": whole,
        "work": work,
        "interval": interval,
    }
    script, style = (_source(pages, name) for name in ("report.js", "report.css"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; "
        "base-uri 'none'; form-action 'none'"
    )
    return pages.get_template("report.html").render(
        report=report, pictures=pictures, policy=policy, style=Markup(style), script=Markup(script)
    )


def _source(pages: Environment, name: str) -> str:
    """The text of a file that is not a template: script or style."""
    assert pages.loader is not None
    return pages.loader.get_source(pages, name)[0]


def percent(value: float | int | None, digits: int = 1) -> str:
    """A fraction of 1 as 97.7 %; a dash if it is None or not finite."""
    return _MISSING if _none(value) else _signed(f"{100 * value:.{digits}f} %")  # type: ignore[operator]


def number(value: float | int | None, digits: int = 2) -> str:
    """A number as 7.05; a dash if it is None or not finite."""
    return _MISSING if _none(value) else _signed(f"{value:.{digits}f}")


def speed(value: float | int | None) -> str:
    """images/s with three significant digits or more: 1,450 or 106 or 18.7"""
    if _none(value):
        return _MISSING
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"  # type: ignore[operator]


def work(value: float | int | None) -> str:
    """GMACs: 0.0192 or 0.705 or 17.58"""
    return _MISSING if _none(value) else f"{value:.{work_digits(value)}f}"  # type: ignore[arg-type]


def work_digits(value: float | int) -> int:
    """The number of decimals for GMACs."""
    return 4 if value < 0.1 else 3 if value < 1 else 2


def whole(value: int) -> str:
    """A whole number as 10,000"""
    return f"{value:,}"


def interval(figure: dict[str, Any], style: str = "number", digits: int | None = None) -> str:
    """The interval of a figure, such as 96.7 to 98.5 %.

    figure: has low and high. style: percent, number, or work (GMACs). digits: decimals; None: those of the style.
    """
    if _none(figure["low"]) or _none(figure["high"]):
        return _MISSING
    factor, unit = (100, " %") if style == "percent" else (1, "")
    if digits is None:
        digits = work_digits(figure["low"]) if style == "work" else {"percent": 1, "number": 2}[style]
    low, high = (factor * figure[end] for end in ("low", "high"))
    return _signed(f"{low:.{digits}f} to {high:.{digits}f}{unit}")


def _signed(text: str) -> str:
    return text.replace("-", "\N{MINUS SIGN}")


def _none(value: float | int | None) -> bool:
    return value is None or not math.isfinite(value)


def write_page(folder: Path, html: str) -> Path:
    """Write report.html to the folder, completely or not at all; returns its path."""
    path = folder / "report.html"
    replace_text(path, html)
    return path
