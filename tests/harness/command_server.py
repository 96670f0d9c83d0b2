"""Runs `python train.py` and its kind in forks of one process that has imported everything: seconds less for each.

The server never starts a JAX backend and never installs the tests' import hook; it has one thread when it forks. A
fork runs the command to the end of the interpreter, as a new process does: sys.argv, sys.path, __main__, working
folder, exit handlers and exit status are a new process's own. The environment is the one the server was started with,
so that variables that libraries read when they are imported count; another environment gets another server. Variables
that are read later, when a backend starts, may differ from command to command.
"""

import atexit
import functools
import gc
import importlib
import json
import os
import pkgutil
import runpy
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
READ_LATE = ("XLA_FLAGS",)
# Numpy's own threads would be there when the server forks; a command has few matrices for them.
ONE_THREAD = {"OPENBLAS_NUM_THREADS": "1"}
STATUS = struct.Struct("=i")


def run_command(
    arguments: Sequence[str], *, cwd: Path = ROOT, environment: Mapping[str, str], timeout: float = 300.0
) -> subprocess.CompletedProcess[str]:
    """What `python ARGUMENTS` comes to: a script of the checkout and its options, or -m and a module.

    environment: all of it, as subprocess.run takes it. Raises subprocess.TimeoutExpired after timeout seconds.
    """
    late = {name: value for name, value in environment.items() if name in READ_LATE}
    early = {name: environment[name] for name in environment.keys() - late.keys() - {"PYTEST_CURRENT_TEST"}}
    return _server(tuple(sorted(early.items()))).run(arguments, cwd, timeout, late)


@functools.cache
def _server(environment: tuple[tuple[str, str], ...]) -> "CommandServer":
    server = CommandServer(dict(environment))
    atexit.register(server.close)
    return server


class CommandServer:
    """A process that runs commands in one environment; `with CommandServer(environment) as server`."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._socket, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.harness.command_server", str(theirs.fileno())],
                cwd=ROOT,
                env={**environment, **ONE_THREAD},
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
            )
        self._given = [name for name in ONE_THREAD if name not in environment]

    def __enter__(self) -> "CommandServer":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        """End the server; a command that still runs goes on."""
        self._socket.close()
        self._process.wait()

    def run(
        self, arguments: Sequence[str], cwd: Path, timeout: float, late: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """One command, as run_command says; late: values for variables of READ_LATE."""
        request = {"arguments": list(arguments), "cwd": str(cwd), "unset": self._given, "late": dict(late or {})}
        with tempfile.TemporaryFile("w+") as stdout, tempfile.TemporaryFile("w+") as stderr:
            socket.send_fds(self._socket, [json.dumps(request).encode()], [stdout.fileno(), stderr.fileno()])
            self._socket.settimeout(60.0)  # the first time it imports
            process = self._answer()
            self._socket.settimeout(timeout)
            late = False
            try:
                status = self._answer()
            except TimeoutError:
                late = True
                os.kill(process, signal.SIGKILL)
                self._socket.settimeout(None)
                status = self._answer()
            said = []
            for file in (stdout, stderr):
                file.seek(0)
                said.append(file.read())
        command = [sys.executable, *arguments]
        if late:
            raise subprocess.TimeoutExpired(command, timeout, *said)
        return subprocess.CompletedProcess(command, status, *said)

    def _answer(self) -> int:
        answer = self._socket.recv(STATUS.size, socket.MSG_WAITALL)
        if not answer:
            raise RuntimeError(f"the command server has ended with status {self._process.wait()}")
        return STATUS.unpack(answer)[0]


def import_everything() -> None:
    """All modules of the rooms of avit_jax: what a command imports, at once or when it needs it."""
    import avit_jax

    for module in pkgutil.walk_packages(avit_jax.__path__, "avit_jax."):
        # Modules beside the rooms, and __main__, are commands: python -m runs them once more.
        if module.name.count(".") > 1 and not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    gc.collect()
    gc.freeze()  # or every fork, when it ends, would look through all of it, a second and a half


def serve(connection: socket.socket) -> dict[str, Any] | None:
    """Fork for each request. Returns the request in the fork, and None in the server when nobody asks any more."""
    while True:
        try:
            content, files, _, _ = socket.recv_fds(connection, 1 << 20, 2)
        except ConnectionResetError:
            return None
        if not content:
            return None
        if Path("/proc/self/task").is_dir() and len(list(Path("/proc/self/task").iterdir())) > 1:
            raise RuntimeError("the command server has several threads: a fork of it could wait for ever")
        if (process := os.fork()) == 0:
            connection.close()
            for target, file in enumerate(files, start=1):
                os.dup2(file, target)
                os.close(file)
            return json.loads(content)
        for file in files:
            os.close(file)
        connection.send(STATUS.pack(process))
        connection.send(STATUS.pack(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])))


def run(arguments: list[str], cwd: str, unset: list[str], late: dict[str, str]) -> None:
    """The command itself, in the fork; python's own start of it, which has happened already, made up for."""
    for name in unset:
        del os.environ[name]
    os.environ |= late
    os.chdir(cwd)
    if arguments[0] == "-m":
        sys.path[0] = cwd
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv, main = arguments, types.ModuleType("__main__")
        main.__file__ = os.path.join(cwd, arguments[0])
        sys.path[0] = str(Path(main.__file__).parent)
        sys.modules["__main__"] = main
        exec(compile(Path(main.__file__).read_bytes(), main.__file__, "exec"), vars(main))


if __name__ == "__main__":
    with socket.socket(fileno=int(sys.argv[1])) as there:
        import_everything()
        wanted = serve(there)
    if wanted is not None:
        run(**wanted)
