"""Processes of Python without their import time: one server imports the libraries once and forks for every command.

A forked command is a process of its own: it can be killed, has its own working directory, environment, files and
session, and ends with its own exit status or by its signal. What it does not test is the start of an interpreter: tests
about imports, and one of each kind of start, use `sys.executable` instead.

There are two ways to it. `Popen` and `run` are those of `subprocess`, whose process is the forked one. `executable()`
is a program to be started in place of Python by the code under test: it has the server fork, hands signals on, and ends
as the command ends.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import importlib
import io
import json
import os
import runpy
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
_SHIM = Path(__file__).with_name("warm_python.py")
# Set by the process that starts the server, for those it starts: the directory of the server's socket and executable.
_VARIABLE = "WARM_PROCESSES"
# Libraries that start threads when they are imported do not belong here: pyarrow, onnxruntime.
_PRELOADED = (
    "matplotlib.pyplot",
    "numpy",
    "optuna.visualization.matplotlib",
    "psutil",
    "sklearn.datasets",
    "tensorstore",
    "timm",
    "torch.distributed.run",
    "torch.utils.tensorboard",
    "torchvision",
    "zarr",
    "pipeline.preview",
    "pipeline.shard",
    "shards.convert",
    "shards.verify",
    "trainer.evaluate.evaluator",
    "trainer.run",
    "trainer.tune.__main__",
)
_FLAGS = {"-B", "-u"}  # options of Python before -m, -c or the script that a forked command may have


@functools.cache
def _directory() -> Path:
    """The directory of the server, which is started if none is running."""
    if _VARIABLE not in os.environ:
        start_server()
    return Path(os.environ[_VARIABLE])


@functools.cache
def start_server() -> None:
    """Start the server; it ends, with all its commands, when this process ends. It needs some seconds to be ready."""
    directory = Path(tempfile.mkdtemp(prefix="warm-"))
    ours, theirs = socket.socketpair()
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]), "OMP_NUM_THREADS": "1"}
    shim = directory / "python"
    shim.write_text(f"#!{sys.executable} -IS\n{_SHIM.read_text()}")
    shim.chmod(0o755)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(directory / "socket"))
    listener.listen(128)
    server = subprocess.Popen(
        [sys.executable, "-m", "support.warm_process", str(listener.fileno()), str(theirs.fileno())],
        cwd=ROOT,
        env=environment,
        pass_fds=[listener.fileno(), theirs.fileno()],
        start_new_session=True,
    )
    listener.close()
    theirs.close()
    os.environ[_VARIABLE] = str(directory)

    def stop() -> None:
        ours.close()
        server.wait()
        shutil.rmtree(directory)

    atexit.register(stop)


def executable() -> str:
    """The program that is Python, but forks the command."""
    return str(_directory() / "python")


class Popen(subprocess.Popen):
    """`subprocess.Popen` of Python, forked by the server. Other programs and rare options start as usual."""

    _connection: socket.socket | None = None

    def _execute_child(  # type: ignore[override]
        self, args, program, preexec_fn, close_fds, pass_fds, cwd, env, startupinfo, creationflags, shell, *more
    ):
        args = [os.fspath(arg) for arg in args]
        pipes = more[:6]  # of standard input, output and error: the ends to read from and to write to
        *_, start_new_session, _ = more[6:]
        if args[0] != sys.executable or preexec_fn is not None or shell or not _can_fork(args[1:]):
            super()._execute_child(
                args, program, preexec_fn, close_fds, pass_fds, cwd, env, startupinfo, creationflags, shell, *more
            )
            return
        request = {
            "arguments": args[1:],
            "cwd": os.path.abspath(cwd or os.getcwd()),
            "environment": dict(os.environ if env is None else env),
            "descriptors": [0, 1, 2, *pass_fds],
            "session": bool(start_new_session),
            "executable": executable(),
        }
        standard = [own if own != -1 else number for number, own in enumerate((pipes[0], pipes[3], pipes[5]))]
        self._connection = socket.socket(socket.AF_UNIX)
        self._connection.connect(str(_directory() / "socket"))
        send_request(self._connection, request, [*standard, *pass_fds])
        self._close_pipe_fds(*pipes)  # type: ignore[attr-defined]
        self.pid = int.from_bytes(_receive(self._connection, 4), "big")
        self._child_created = True

    def _internal_poll(self, _deadstate=None, **_):  # type: ignore[override]
        if self._connection is None:
            return super()._internal_poll(_deadstate)
        if self.returncode is None and self._waitpid_lock.acquire(False):  # type: ignore[attr-defined]
            try:
                pid, status = self._try_wait(os.WNOHANG)
                if pid == self.pid:
                    self._handle_exitstatus(status)  # type: ignore[attr-defined]
            finally:
                self._waitpid_lock.release()  # type: ignore[attr-defined]
        return self.returncode

    def _try_wait(self, wait_flags):
        if self._connection is None:
            return super()._try_wait(wait_flags)
        try:
            self._connection.settimeout(0 if wait_flags & os.WNOHANG else None)
            status = int.from_bytes(_receive(self._connection, 4), "big")
        except BlockingIOError:
            return 0, 0
        except (OSError, EOFError):  # the object was freed before its process ended, or the server has ended
            status = signal.SIGKILL
        self._connection.close()
        return self.pid, status


def _can_fork(arguments: list[str]) -> bool:
    rest = [argument for argument in arguments if argument not in _FLAGS]
    return bool(rest) and (rest[0] in ("-c", "-m") or not rest[0].startswith("-"))


def run(
    args: list[Any], *, capture_output: bool = False, check: bool = False, timeout: float | None = None, **options: Any
) -> subprocess.CompletedProcess:
    """`subprocess.run` with the `Popen` of this module."""
    if capture_output:
        options |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with Popen([*map(str, args)], **options) as process:
        try:
            output, errors = process.communicate(timeout=timeout)
        except BaseException:
            process.kill()
            raise
    finished = subprocess.CompletedProcess(process.args, process.returncode, output, errors)
    if check:
        finished.check_returncode()
    return finished


def send_request(connection: socket.socket, request: dict[str, Any], descriptors: list[int]) -> None:
    data = json.dumps(request).encode()
    socket.send_fds(connection, [len(data).to_bytes(4, "big")], descriptors)
    connection.sendall(data)


def _receive(connection: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = connection.recv(size - len(data))
        if not part:
            raise EOFError("the server of warm processes has ended")
        data += part
    return data


class _Server:
    """Forks a command for every connection, and ends it when the connection is closed."""

    def __init__(self, listener: socket.socket, lifeline: socket.socket) -> None:
        self.listener = listener
        self.commands: dict[int, socket.socket] = {}
        self.selector = selectors.DefaultSelector()
        woken, waker = socket.socketpair()
        self.sockets = (listener, lifeline, woken, waker)
        for one in self.sockets:
            one.setblocking(False)
        signal.set_wakeup_fd(waker.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        self.selector.register(listener, selectors.EVENT_READ, self.accept)
        self.selector.register(lifeline, selectors.EVENT_READ, self.end)
        self.selector.register(woken, selectors.EVENT_READ, self.reap)

    def serve(self) -> tuple[dict[str, Any], list[int]]:
        """Serve until the end; returns in a forked process, with what it is to do and its files."""
        while True:
            for key, _ in self.selector.select():
                if self.selector.get_map().get(key.fd) is key:  # not of a command that has just been reaped
                    command = key.data(key.fileobj)
                    if command is not None:
                        return command

    def accept(self, listener: socket.socket) -> tuple[dict[str, Any], list[int]] | None:
        connection, _ = listener.accept()
        header, descriptors, _, _ = socket.recv_fds(connection, 4, 250)
        try:
            request = json.loads(_receive(connection, int.from_bytes(header, "big")))
        except (EOFError, ValueError):
            request = None
        pid = os.fork() if request else -1
        if request and pid == 0:
            os.setsid() if request["session"] else os.setpgid(0, 0)
            return request, descriptors
        for descriptor in descriptors:
            os.close(descriptor)
        if not request:
            connection.close()
            return None
        self.commands[pid] = connection
        with contextlib.suppress(OSError):
            connection.sendall(pid.to_bytes(4, "big"))
        self.selector.register(connection, selectors.EVENT_READ, functools.partial(self.kill, pid))
        return None

    def kill(self, pid: int, connection: socket.socket) -> None:
        """The other end was closed, by a process that was killed: its group is killed as well."""
        self.selector.unregister(connection)
        _kill_group(pid)

    def reap(self, woken: socket.socket) -> None:
        woken.recv(4096)
        with contextlib.suppress(ChildProcessError):
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if pid == 0:
                    return
                connection = self.commands.pop(pid)
                with contextlib.suppress(KeyError):
                    self.selector.unregister(connection)
                with contextlib.suppress(OSError):
                    connection.sendall(status.to_bytes(4, "big"))
                connection.close()

    def end(self, _: socket.socket) -> None:
        """The tests have ended. What serves others (a tracker of resources) ends after them, by itself."""
        deadline = time.monotonic() + 3
        while self.commands and time.monotonic() < deadline:
            pid, _ = os.waitpid(-1, os.WNOHANG)
            self.commands.pop(pid, None)
            time.sleep(0.01)
        for pid in self.commands:
            _kill_group(pid)
            os.waitpid(pid, 0)
        os._exit(0)


def _kill_group(pid: int) -> None:
    for kill in (os.killpg, os.kill):
        with contextlib.suppress(ProcessLookupError):
            kill(pid, signal.SIGKILL)


def _become(request: dict[str, Any], descriptors: list[int]) -> None:
    """Be the process of the command, but for its code."""
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGCHLD, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    wanted = request["descriptors"]
    apart = max([*descriptors, *wanted]) + 1
    moved = [os.dup2(descriptor, apart + number) for number, descriptor in enumerate(descriptors)]
    os.closerange(0, apart)
    for source, target in zip(moved, wanted, strict=True):
        os.dup2(source, target)
    os.closerange(apart, 1 << 20)  # also those of other commands
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environment"])
    time.tzset()
    tempfile.tempdir = None
    _fit_libraries(request["environment"])
    unbuffered = "-u" in request["arguments"] or bool(os.environ.get("PYTHONUNBUFFERED"))
    sys.stdin = sys.__stdin__ = open(0, closefd=False)  # type: ignore[misc] # noqa: SIM115
    for name, number in (("stdout", 1), ("stderr", 2)):
        raw = open(number, "wb", 0 if unbuffered else -1, closefd=False)  # noqa: SIM115
        at_once = number == 2 or os.isatty(number)
        errors = "backslashreplace" if number == 2 else "strict"
        stream = io.TextIOWrapper(raw, errors=errors, line_buffering=at_once, write_through=unbuffered)
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    if request["executable"]:
        sys.executable = request["executable"]
        if spawn := sys.modules.get("multiprocessing.spawn"):
            spawn.set_executable(sys.executable)


def _fit_libraries(environment: dict[str, str]) -> None:
    """What libraries read of the environment when they were imported, and what must differ between processes."""
    import numpy as np
    import torch

    from shards.limits import available_cpus

    np.random.seed()  # noqa: NPY002
    if wandb := sys.modules.get("wandb.sdk.data_types._private"):  # imported by timm
        wandb.MEDIA_TMP._finalizer.detach()  # each process removes its directory at its end
        wandb.MEDIA_TMP.__init__("wandb-media")
    threads = environment.get("OMP_NUM_THREADS") or str(available_cpus())
    if threads.isdecimal() and int(threads) != torch.get_num_threads():
        torch.set_num_threads(int(threads))


def _execute(arguments: list[str], path: list[str]) -> None:
    """Run the command as Python does, in the module __main__."""
    while arguments[0] in _FLAGS:
        del arguments[0]
    added = [name for name in os.environ.get("PYTHONPATH", "").split(os.pathsep) if name]
    first, *rest = arguments
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    main.__dict__["__builtins__"] = __builtins__
    if first == "-m":
        sys.argv = rest
        sys.path[:] = [os.getcwd(), *added, *path]
        sys.modules.pop(rest[0], None)
        sys.modules.pop(f"{rest[0]}.__main__", None)
        runpy._run_module_as_main(rest[0])  # type: ignore[attr-defined]
        return
    if first == "-c":
        sys.argv = ["-c", *rest[1:]]
        sys.path[:] = ["", *added, *path]
        code = compile(rest[0], "<string>", "exec")
    else:
        sys.argv = arguments
        sys.path[:] = [str(Path(first).resolve().parent), *added, *path]
        main.__file__ = first
        code = compile(Path(first).read_bytes(), first, "exec")
    exec(code, main.__dict__)


def _finish(command: Callable[..., None], *arguments: Any) -> None:
    """End the process as Python ends, without taking the libraries apart."""
    status = 0
    try:
        command(*arguments)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException as error:
        status = -signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
        trace = error.__traceback__
        while trace is not None and trace.tb_frame.f_code.co_filename == __file__:
            trace = trace.tb_next
        sys.excepthook(type(error), error.with_traceback(trace), trace)
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    vars(sys.modules["__main__"]).clear()
    gc.collect()  # files are written when they are freed
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    if status < 0:
        signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status & 0xFF)


def _main(listener: int, lifeline: int) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    for name in _PRELOADED:
        with contextlib.suppress(Exception):  # a test will tell
            importlib.import_module(name)
    tasks = Path("/proc/self/task")
    assert not tasks.exists() or len(list(tasks.iterdir())) == 1, "a preloaded library has started a thread"
    server = _Server(socket.socket(fileno=listener), socket.socket(fileno=lifeline))
    own = {"", str(ROOT), str(ROOT / "tests")}
    path = [name for name in sys.path if name not in own]
    gc.collect()
    gc.freeze()
    request, descriptors = server.serve()
    for one in server.sockets:
        one.detach()
    _become(request, descriptors)
    _finish(_execute, request["arguments"], path)


if __name__ == "__main__":
    from support import warm_process  # commands are given another __main__

    warm_process._main(int(sys.argv[1]), int(sys.argv[2]))
