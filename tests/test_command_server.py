"""A command in a fork of the server comes to what it comes to in a new process."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness.builders import quick_start
from tests.harness.command_server import CommandServer


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    return os.environ | quick_start() | {"JAX_PLATFORMS": "cpu", "OF_THE_TEST": "7"}


@pytest.fixture(scope="module")
def server(environment: dict[str, str]) -> Iterator[CommandServer]:
    with CommandServer(environment) as server:
        yield server


SAYS_ALL = """
import __main__, atexit, os, sys, threading
atexit.register(lambda: print("left"))
threading.Thread(target=lambda: (threading.main_thread().join(), print("thread"))).start()
print(sys.argv, sys.path[0], os.getcwd(), os.environ["OF_THE_TEST"], os.environ.get("OPENBLAS_NUM_THREADS"))
print(__name__, __main__.__file__, __main__.__spec__ and __main__.__spec__.name, __main__.argument)
print("to stderr", file=sys.stderr)
print(repr(sys.stdin.read()), sys.stdout.isatty())
sys.exit(3)
"""


@pytest.mark.parametrize("start", [["says.py"], ["./says.py"], ["-m", "says"]])
def test_it_is_started_and_ends_as_a_new_process(
    server: CommandServer, environment: dict[str, str], tmp_path: Path, start: list[str]
) -> None:
    (tmp_path / "says.py").write_text("import sys\nargument = sys.argv[1]\n" + SAYS_ALL)
    arguments = [*start, "--some=thing", "x y"]
    forked = server.run(arguments, tmp_path, 60)
    new = subprocess.run(
        [sys.executable, *arguments],
        cwd=tmp_path,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert (forked.stdout, forked.stderr, forked.returncode) == (new.stdout, new.stderr, 3)
    assert "left" in new.stdout and "thread" in new.stdout


@pytest.mark.parametrize(
    ("code", "status", "said"),
    [
        ("", 0, ""),
        ("raise SystemExit('a sentence')", 1, "a sentence\n"),
        ("1 / 0", 1, "ZeroDivisionError: division by zero\n"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", -11, ""),
        ("import os, signal; os.kill(os.getpid(), signal.SIGTERM)", -15, ""),
        ("import os, signal; os.kill(os.getpid(), signal.SIGINT)", -2, "KeyboardInterrupt\n"),
        ("import os; os._exit(9)", 9, ""),
    ],
)
def test_statuses_are_those_of_a_new_process(
    server: CommandServer, tmp_path: Path, code: str, status: int, said: str
) -> None:
    (tmp_path / "ends.py").write_text(code)
    done = server.run(["ends.py"], tmp_path, 60)
    assert done.returncode == status
    assert done.stderr.endswith(said) and bool(done.stderr) == bool(said)


def test_one_command_leaves_nothing_to_the_next(server: CommandServer, tmp_path: Path) -> None:
    (tmp_path / "changes.py").write_text(
        "import os, sys, jax, avit_jax\n"
        "from absl import flags\n"
        "assert not hasattr(avit_jax, 'touched') and 'TOUCHED' not in os.environ and 'x' not in flags.FLAGS\n"
        "avit_jax.touched, os.environ['TOUCHED'] = 1, '1'\n"
        "flags.DEFINE_string('x', None, '')\n"
        "jax.config.update('jax_num_cpu_devices', 3)\n"  # refused where JAX has begun
        "print(len(jax.devices()))\n"
    )
    assert [server.run(["changes.py"], tmp_path, 60).stdout for _ in range(2)] == ["3\n", "3\n"]


def test_what_jax_reads_when_it_begins_may_differ(server: CommandServer, tmp_path: Path) -> None:
    (tmp_path / "counts.py").write_text("import jax\nprint(len(jax.devices()))")
    for count in (5, 2):
        late = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={count}"}
        assert server.run(["counts.py"], tmp_path, 60, late).stdout == f"{count}\n"


def test_commands_run_without_the_import_hook_of_the_tests(server: CommandServer, tmp_path: Path) -> None:
    """The hook has an error of its own for a preset that is not a string."""
    (tmp_path / "wrong.py").write_text(
        "import avit_jax\ntry:\n  avit_jax.create(3)\nexcept Exception as error:\n  print(type(error).__name__)"
    )
    assert server.run(["wrong.py"], tmp_path, 60).stdout == "TypeError\n"


def test_a_command_that_hangs_is_killed(server: CommandServer, tmp_path: Path) -> None:
    (tmp_path / "hangs.py").write_text("import time\nprint('begins', flush=True)\ntime.sleep(1000)")
    with pytest.raises(subprocess.TimeoutExpired) as found:
        server.run(["hangs.py"], tmp_path, 1.0)
    assert found.value.output == "begins\n"
    (tmp_path / "goes_on.py").write_text("print(1)")
    assert server.run(["goes_on.py"], tmp_path, 60).stdout == "1\n", "the server goes on"
