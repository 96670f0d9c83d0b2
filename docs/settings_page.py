"""Writes docs/reference/settings.md, every key of a config, from the settings' dataclasses.

python -m docs.settings_page
"""

import dataclasses
from pathlib import Path
from typing import Any

from avit_jax.runtime.settings import keys
from avit_jax.train.settings import TrainSettings

PAGE = Path(__file__).parent / "reference" / "settings.md"
INTRODUCTION = """# Settings

Every key of a config, with its neutral default and what it means. `python train.py --config=NAME --help_config`
prints the same list with the values of that config, and marks those that are not the default. `--config.KEY=VALUE` sets
a key on the command line. This page is written by `python -m docs.settings_page`.

A stopped run that resumes must keep its settings, with two exceptions. Keys marked *may change* may have another value
then. Keys marked *log* may change too: the log changes from there on, the training does not.
"""
RESUME = {"never": "", "free": "may change", "log": "log"}


def page() -> str:
    """The text of the page."""
    sections: dict[str, list[str]] = {}
    for key, field in keys(TrainSettings).items():
        section, _, name = key.rpartition(".")
        row = f"| `{name}` | {_default(field)} | {_cell(field.metadata['help'])} | {RESUME[field.metadata['resume']]} |"
        sections.setdefault(section, []).append(row)
    parts = [INTRODUCTION]
    for section, rows in sections.items():
        title = f"config.{section}" if section else "config"
        parts.append(
            "\n".join([f"## {title}", "", "| key | default | meaning | on resume |", "|---|---|---|---|", *rows])
        )
    return "\n\n".join(parts).replace("\n\n\n", "\n\n") + "\n"


def _default(field: dataclasses.Field) -> str:
    default: Any = field.default
    return "empty" if default in ("", ()) else f"`{default!r}`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"written: {PAGE}")
