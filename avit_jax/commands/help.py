"""What --help prints: the options, the configs, and how a key of a config is set."""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from avit_jax.commands.config_files import DEFAULT_CONFIG, SHIPPED, shipped_configs

HELP = ("--help", "-help", "-h", "--helpshort", "--helpfull", "-?")


def program() -> str:
    """How this command was started: python train.py, or python -m avit_jax.train."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return f"python -m {spec.name.removesuffix('.__main__')}" if spec else f"python {sys.argv[0]}"


def command_line() -> str:
    """The command that started this process, to be run again."""
    return " ".join([program(), *map(shlex.quote, sys.argv[1:])])


def help_text(about: str, options: Sequence[flags.FlagHolder]) -> str:
    """The text of --help. about: a one-line description of the command. options: its own flags."""
    configs = shipped_configs()
    width = max(map(len, configs))
    lines = [
        about,
        "",
        f"usage: {program()} [--config=NAME] [--config.KEY=VALUE ...] [--OPTION=VALUE ...]",
        "",
        f"--config=NAME or FILE.py; NAME:ARGUMENT if a config takes one; by default {DEFAULT_CONFIG}.",
        f"  The configs in {_nearby(SHIPPED)}:",
        *(f"    {name:{width}}  {what}" for name, what in configs.items()),
        "--config.KEY=VALUE sets a key of the config, for instance",
        "    --config.epochs=3 --config.optim.learning_rate=1e-4 --config.model.depth=6 --config.data.path=FOLDER",
        "--help_config prints every key of the config: its value, its default, and what it means.",
        "",
        "options:",
    ]
    for option in options:
        flag = flags.FLAGS[option.name]
        value = f"--[no]{flag.name}" if flag.boolean else f"--{flag.name}={_value(flag)}"
        default = "" if flag.default in (None, False) else f" (by default {flag.default})"
        lines.append(f"  {value:24} {_meaning(flag)}{default}")
    return "\n".join(lines)


def _value(flag: flags.Flag) -> str:
    values = getattr(flag.parser, "enum_values", None)
    return "|".join(values) if values else flag.flag_type().upper()[:6].replace("STRING", "VALUE").replace("INT", "N")


def _meaning(flag: flags.Flag) -> str:
    """The flag's help without the choices, which absl puts before it and _value shows already."""
    choices = getattr(flag.parser, "enum_values", None)
    return flag.help.removeprefix(f"<{'|'.join(choices)}>: ") if choices else flag.help


def _nearby(path: Path) -> Path:
    """The path relative to the current folder, if it is inside it."""
    here = Path.cwd()
    return path.relative_to(here) if here in path.parents else path
