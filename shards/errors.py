"""Errors that the user can fix. A command prints them without a traceback and exits with status 2."""

from __future__ import annotations

import errno
import os
import re
import shlex
import subprocess
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager

from shards.credentials import redact

_DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_REFUSED = {errno.EACCES, errno.EPERM, errno.EROFS}
_UNUSABLE = {errno.ELOOP, errno.ENAMETOOLONG, errno.EISDIR, errno.ENOTDIR, errno.ENXIO, errno.EIO, errno.ESTALE}
_NO_THREADS = ("can't start new thread", "Resource temporarily unavailable")
_JOINERS = "\u200c\u200d"  # letters of Persian and parts of emoji differ by them
_MAX_LINE = 2000  # characters of a line of a message


def quote(word: object) -> str:
    """Return a path or another word of a command as it is typed in a shell, for hints."""
    text = f"./{word}" if str(word).startswith("-") else str(word)
    if os.name != "nt":
        return shlex.quote(text)
    quoted = subprocess.list2cmdline([text])  # quotes spaces, but no other special characters of cmd.exe and PowerShell
    return quoted if re.fullmatch(r'".*"|[\w@%+=:,./\\-]+', quoted) else f'"{quoted}"'


def printable(text: str) -> str:
    """Return foreign text (a name, a server's answer) with control and format characters escaped.

    A terminal would execute them: they move the cursor, hide or reorder text. Spaces of all scripts stay.
    """
    if text.isprintable():
        return text
    return "".join(
        character
        if character.isprintable() or character in _JOINERS or unicodedata.category(character) == "Zs"
        else ascii(character)[1:-1]
        for character in text
    )


class UserError(Exception):
    """An error that the user can fix.

    Args:
        found: The problem: a noun phrase that names the file, setting or number.
        expected: The valid input, a noun phrase.
        hint: A command or an instruction that fixes the problem.
    """

    def __init__(self, found: str, expected: str, hint: str) -> None:
        found, expected, hint = redact(found), redact(expected), redact(hint)
        super().__init__(found, expected, hint)
        self.found = found
        self.expected = expected
        self.hint = hint

    def __str__(self) -> str:
        message = f"error: {self.found}\nexpected: {self.expected}\nhint: {self.hint}"
        lines = map(printable, message.split("\n"))
        return "\n".join(line if len(line) <= _MAX_LINE else f"{line[:_MAX_LINE]}..." for line in lines)


class NotFoundError(UserError):
    """A file, directory or remote object that does not exist."""


class CorruptError(UserError):
    """A file whose content differs from what was written."""


class MismatchError(UserError):
    """Two inputs that do not fit each other, such as a file and its manifest."""


class AccessDeniedError(UserError):
    """A path or address that this user may not read or write."""


class DiskFullError(UserError):
    """A disk or quota without space for a file."""


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message, or its class name if the message is empty."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def is_thread_limit(error: BaseException) -> bool:
    """Whether the system refused a thread or process, which Python, torch and the kernel say in different ways."""
    return isinstance(error, OSError | RuntimeError) and any(words in str(error) for words in _NO_THREADS)


def refusal(error: BaseException) -> UserError | None:
    """Return the error for a refusal of the machine: a full disk, no permission, an unusable path, no more threads.

    None if the program is at fault.
    """
    if is_thread_limit(error):
        return UserError(
            found=f"no more threads or processes: {first_line(error)}",
            expected="a limit that admits the threads of this command (ulimit -u, or that of the container)",
            hint="raise the limit, or use fewer threads: export OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1",
        )
    if isinstance(error, OSError) and error.errno in _DISK_FULL | _REFUSED | _UNUSABLE:
        return as_user_error(error, error.filename or "(unnamed file)")
    return None


def as_user_error(error: OSError, path: object) -> AccessDeniedError | DiskFullError:
    """Return the error for a file or directory that the operating system refuses to read or write."""
    if error.errno in _DISK_FULL:
        return DiskFullError(
            found=f"{'file too large' if error.errno == errno.EFBIG else 'no space left on device'}: {path}",
            expected="room on the disk for the file, within the quota and the file size limit",
            hint="free disk space (df -h), or choose a directory on another disk",
        )
    return AccessDeniedError(
        found=f"{error.strerror or error}: {path}",
        expected="a path that this user may read and write",
        hint="choose another path, or change its permissions (ls -ld)",
    )


@contextmanager
def os_errors_as_user_errors(path: object) -> Iterator[None]:
    """Raise every `OSError` of the block as a `UserError`. `path` is named if the error itself names no file."""
    try:
        yield
    except OSError as error:
        raise as_user_error(error, error.filename or path) from None


@contextmanager
def errors_as_corrupt(path: object, hint: str) -> Iterator[None]:
    """Raise every exception of the block, which reads a file, as a `UserError`: foreign content fails in many ways."""
    try:
        yield
    except (UserError, BrokenPipeError):
        raise
    except Exception as error:
        if is_thread_limit(error):
            raise
        found = f"no file {path}"
        if not isinstance(error, FileNotFoundError):
            reason = f"key {error.args[0]} is missing" if isinstance(error, KeyError) else first_line(error)
            found = f"{path}, which cannot be read: {reason}"
        raise CorruptError(found=found, expected="an intact file, as it was written", hint=hint) from None


def corrupt_shard(location: object, reason: str) -> CorruptError:
    """Return the error for a packed file with wrong content. The location is a file, or a file and a block."""
    return CorruptError(
        found=f"{location}: {reason}",
        expected="the shard as it was packed",
        hint="list all damaged files: python -m shards.verify DIR; then pack again with --force, or download the "
        "shards again",
    )
