"""Run a command: exit statuses, messages of `UserError`, SIGTERM as an exception."""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

from shards.errors import UserError, as_user_error

USER_ERROR_STATUS = 2

# Errors of the machine, not of the program: a full disk, a read-only file system, missing permissions.
_MACHINE_REFUSALS = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class Terminated(BaseException):
    """SIGTERM, raised as an exception so that `finally` clauses leave nothing half-written."""


def _raise_terminated(signum: int, frame: FrameType | None) -> NoReturn:
    raise Terminated


def program_name(module: str) -> str:
    """Return the name of a command for its help: `inkstream COMMAND` if it was started so, else `python -m MODULE`."""
    return sys.argv[0] if sys.argv[0].startswith("inkstream ") else f"python -m {module}"


def run_command(main: Callable[[], int | None]) -> NoReturn:
    """Run a command's main function and exit: 0 or its result, 2 for a `UserError`, 128 + signal number if stopped."""
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _raise_terminated)
    try:
        status = main() or 0
    except UserError as error:
        print(error, file=sys.stderr)
        status = USER_ERROR_STATUS
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        status = 128 + signal.SIGINT
    except Terminated:
        print("stopped", file=sys.stderr)
        status = 128 + signal.SIGTERM
    except BrokenPipeError:
        # The reader of our output (head, less) went away; keep the interpreter from complaining about it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 128 + signal.SIGPIPE
    except OSError as error:
        if error.errno not in _MACHINE_REFUSALS:
            raise
        print(as_user_error(error, error.filename or "the disk"), file=sys.stderr)
        status = USER_ERROR_STATUS
    sys.exit(status)
