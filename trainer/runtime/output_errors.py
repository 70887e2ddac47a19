"""Console output that cannot stop a training."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO


class _FailSafeStream:
    """A text stream that discards its output from the first write that fails."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write text, or discard it."""
        self._attempt(self._stream.write, text)
        return len(text)

    def flush(self) -> None:
        """Flush the stream."""
        self._attempt(self._stream.flush)

    def _attempt(self, operation: Any, *arguments: str) -> None:
        try:
            operation(*arguments)
        except (OSError, ValueError):  # a closed terminal or pipe, a full device; a closed stream
            # Everything that writes to the descriptor is redirected: loggers, libraries, the interpreter at its exit.
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def ignore_output_errors() -> Iterator[None]:
    """Discard the output of this process once its terminal, pipe or log file cannot be written."""
    stdout, stderr = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = _FailSafeStream(stdout), _FailSafeStream(stderr)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = stdout, stderr
