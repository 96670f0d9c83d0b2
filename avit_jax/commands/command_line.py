"""What every command shares: configs from files, one clear sentence for an error, exit status 1."""

import itertools
import os
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jax
from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from avit_jax.commands.config_files import DEFAULT_CONFIG, find_config, load_config
from avit_jax.commands.config_help import config_help
from avit_jax.commands.help import HELP, help_text
from avit_jax.runtime.hints import nearest
from avit_jax.runtime.mesh import use_all_cores
from avit_jax.runtime.processes import LOST, end_now, leave, lost_a_process
from avit_jax.runtime.settings import flat

_PACKAGE = Path(__file__).parents[1]


def define_config_flag() -> flags.FlagHolder:
    """--config=NAME or FILE, with --config.key=value overrides, and --help_config."""
    flags.DEFINE_bool("help_config", False, "Print every key of the config: value, default, meaning.")
    return config_flags.DEFINE_config_file("config", None, "The experiment.", lock_config=True)


def run_main(
    main: Callable[[], None],
    options: Sequence[flags.FlagHolder],
    about: str,
    default_config: Callable[[Mapping[str, str]], str] = lambda _: DEFAULT_CONFIG,
    reads: Collection[str] = (),
) -> None:
    """Parse the flags, run main, and turn errors that a user can fix into one sentence and exit status 1.

    options: the command's own flags, without --config. about: its one-line description, for --help. default_config: the
    value of --config if it is not given, from the other options by name. reads: the sections and keys of the config
    that the command reads, for --help_config; empty: all.
    """
    # matplotlib writes its font cache to the home folder unless this is set before it is imported.
    os.environ.setdefault("MPLCONFIGDIR", str(Path("runs/.matplotlib").absolute()))
    own = ["config", "help_config", *(option.name for option in options)]

    def parse(argv: list[str]) -> list[str]:
        if any(argument in HELP for argument in argv[1:]):
            _print_and_exit(help_text(about, options))
        try:
            check_options(argv, own)
            argv, config = with_config(argv, default_config)
            check_keys(config, argv)
        except ValueError as error:
            raise SystemExit(_say(str(error))) from None
        try:
            rest = flags.FLAGS(argv)
            if flags.FLAGS.help_config:
                _print_and_exit(config_help(flags.FLAGS.config, reads))
            return rest
        except (flags.Error, ValueError, TypeError, AttributeError, KeyError) as error:
            raise SystemExit(_say(" ".join(str(error).split()))) from None

    def guarded(argv: list[str]) -> None:
        if len(argv) > 1:
            raise SystemExit(_say(f"{argv[1]!r} is not an option: write --name=value; --help lists the options"))
        logging.set_verbosity(logging.WARNING)  # orbax logs every rename at INFO
        _quiet_orbax()
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


def _quiet_orbax() -> None:
    """Drop what orbax says beside the error that it raises in this thread."""
    # The exceptions in its threads and tasks.
    logging.get_absl_handler().addFilter(
        lambda record: not (record.exc_info and ("orbax" in record.pathname or record.name == "asyncio"))
    )
    sys.unraisablehook = _unraisable
    # What it had still to do when it gave up a checkpoint on a full disk; no other code here has coroutines.
    warnings.filterwarnings("ignore", "coroutine '.*' was never awaited", RuntimeWarning)


def _leave_waiting_threads() -> None:
    """Exit with status 1 at once if a thread is left, because orbax's threads wait ten minutes for a failed save."""
    if any(thread is not threading.main_thread() and not thread.daemon for thread in threading.enumerate()):
        end_now()


def _unraisable(found: Any) -> None:
    """Python's own hook, without the repetitions of an orbax error that has been raised already.

    They come from tensorstore's threads when a write is given up, and from the reads beside the one that failed first.
    """
    frames = traceback.extract_tb(found.exc_traceback)
    of_a_read = bool(frames) and "orbax" in Path(frames[-1].filename).parts
    given_up = isinstance(found.exc_value, RuntimeError) and str(found.exc_value) == "Event loop is closed"
    if not (of_a_read or given_up):
        sys.__unraisablehook__(found)


