"""The command line's manners: configs from files, one clear sentence for what is wrong, exit status 1."""

import importlib.util
import os
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from avit_jax.config import nearest
from avit_jax.distributed import LOST, end_now, leave, lost_a_process
from avit_jax.mesh import use_all_cores

_PACKAGE = Path(__file__).parent


def define_config_flag() -> flags.FlagHolder:
    """--config=FILE with --config.key=value overrides."""
    return config_flags.DEFINE_config_file("config", None, "Experiment, a file in configs/.", lock_config=True)


def run_main(main: Callable[[], None], default_config: Path) -> None:
    """Parse the flags, run, and turn what a user can mend into one sentence and exit status 1."""
    # matplotlib writes its font cache to the home folder unless it is told otherwise before it is imported.
    os.environ.setdefault("MPLCONFIGDIR", str(Path("runs/.matplotlib").absolute()))

    def parse(argv: list[str]) -> list[str]:
        # Not the flag's default: ml_collections would apply the overrides at import, where nobody catches a wrong key.
        if not any(argument.lstrip("-").split("=")[0] == "config" for argument in argv[1:]):
            argv = [argv[0], f"--config={default_config}", *argv[1:]]
        _check_config(argv)
        try:
            return flags.FLAGS(argv)
        except flags.UnrecognizedFlagError as error:
            own = ["config", *(flag.name for flag in flags.FLAGS.get_key_flags_for_module(argv[0]))]
            raise SystemExit(_say(f"there is no option --{error.flagname}: {nearest(error.flagname, own)}")) from None
        except (flags.Error, ValueError, TypeError, AttributeError, KeyError) as error:
            raise SystemExit(_say(" ".join(str(error).split()))) from None

    def guarded(argv: list[str]) -> None:
        if len(argv) > 1:
            raise SystemExit(_say(f"{argv[1]!r} is not an option: write --name=value; --help lists the options"))
        logging.set_verbosity(logging.WARNING)  # orbax tells every rename at INFO
        # Exceptions of orbax's threads and of its tasks, which it raises again here.
        logging.get_absl_handler().addFilter(
            lambda record: not (record.exc_info and ("orbax" in record.pathname or record.name == "asyncio"))
        )
        sys.unraisablehook = _unraisable
        use_all_cores()
        try:
            main()
        except (Exception, KeyboardInterrupt) as error:
            sentence = _sentence(error)
            several = jax.distributed.is_initialized()
            if sentence is None and not several:
                raise
            _say(sentence) if sentence else traceback.print_exc()
            if several:
                leave(lost=sentence == LOST)
            _leave_waiting_threads()
            raise SystemExit(1) from None

    app.run(guarded, flags_parser=parse)


def _leave_waiting_threads() -> None:
    """End with status 1 at once where a thread is left: orbax's wait ten minutes for a save that has failed."""
    if any(thread is not threading.main_thread() and not thread.daemon for thread in threading.enumerate()):
        end_now()


def _unraisable(found: Any) -> None:
    """Python's own, without the echoes of an error of orbax's that is raised already.

    tensorstore's threads, when a write is given up, and the reads beside the one that failed first.
    """
    frames = traceback.extract_tb(found.exc_traceback)
    of_a_read = bool(frames) and "orbax" in Path(frames[-1].filename).parts
    given_up = isinstance(found.exc_value, RuntimeError) and str(found.exc_value) == "Event loop is closed"
    if not (of_a_read or given_up):
        sys.__unraisablehook__(found)


def _sentence(error: BaseException) -> str | None:
    """What a user reads of an error; None for one from a library's depths: a bug, which keeps its traceback."""
    if isinstance(error, KeyboardInterrupt):
        return "stopped; the same command goes on from the last checkpoint, if there is one"
    if lost_a_process(error):
        return LOST
    raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    ours = isinstance(error, ValueError | FloatingPointError) and _PACKAGE in raised_in.parents
    return str(error) if ours or isinstance(error, OSError) else None


def _check_config(argv: list[str]) -> None:
    """The config file and every overridden key exist, or the nearest is named."""
    for position, argument in enumerate(argv):
        name, _, value = argument.lstrip("-").partition("=")
        if name != "config" or not argument.startswith("-"):
            continue
        value = value or (argv[position + 1] if position + 1 < len(argv) else "")
        file, _, config_argument = value.partition(":")
        if not Path(file).is_file():
            known = [str(path) for path in Path("configs").glob("*.py")]
            raise SystemExit(_say(f"there is no config file {file!r}: {nearest(file, known)}"))
        _check_keys(_load_config(file, config_argument), argv)


def _load_config(file: str, argument: str) -> ConfigDict:
    spec = importlib.util.spec_from_file_location("experiment_config", file)
    try:
        if spec is None or spec.loader is None:
            raise ImportError("it is no Python file")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module.get_config(argument)
    except Exception as error:  # whatever the user's own file raises
        message = f"the config file {file!r} fails with {type(error).__name__}: {' '.join(str(error).split())}"
        raise SystemExit(_say(message)) from None


def _check_keys(config: ConfigDict, argv: list[str]) -> None:
    for argument in argv:
        name = argument.lstrip("-").partition("=")[0]
        if not (argument.startswith("-") and name.startswith("config.")):
            continue
        node, path = config, name.split(".")[1:]
        for depth, key in enumerate(path):
            where = ".".join(["config", *path[:depth]])
            if not isinstance(node, ConfigDict):
                raise SystemExit(_say(f"{where} is a value and has no key {key!r}"))
            if key not in node:
                raise SystemExit(_say(f"{where} has no key {key!r}: {nearest(key, node.keys())}"))
            node = node[key]


def _say(message: str) -> int:
    """Print the sentence; returns the exit status."""
    print(f"error: {message}", file=sys.stderr)
    return 1
