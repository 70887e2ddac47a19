"""Errors that the user can fix. A command prints them without a traceback and exits with status 2."""

from __future__ import annotations

import errno


class UserError(Exception):
    """An error that the user can fix.

    Args:
        found: What was found, and where (a file, a setting, a number).
        expected: What would have been right.
        hint: What to do next; a command to run if there is one.
    """

    def __init__(self, found: str, expected: str, hint: str) -> None:
        super().__init__(found, expected, hint)
        self.found = found
        self.expected = expected
        self.hint = hint

    def __str__(self) -> str:
        return f"error: {self.found}\nexpected: {self.expected}\nhint: {self.hint}"


class NotFoundError(UserError):
    """A file, directory or remote object that does not exist."""


class CorruptError(UserError):
    """A file whose content is not what its writer wrote."""


class MismatchError(UserError):
    """Two things that do not fit each other, such as a file and its manifest."""


class AccessDeniedError(UserError):
    """A place that this user may not read or write."""


class DiskFullError(UserError):
    """A disk or quota without room for what has to be written."""


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, or its class name if the message is empty."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def as_user_error(error: OSError, path: object) -> AccessDeniedError | DiskFullError:
    """The error for a file or directory that the operating system refuses to read or write."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return (DiskFullError if full else AccessDeniedError)(
        found=f"{path}: {error.strerror or error}",
        expected="a place this user may read and write, with room on the disk",
        hint="choose another place, free some room or ask for the permission (ls -ld, df -h)",
    )


def damaged(place: object, reason: str) -> CorruptError:
    """The error for a packed file whose content is not what was packed; place: the file, and the block in it."""
    return CorruptError(
        found=f"{place}: {reason}",
        expected="the shard as it was packed",
        hint="see what else is damaged: python -m shards.verify DIR; then pack again with --force, or fetch "
        "the shards again",
    )
