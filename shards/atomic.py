"""Atomic replacement of files and directories, and lock files."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock, Timeout

from shards.errors import UserError, as_user_error


def make_directory(path: Path) -> None:
    """Make a directory and its parents; raise `UserError` if the operating system refuses."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise as_user_error(error, path) from None


def check_writable(path: Path) -> None:
    """Raise `UserError` now if a file could not be written at `path` later."""
    if path.is_dir():
        raise UserError(found=f"{path}, a directory", expected="a file to write", hint=f"name a file in it: {path}/...")
    if not path.absolute().parent.is_dir():
        raise UserError(
            found=f"no such directory: {path.parent}",
            expected="a place to write a file",
            hint=f"mkdir -p {path.parent}",
        )
    if not os.access(path.absolute().parent, os.W_OK):
        raise as_user_error(PermissionError(errno.EACCES, "Permission denied"), path)


@contextmanager
def created_directory(path: Path) -> Iterator[None]:
    """Make a directory and its parents; at the end remove again those of them that stayed empty."""
    made = [parent for parent in (path, *path.parents) if not parent.exists()]
    make_directory(path)
    try:
        yield
    finally:
        for parent in made:
            if parent.exists() and not any(parent.iterdir()):
                parent.rmdir()


@contextmanager
def file_lock(path: Path, busy: UserError | None = None) -> Iterator[None]:
    """Hold a lock file, and remove it at the end.

    busy: raised if another process holds it; without one, wait until it is free. A killed holder's lock is free.
    """
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0 if busy else -1)
    except Timeout:
        assert busy is not None
        raise busy from None
    except OSError as error:
        raise as_user_error(error, path) from None
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        lock.release()


def sync_directory(path: Path) -> None:
    """Make renames inside a directory survive a power cut."""
    if os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def replace_file(path: Path) -> Iterator[BinaryIO]:
    """A binary file to write that takes the place of `path` when the block ends well.

    Until then `path` is untouched. The temporary name is fixed, so a killed writer's leftover is
    overwritten by the next one; only one process may write the same `path` at a time.
    """
    temporary = path.with_name(f".{path.name}.partial")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def write_file(path: Path, content: bytes | str) -> None:
    """Replace the content of a file (text is UTF-8) at once."""
    with replace_file(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def staging_directory(target: Path) -> Path:
    """Where a replacement of `target` is prepared: a hidden directory beside it, on the same file system."""
    target = target.absolute()
    return target.parent / f".{target.name}.packing"


class Replacement:
    """A directory in preparation: fill `path`, then `commit()` renames it to the target."""

    def __init__(self, target: Path) -> None:
        self._target = target.absolute()
        self._old = staging_directory(target) / "old"
        self.path = staging_directory(target) / "new"

    def start_clean(self) -> None:
        """Put back what a killed writer had moved aside, and remove what it had half written."""
        self.put_back()
        for stale in (self.path, self._old):
            shutil.rmtree(stale, ignore_errors=True)
        self.path.mkdir()

    def commit(self) -> None:
        """Move what stands at the target aside, then the new directory into its place."""
        sync_directory(self.path)
        if self._target.exists():
            os.replace(self._target, self._old)
        os.replace(self.path, self._target)
        sync_directory(self._target.parent)

    def put_back(self) -> None:
        """Undo half a commit: between its two renames only the moved-aside directory exists."""
        if self._old.exists() and not self._target.exists():
            os.replace(self._old, self._target)


@contextmanager
def replace_directory(target: Path) -> Iterator[Replacement]:
    """Prepare a directory that takes the place of `target` at `commit()`, and not before.

    A lock in the staging directory refuses a second writer of the same target; what a killed writer left
    is cleaned up by the next one. Without a commit the target stays as it was.
    """
    staging = staging_directory(target)
    busy = UserError(
        found=f"another process that is writing {target}",
        expected="one writer at a time",
        hint="wait for it to end, or choose another --out",
    )
    with created_directory(staging.parent):
        try:
            staging.mkdir(exist_ok=True)
        except OSError as error:
            raise as_user_error(error, target) from None
        with file_lock(staging / "lock", busy):
            replacement = Replacement(target)
            try:
                replacement.start_clean()
                yield replacement
            finally:
                replacement.put_back()
                # Still locked: a writer that comes now is refused, instead of losing its files to this removal.
                shutil.rmtree(staging, ignore_errors=True)
