"""Fresh processes that are kept and commanded through a pipe, and what a tree of processes costs."""

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
from typing import Any

import psutil

from shards.errors import first_line

# Imported once, by the process that all others are forked from: a fresh process is there in a moment.
_PRELOADED = ["numpy", "psutil", "torch", "PIL.Image"]


class ProcessFailed(Exception):
    """The kept process raised, died or gave no answer. reason: a line for people; details: its traceback."""

    def __init__(self, reason: str, kind: str = "", details: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.kind = kind
        self.details = details


class KeptProcess:
    """A fresh process that holds one object and calls its methods on request.

    make, arguments: a function of a module and what it gets, to make the object there; both are pickled.
    log: a file that takes what the process and its libraries print. Beside it go their temporary files.
    """

    def __init__(self, make: Callable[..., Any], *arguments: Any, log: Path) -> None:
        method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
        context = multiprocessing.get_context(method)
        if method == "forkserver":
            context.set_forkserver_preload(_PRELOADED)
        self._pipe, theirs = context.Pipe()
        # Not a daemon: those may not have workers of their own.
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
        """Call a method of the object there and wait for its result.

        meanwhile: called every 50 ms while waiting. Raises `ProcessFailed`, with `kind` the class of an exception.
        """
        self._pipe.send((method, arguments))
        start = time.monotonic()
        try:
            while not self._pipe.poll(0.05):
                if time.monotonic() - start > timeout:
                    self._process.kill()
                    raise ProcessFailed(f"no answer in {timeout:g} s")
                if meanwhile is not None:
                    meanwhile()
            outcome, *values = self._pipe.recv()
        except (EOFError, ConnectionError):
            self._process.join(5)
            raise ProcessFailed(f"the process died (exit status {self._process.exitcode})") from None
        if outcome == "error":
            raise ProcessFailed(*values)
        return values[0]

    def close(self) -> None:
        """End the process and the workers it may have left."""
        left = tree(self.pid)
        self._pipe.close()
        self._process.join(5)
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self._process.join(5)
        psutil.wait_procs(left, timeout=5)

    def __enter__(self) -> KeptProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _serve(
    pipe: Connection, make: Callable[..., Any], arguments: tuple[Any, ...], log: Path, start_method: str
) -> None:
    # What this process starts in its turn (workers of loaders) is started as in any program, not as it was itself.
    multiprocessing.set_start_method(start_method, force=True)
    os.environ["TMPDIR"] = tempfile.tempdir = str(log.parent)  # some libraries leave lock files and caches there
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream, number in ((sys.stdout, 1), (sys.stderr, 2)):
        stream.flush()
        os.dup2(file, number)
    held: Any = None
    made = False
    while True:
        try:
            method, values = pipe.recv()
        except (EOFError, ConnectionError):
            # A process of multiprocessing leaves these out at its end, and libraries free shared memory in them.
            atexit._run_exitfuncs()
            return
        try:
            if not made:  # at the first call, so that what it raises is the answer to something
                held, made = make(*arguments), True
            answer = ("result", getattr(held, method)(*values))
        except Exception as error:
            answer = ("error", first_line(error), type(error).__name__, traceback.format_exc())
        pipe.send(answer)


def tree(pid: int) -> list[psutil.Process]:
    """A process and all its descendants, those that are still there."""
    try:
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def cpu_seconds(pid: int) -> float:
    """User and system time of a process, its living descendants and those that they have waited for."""
    total = 0.0
    for process in tree(pid):
        with contextlib.suppress(psutil.NoSuchProcess):
            total += sum(process.cpu_times()[:4])  # user, system, and the same of children that have ended
    return total


def forget_peak_memory() -> None:
    """Have `trainer.runtime.memory.peak_memory` of this process count from now on, where the system can."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def workers_memory(pid: int) -> int:
    """Bytes that the descendants of a process hold and share with no other process."""
    total = 0
    for process in tree(pid)[1:]:
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            total += process.memory_full_info().uss
    return total


def wait_until_quiet(pid: int, most_seconds: float = 5.0) -> None:
    """Wait until a process and its workers rest: nothing may run on behind the back of the next measurement."""
    end = time.monotonic() + most_seconds
    before = cpu_seconds(pid)
    while time.monotonic() < end:
        time.sleep(0.04)
        now = cpu_seconds(pid)
        if now - before < 0.005:
            return
        before = now
