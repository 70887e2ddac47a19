"""Worker processes that hold one object, and the CPU time and memory of a process tree."""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from shards.errors import first_line

if TYPE_CHECKING:
    from multiprocessing.context import ForkServerContext, SpawnContext

_PRELOADED = ["numpy", "psutil", "torch", "PIL.Image"]
_LOG_CHARACTERS = 2000  # of a process that died


def fresh_processes(preloaded: list[str]) -> ForkServerContext | SpawnContext:
    """Return a context of multiprocessing whose processes do not inherit the state of this one.

    Args:
        preloaded: Modules that the fork server of Linux imports once, so that processes start quickly.
    """
    if sys.platform != "linux":  # libraries of macOS may crash in forked processes
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(preloaded)
    return context


class WorkerError(Exception):
    """The worker process raised an exception, died or did not answer.

    Args:
        reason: One line for the user.
        kind: Class name of the exception, or "".
        details: Traceback; the end of the log if the process died.
    """

    def __init__(self, reason: str, kind: str = "", details: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.kind = kind
        self.details = details


class WorkerProcess:
    """Fresh process that holds one object and calls its methods on request.

    Args:
        make: Function of a module that creates the object in the process.
        arguments: Its arguments; they are pickled.
        log: File for the output of the process. Its directory also holds temporary files of libraries.
    """

    def __init__(self, make: Callable[..., Any], *arguments: Any, log: Path) -> None:
        context = fresh_processes(_PRELOADED)
        self._log = log
        log.touch()
        self._pipe, theirs = context.Pipe()
        # Not a daemon: daemons cannot start worker processes.
        self._process = context.Process(
            target=_serve, args=(theirs, make, arguments, log, multiprocessing.get_start_method()), daemon=False
        )
        self._process.start()
        theirs.close()
        assert self._process.pid is not None
        self.pid = self._process.pid

    def call(
        self, method: str, *arguments: Any, timeout: float = 300, meanwhile: Callable[[], None] | None = None
    ) -> Any:
        """Call a method of the object and wait for its result.

        Args:
            method: Name of the method.
            arguments: Its arguments; they are pickled.
            timeout: Seconds after which the process is killed.
            meanwhile: Function that is called every 50 ms during the wait.

        Raises:
            WorkerError: The method raised an exception, or the process died or did not answer.
        """
        start = time.monotonic()
        try:
            self._pipe.send((method, arguments))
            while not self._pipe.poll(0.05):
                if time.monotonic() - start > timeout:
                    self._process.kill()
                    raise WorkerError(f"no answer in {timeout:g} s")
                if meanwhile is not None:
                    meanwhile()
            outcome, *values = self._pipe.recv()
        except (EOFError, ConnectionError):
            self._process.join(5)
            reason = f"the process died (exit status {self._process.exitcode})"
            raise WorkerError(reason, details=self._log.read_text(errors="replace")[-_LOG_CHARACTERS:]) from None
        if outcome == "error":
            raise WorkerError(*values)
        return values[0]

    def close(self) -> None:
        """End the process and its own worker processes."""
        processes = process_tree(self.pid)
        self._pipe.close()
        self._process.join(5)
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self._process.join(5)
        psutil.wait_procs(processes, timeout=5)

    def __enter__(self) -> WorkerProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _serve(
    pipe: Connection, make: Callable[..., Any], arguments: tuple[Any, ...], log: Path, start_method: str
) -> None:
    # Workers of loaders are started with the default method, not with that of this process.
    multiprocessing.set_start_method(start_method, force=True)
    os.environ["TMPDIR"] = tempfile.tempdir = str(log.parent)  # for lock files and caches of libraries
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream, number in ((sys.stdout, 1), (sys.stderr, 2)):
        stream.flush()
        os.dup2(file, number)
    instance: Any = None
    is_made = False
    while True:
        try:
            method, values = pipe.recv()
        except (EOFError, ConnectionError):
            # multiprocessing does not call these at exit, and libraries free shared memory in them.
            atexit._run_exitfuncs()
            return
        try:
            if not is_made:  # at the first call, so that its exception is an answer
                instance, is_made = make(*arguments), True
            answer: tuple[Any, ...] = ("result", getattr(instance, method)(*values))
        except Exception as error:
            answer = ("error", first_line(error), type(error).__name__, traceback.format_exc())
        pipe.send(answer)


def process_tree(pid: int) -> list[psutil.Process]:
    """Return a process and its living descendants."""
    try:
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def cpu_seconds(pid: int) -> float:
    """Return user and system time of a process, its living descendants and their ended children."""
    total = 0.0
    for process in process_tree(pid):
        with contextlib.suppress(psutil.NoSuchProcess):
            total += sum(process.cpu_times()[:4])  # user, system, and both of ended children
    return total


def reset_peak_memory() -> None:
    """Reset the peak of `trainer.runtime.memory.peak_memory` of this process, if the system supports it."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def workers_memory(pid: int) -> int:
    """Return the bytes of the descendants of a process that they share with no other process."""
    total = 0
    for process in process_tree(pid)[1:]:
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            total += process.memory_full_info().uss
    return total


def wait_until_idle(pid: int, timeout: float = 5.0) -> None:
    """Wait until a process and its workers are idle, so that they do not disturb the next measurement."""
    end = time.monotonic() + timeout
    before = cpu_seconds(pid)
    while time.monotonic() < end:
        time.sleep(0.04)
        now = cpu_seconds(pid)
        if now - before < 0.005:
            return
        before = now
