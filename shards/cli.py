"""Run a command: exit status, error messages, SIGTERM as an exception."""

from __future__ import annotations

import argparse
import errno
import io
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from shards.credentials import hide, redact
from shards.errors import UserError, refusal

USER_ERROR_STATUS = 2
_BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


class Terminated(BaseException):
    """A signal as an exception, so that `finally` clauses remove incomplete files."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


def _raise_terminated(signum: int, frame: FrameType | None) -> NoReturn:
    raise Terminated(signum)


def exit_on_interrupt() -> None:
    """Let Ctrl-C end a command of ours while it still imports its libraries, which takes seconds, without a traceback.

    Does nothing in a program of others.
    """
    program = next(iter(sys.argv), "")
    try:
        is_ours = program == "-m" or Path(program).absolute().parent == _BENCHMARKS
    except FileNotFoundError:  # no working directory: `run_command` reports it
        return
    if is_ours and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _exit)


def _exit(signum: int, frame: FrameType | None) -> NoReturn:
    os.write(2, b"stopped\n")
    os._exit(128 + signum)


def _redacted_record(*arguments: Any, **named: Any) -> logging.LogRecord:
    record = logging.LogRecord(*arguments, **named)
    record.msg, record.args = redact(record.getMessage()), None
    if record.exc_info and record.exc_info[0]:
        record.exc_text = redact("".join(traceback.format_exception(*record.exc_info))).rstrip()
    return record


def hide_credentials() -> None:
    """Hide the credentials of the command line, and those in everything that is logged or printed to stderr.

    Warnings and tracebacks of libraries and threads are printed to stderr.
    """
    sys.argv = [hide(argument) for argument in sys.argv]
    logging.setLogRecordFactory(_redacted_record)
    if isinstance(sys.stderr, io.TextIOWrapper):
        write = sys.stderr.write
        sys.stderr.write = lambda text: write(redact(text))  # type: ignore[method-assign]  # only the output is replaced


def command_parser(module: str, description: str | None, **options: Any) -> argparse.ArgumentParser:
    """Return the parser of a command, whose help names it as it was started: `inkstream COMMAND` or `python -m MODULE`.

    Args:
        module: The module of the command.
        description: Text whose first line describes the command in its help, in general the docstring of the module.
            `python -OO` removes docstrings; None is no description.
        options: Further arguments of `ArgumentParser`.
    """
    program = sys.argv[0] if sys.argv[0].startswith("inkstream ") else f"python -m {module}"
    first_line = description.partition("\n")[0] if description else None
    return argparse.ArgumentParser(prog=program, description=first_line, **options)


def plural(count: int, noun: str, ending: str = "s") -> str:
    """Return a count with its noun, for instance `1 shard` or `2,000 shards`."""
    return f"{count:,} {noun}{'' if count == 1 else ending}"


def _check_working_directory() -> None:
    try:
        os.getcwd()
    except OSError as error:
        raise UserError(
            found=f"the working directory: {error.strerror}",
            expected="a directory that has not been removed or replaced",
            hint="change to one: cd DIR",
        ) from None


def _is_closed_pipe(error: Exception) -> bool:
    """Whether the program that reads our output (head, less) has ended. Windows may call that an invalid argument."""
    if os.name == "nt" and isinstance(error, OSError) and error.errno == errno.EINVAL:
        try:
            sys.stdout.flush()  # fails again, because the text is still there
        except OSError:
            return True
    return isinstance(error, BrokenPipeError)


def _open_missing_streams() -> None:
    """Open the null device for standard streams that are closed: `>&-` in a shell, a service without a console.

    Python has None for them, and the next file that is opened would get their descriptor.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            descriptor = os.open(os.devnull, os.O_RDWR)  # the lowest free one: that of the stream
            os.set_inheritable(descriptor, True)
            setattr(sys, name, os.fdopen(descriptor, mode, encoding="utf-8"))


def run_command(main: Callable[[], int | None]) -> NoReturn:
    """Run the main function of a command and exit.

    The exit status is the function's result (None: 0), 2 for a `UserError`, or 128 + the number of a signal.
    """
    _open_missing_streams()
    hide_credentials()
    if signal.getsignal(signal.SIGINT) is _exit:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, _raise_terminated)
    logging.addLevelName(logging.WARNING, "warning")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a class name that the terminal's encoding lacks
    try:
        _check_working_directory()
        status = main() or 0
    except UserError as error:
        print(error, file=sys.stderr)
        status = USER_ERROR_STATUS
    except (KeyboardInterrupt, Terminated) as error:
        print("stopped", file=sys.stderr)
        status = 128 + (error.signum if isinstance(error, Terminated) else signal.SIGINT)
    except (OSError, RuntimeError) as error:
        if _is_closed_pipe(error):
            # Without this the interpreter reports it at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            status = 128 + getattr(signal, "SIGPIPE", 13)  # Windows lacks it
        elif (message := refusal(error)) is not None:
            print(message, file=sys.stderr)
            status = USER_ERROR_STATUS
        else:
            raise
    sys.exit(status)
