"""The command line's manners: configs from files, one clear sentence for what is wrong, exit status 1."""

import sys
from collections.abc import Callable
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

from avit_jax.config import nearest
from avit_jax.mesh import use_all_cores


def define_config_flag(default: str) -> flags.FlagHolder:
    """--config=FILE with --config.key=value overrides."""
    return config_flags.DEFINE_config_file("config", default, "Experiment, a file in configs/.", lock_config=True)


def run_main(main: Callable[[], None]) -> None:
    """Parse the flags, run, and turn what a user can mend into one sentence and exit status 1."""

    def guarded(argv: list[str]) -> None:
        use_all_cores()
        logging.set_verbosity(logging.WARNING)  # orbax tells every rename at INFO
        if len(argv) > 1:
            _fail(f"{argv[1]!r} is not an option: write --name=value; --help lists the options")
        try:
            main()
        except (ValueError, FloatingPointError, OSError) as error:
            _fail(str(error))
        except KeyboardInterrupt:
            _fail("stopped; the same command goes on from the last checkpoint")

    app.run(guarded, flags_parser=_parse)


def _parse(argv: list[str]) -> list[str]:
    _check_config_file(argv)
    try:
        return flags.FLAGS(argv)
    except flags.UnrecognizedFlagError as error:
        own = [name for name in flags.FLAGS if name in ("config", "workdir", "resume", "checkpoint")]
        _fail(f"there is no option --{error.flagname}: {nearest(error.flagname, own)}")
    except (flags.Error, ValueError, TypeError, AttributeError, KeyError) as error:
        _fail(_explain(error, argv))
    raise AssertionError("_fail does not return")


def _check_config_file(argv: list[str]) -> None:
    for position, argument in enumerate(argv):
        name, _, value = argument.lstrip("-").partition("=")
        if name == "config" and argument.startswith("-"):
            value = value or (argv[position + 1] if position + 1 < len(argv) else "")
            path = Path(value.split(":")[0])
            if not path.is_file():
                known = [str(p) for p in path.parent.glob("*.py")] or [str(p) for p in Path("configs").glob("*.py")]
                _fail(f"there is no config file {str(path)!r}: {nearest(str(path), known)}")


def _explain(error: Exception, argv: list[str]) -> str:
    """What went wrong with a --config.key=value, naming the nearest key."""
    config = flags.FLAGS["config"].value if "config" in flags.FLAGS else None
    for argument in argv:
        name = argument.lstrip("-").partition("=")[0]
        if config is None or not name.startswith("config."):
            continue
        node, path = config, name.split(".")[1:]
        for depth, key in enumerate(path):
            known = list(node.keys()) if hasattr(node, "keys") else []
            if key not in known:
                where = ".".join(["config", *path[:depth]])
                return f"{where} has no key {key!r}: {nearest(key, known) if known else 'it is a plain value'}"
            node = node[key]
    return " ".join(str(error).split())


def _fail(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(1)
