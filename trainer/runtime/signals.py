"""SIGTERM and SIGINT: noted, so that training stops at its next update, with a deadline should it not come to that."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_NOTED = (signal.SIGINT, signal.SIGTERM)


class Interrupted(Exception):
    """A signal came before the work was done."""


@contextmanager
def record_signals(grace: float) -> Iterator[list[int]]:
    """Note SIGINT and SIGTERM instead of dying; the list holds what came.

    grace: seconds after which the process ends, with status 128 + signal, if it is still in this context: it may be
    waiting in a library for a peer that is gone. A second SIGINT, a person's, ends it at once; a second SIGTERM does
    not, as schedulers send one to every process and torchrun passes its own on.
    """
    received: list[int] = []

    def note(signum: int, frame: FrameType | None) -> None:
        received.append(signum)
        if received.count(signal.SIGINT) > 1:
            raise KeyboardInterrupt

    before = {number: signal.signal(number, note) for number in _NOTED}
    try:
        with _deadline(grace):
            yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _deadline(grace: float) -> Iterator[None]:
    """End the process some seconds after one of the signals, unless the context has ended by then.

    Python runs signal handlers between two of its own instructions; a thread that reads what the C handler writes is
    told of the signal even while the main thread waits in a library.
    """
    left = threading.Event()
    reading, writing = socket.socketpair()  # which signals can be written to on every system
    writing.setblocking(False)

    def watch() -> None:
        signum = 0
        while signum not in _NOTED:
            signum = reading.recv(1)[0]
            if left.is_set():
                return
        if not left.wait(grace):
            print(
                f"stopped {grace:g} s after signal {signum}, before an update was reached (checkpoint.grace_seconds); "
                "the newest checkpoint stands",
                file=sys.stderr,
                flush=True,
            )
            os._exit(128 + signum)

    thread = threading.Thread(target=watch, name="deadline", daemon=True)
    thread.start()
    before = signal.set_wakeup_fd(writing.fileno(), warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        left.set()
        writing.send(b"\0")
        thread.join()
        reading.close()
        writing.close()
