"""What --help_config prints: every key of a config with its value, its default, and what it means."""

import shutil
import textwrap
from collections.abc import Collection, Iterator
from typing import Any

from ml_collections import ConfigDict

from avit_jax.runtime.settings import flat, keys
from avit_jax.train.settings import TrainSettings

_MOST = (60, 24, 14)  # characters of a key, a value and a default on one line of their columns
_LEAST_HELP = 30  # characters; in a narrower terminal the help goes below


def config_help(config: ConfigDict, only: Collection[str] = ()) -> str:
    """A table of keys, section by section; values that are not the default have a star.

    config: with the changes of the command line. only: the sections, and the keys outside of them, to show; empty: all.
    Raises ValueError for a config with an unknown key.
    """
    given, defaults = flat(config.to_dict()), flat(TrainSettings().to_config())
    for name in given:
        if name not in defaults:
            raise ValueError(f"config has a key {name!r} that this version does not know")
    fields = {name: field for name, field in keys(TrainSettings).items() if not only or name.partition(".")[0] in only}
    rows = [
        (name, _shown(given.get(name, defaults[name])), _shown(defaults[name]), _meaning(field.metadata))
        for name, field in fields.items()
    ]
    widths = [min(max(len(row[column]) for row in rows), most) for column, most in enumerate(_MOST)]
    screen = shutil.get_terminal_size((120, 24)).columns
    lines = ["--config.KEY=VALUE sets a key; * marks a value that is not the default.", ""]
    lines += _line("  ", ("key", "value", "default", "what it means"), widths, screen)
    section = ""
    for row in rows:
        if (its := row[0].rpartition(".")[0]) != section:
            lines.append("")
            section = its
        changed = given.get(row[0], defaults[row[0]]) != defaults[row[0]]
        lines += _line("* " if changed else "  ", row, widths, screen)
    return "\n".join(lines)


def _shown(value: Any) -> str:
    return value if isinstance(value, str) and value and value.strip() == value else repr(value)


def _meaning(metadata: Any) -> str:
    """The help, and the choices if it does not name them all."""
    text, choices = metadata["help"], metadata["choices"]
    return text if all(choice in text for choice in choices) else f"{text} One of {', '.join(choices)}."


def _line(mark: str, row: tuple[str, ...], widths: list[int], screen: int) -> Iterator[str]:
    """The lines of one row: each cell is wrapped in its column; the help goes below if the screen is narrow."""
    left = len(mark) + sum(widths) + 2 * len(widths)
    *cells, meaning = row
    beside = screen - left >= _LEAST_HELP
    columns = [textwrap.wrap(cell, width) for cell, width in zip(cells, widths, strict=True)]
    columns.append(textwrap.wrap(meaning, screen - left) if beside else [])
    for number in range(max(map(len, columns))):
        parts = [column[number] if number < len(column) else "" for column in columns]
        text = "  ".join(part.ljust(width) for part, width in zip(parts, [*widths, 0], strict=True))
        yield ((mark if number == 0 else "  ") + text).rstrip()
    if not beside:
        yield from textwrap.wrap(meaning, max(screen, 30), initial_indent=" " * 6, subsequent_indent=" " * 6)