def _sentence(error: BaseException) -> str | None:
    """The sentence that a user reads; None for an error inside a library, which is a bug and keeps its traceback."""
    if isinstance(error, KeyboardInterrupt):
        return "stopped; the same command goes on from the last checkpoint, if there is one"
    if lost_a_process(error):
        return LOST
    raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    ours = isinstance(error, ValueError | FloatingPointError) and _PACKAGE in raised_in.parents
    return str(error) if ours or isinstance(error, OSError) else None


def with_config(argv: list[str], default_config: Callable[[Mapping[str, str]], str]) -> tuple[list[str], ConfigDict]:
    """The arguments as ml_collections reads them, with the whole path of the config file, and the config itself.

    default_config: as for run_main. Raises ValueError for a config that does not exist or fails.
    """
    given: dict[str, str] = {}
    rest: list[str] = []
    skipped: str | None = None  # the value of --config VALUE
    for argument, following in itertools.zip_longest(argv[1:], argv[2:], fillvalue=""):
        name, has_value, value = argument.lstrip("-").partition("=")
        if argument.startswith("-"):
            given[name] = value if has_value else following  # --checkpoint=RUN or --checkpoint RUN
        if name == "config" and argument.startswith("-"):
            skipped = None if has_value else following
        elif skipped is not None:
            skipped = None
        else:
            rest.append(argument)
    # Not as the flag's default: ml_collections would apply the overrides at import, where a wrong key is not caught.
    file, config_argument = find_config(given["config"] if "config" in given else default_config(given))
    spec = ":".join([str(file), *config_argument])
    config = load_config(spec)
    return [argv[0], f"--config={spec}", *(_empty_tuple(argument, config) for argument in rest)], config


def _empty_tuple(argument: str, config: ConfigDict) -> str:
    """Turns --config.data.mean= into --config.data.mean=() if the key holds a tuple; ml_collections reads ("",)."""
    name, _, value = argument.partition("=")
    path = name.lstrip("-").split(".")
    is_tuple = not value and path[0] == "config" and isinstance(flat(config.to_dict()).get(".".join(path[1:])), tuple)
    return f"{name}=()" if is_tuple and "=" in argument else argument


def check_options(argv: list[str], own: list[str]) -> None:
    """Raises ValueError, naming a key of the configs or the nearest option, for an option that does not exist."""
    known = flags.FLAGS
    for name in _names(argv):
        if not name.startswith("config.") and name not in known and not (name[:2] == "no" and name[2:] in known):
            hint = _keys_named(name, flat(load_config(DEFAULT_CONFIG).to_dict())) or nearest(name, own)
            raise ValueError(f"there is no option --{name}: {hint}")


def check_keys(config: ConfigDict, argv: list[str]) -> None:
    """Raises ValueError, naming the nearest key, for --config.KEY=VALUE with a key that the config lacks."""
    keys = flat(config.to_dict())
    for name in _names(argv):
        if name.startswith("config."):
            _check_key(config, name.split(".")[1:], keys)


def _names(argv: list[str]) -> list[str]:
    """The names of all options, without dashes and values."""
    names = [argument.lstrip("-").partition("=")[0] for argument in argv[1:] if argument.startswith("-")]
    return [name for name in names if name]


def _check_key(config: ConfigDict, path: list[str], keys: Mapping[str, Any]) -> None:
    node: Any = config
    for depth, key in enumerate(path):
        where = ".".join(["config", *path[:depth]])
        if not isinstance(node, ConfigDict):
            raise ValueError(f"{where} is a value and has no key {key!r}")
        if key not in node:
            hint = _keys_named(".".join(path[depth:]), keys) or nearest(key, node.keys())
            raise ValueError(f"{where} has no key {key!r}: {hint}")
        node = node[key]


def _keys_named(name: str, keys: Mapping[str, Any]) -> str:
    """A hint if the config has a key of this name, in any section; otherwise an empty text."""
    found = [f"--config.{key}" for key in keys if key == name or key.endswith(f".{name}")]
    return f"did you mean {' or '.join(found)}?" if found else ""


def _print_and_exit(text: str) -> NoReturn:
    """Print the text and exit with status 0, also if the reader of a pipe, such as head, has left."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it flushes at exit
    raise SystemExit(0)


def _say(message: str) -> int:
    """Print the sentence; returns the exit status."""
    print(f"error: {message}", file=sys.stderr)
    return 1
