"""Command processes without their import time: a server imports the libraries once and forks for every command.

A forked command is a process of its own: it can be killed, has its own working directory, environment and output, and
ends with its own exit status. What it does not test is the start of an interpreter; tests about imports use
`subprocess` instead.
"""

from __future__ import annotations

import contextlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# What most commands import first. Libraries that start threads when they are imported do not belong here.
PRELOADED = ("numpy", "torch", "yaml", "pydantic", "jinja2", "trainer.loop.train", "trainer.evaluate.evaluator")


class WarmProcesses:
    """A server process that forks commands. Start it once per test process."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair()
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "support.warm_process", str(theirs.fileno())],
            cwd=ROOT,
            env=environment,
            pass_fds=[theirs.fileno()],
        )
        theirs.close()

    def run(
        self, module: str, arguments: list[str], cwd: Path, env: dict[str, str], timeout: float
    ) -> subprocess.CompletedProcess[str]:
        """Run `python -m module arguments` to its end, or `python script.py arguments` if `module` is a path.

        Raises:
            subprocess.TimeoutExpired: The command is killed after `timeout` seconds.
        """
        request = json.dumps({"module": module, "arguments": arguments, "cwd": str(cwd), "env": env}).encode()
        with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
            socket.send_fds(self._socket, [len(request).to_bytes(4, "big")], [output.fileno(), errors.fileno()])
            self._socket.sendall(request)
            pid = int.from_bytes(self._receive(4), "big")
            self._socket.settimeout(timeout)
            try:
                status = int.from_bytes(self._receive(4), "big", signed=True)
            except TimeoutError:
                os.kill(pid, signal.SIGKILL)
                self._socket.settimeout(None)
                self._receive(4)
                raise subprocess.TimeoutExpired([module, *arguments], timeout) from None
            self._socket.settimeout(None)
            output.seek(0)
            errors.seek(0)
            return subprocess.CompletedProcess([module, *arguments], status, output.read(), errors.read())

    def _receive(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            data += self._socket.recv(size - len(data))
        return data

    def close(self) -> None:
        """Stop the server."""
        self._socket.close()
        self._process.wait()


def _serve(connection: socket.socket) -> int:
    for name in PRELOADED:
        __import__(name)
    while True:
        header, descriptors, _, _ = socket.recv_fds(connection, 4, 2)
        if not header:
            return 0
        size, request = int.from_bytes(header, "big"), b""
        while len(request) < size:
            request += connection.recv(size - len(request))
        pid = os.fork()
        if pid == 0:
            connection.close()
            return _run_command(json.loads(request), descriptors)
        for descriptor in descriptors:
            os.close(descriptor)
        connection.sendall(pid.to_bytes(4, "big"))
        _, status = os.waitpid(pid, 0)
        connection.sendall(os.waitstatus_to_exitcode(status).to_bytes(4, "big", signed=True))


def _run_command(request: dict, descriptors: list[int]) -> int:
    """Become the command, in the forked process; returns its exit status."""
    nothing = os.open(os.devnull, os.O_RDONLY)
    for ours, standard in zip((nothing, *descriptors), range(3), strict=True):
        os.dup2(ours, standard)
        os.close(ours)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    added = [path for path in request["env"].get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[:] = [request["cwd"], *added, *(path for path in sys.path[1:] if path != str(ROOT / "tests"))]
    sys.argv = [request["module"], *request["arguments"]]
    try:
        if request["module"].endswith(".py"):
            sys.path[0] = str(Path(request["module"]).resolve().parent)
            runpy.run_path(request["module"], run_name="__main__")
        else:
            runpy.run_module(request["module"], run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(_serve(socket.socket(fileno=int(sys.argv[1]))))
