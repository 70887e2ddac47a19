"""Record the signals of users and schedulers, so that training stops at its next optimizer step, with a deadline."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from trainer.runtime.distributed import World

# A closed terminal sends SIGHUP (on Windows SIGBREAK, as Ctrl-Break does); schedulers announce the end of a job by
# SIGTERM, SIGUSR1, SIGUSR2 or SIGXCPU.
_NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK", "SIGUSR1", "SIGUSR2", "SIGXCPU")
_PR_SET_PDEATHSIG = 1  # an option of prctl, Linux
_SIGNALS = tuple(getattr(signal, name) for name in _NAMES if hasattr(signal, name))  # each system lacks some


class Interrupted(Exception):
    """A rank received a signal before the work was complete; raised on all ranks.

    Attributes:
        signum: The signal.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


def raise_if_signalled(world: World, signals_received: Sequence[int]) -> None:
    """Raise `Interrupted` on all ranks if one of them has received a signal."""
    if signum := max(world.all_gather(lambda: max(signals_received, default=0))):
        raise Interrupted(signum)


@contextmanager
def record_signals(grace: float) -> Iterator[list[int]]:
    """Record SIGINT, SIGTERM, SIGHUP, SIGBREAK, SIGUSR1, SIGUSR2 and SIGXCPU instead of exiting.

    Signals that the process ignores, for instance SIGHUP under nohup, are still ignored. A second SIGINT raises
    `KeyboardInterrupt`. A second SIGTERM does not, because a scheduler sends one to every process and torchrun forwards
    its own.

    Args:
        grace: Seconds from the first signal until the process exits with status 128 + signal if this context is still
            open. A rank may be blocked in a library, in a collective with a rank that is gone.

    Yields:
        The list of received signals, which grows.
    """
    received: list[int] = []

    def record(signum: int, frame: FrameType | None) -> None:
        received.append(signum)
        if received.count(signal.SIGINT) > 1:
            raise KeyboardInterrupt

    recorded = [number for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    previous = {number: signal.signal(number, record) for number in recorded}
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        # torchrun does not forward every signal. If it dies, this process would go on alone and hold the run directory.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM))
    try:
        with _deadline(grace):
            yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def _deadline(grace: float) -> Iterator[None]:
    """Exit some seconds after a signal, unless the context has ended by then.

    Python runs signal handlers between bytecode instructions, so not while the main thread is blocked in a library. A
    thread that reads the wakeup file descriptor, which the C handler writes, receives the signal nevertheless.
    """
    has_ended = threading.Event()
    reading, writing = socket.socketpair()  # Windows accepts only sockets as the wakeup descriptor
    writing.setblocking(False)

    def watch() -> None:
        signum = 0
        while signum not in _SIGNALS:
            signum = reading.recv(1)[0]
            if has_ended.is_set():
                return
        if not has_ended.wait(grace):
            print(
                f"stopped {grace:g} s after signal {signum} without an optimizer step (checkpoint.grace_seconds); "
                "the newest checkpoint is intact",
                file=sys.stderr,
                flush=True,
            )
            os._exit(128 + signum)

    thread = threading.Thread(target=watch, name="deadline", daemon=True)
    thread.start()
    previous = signal.set_wakeup_fd(writing.fileno(), warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(previous)
        has_ended.set()
        writing.send(b"\0")
        thread.join()
        reading.close()
        writing.close()
