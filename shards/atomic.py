"""Bounded reading of files, atomic replacement of files and directories, and lock files."""

from __future__ import annotations

import ctypes
import errno
import functools
import hashlib
import json
import logging
import os
import secrets
import shutil
import signal
import stat
import threading
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from types import FrameType
from typing import Any, BinaryIO, TypeAlias

from filelock import FileLock, Timeout

from shards.errors import MismatchError, NotFoundError, UserError, as_user_error, os_errors_as_user_errors, quote

log = logging.getLogger(__name__)

FileIdentity: TypeAlias = tuple[int, int, int, int]
_NO_SYNC = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK}
_REMOVES_OPEN_FILES = os.name != "nt"
_WAIT_SILENTLY = 10.0  # seconds
_STALE_PAUSE = 0.05  # seconds between attempts to lock a file that another host removes
# For renames: virus scanners and search indices of Windows hold new files open for a while.
_RENAME_SECONDS = 10.0 if os.name == "nt" else 0.0
_CHECKSUM = "sha256"
_MAX_JSON_BYTES = 1 << 28
_WORK = "work-"
_WORKING_DIRECTORY, _RENAME_EXCHANGE = -100, 2  # AT_FDCWD and a flag of renameat2


def read_file(path: Path, max_bytes: int) -> bytes:
    """Read a file that someone else may have prepared: in bounded time and memory.

    Raises:
        FileNotFoundError: There is no such file.
        UserError: It is a directory, device, pipe or socket, has more than `max_bytes`, or cannot be read.
    """
    reason = "not a regular file"
    try:
        status = path.stat()
        if stat.S_ISREG(status.st_mode):
            reason = f"more than {max_bytes:,} bytes"
            if status.st_size <= max_bytes:
                with open(path, "rb") as file:
                    content = file.read(status.st_size + 1)
                if len(content) <= status.st_size:
                    return content
                reason = "it grows"
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path)) from error
    except ValueError as error:  # a zero byte in the path
        reason = str(error)
    except OSError as error:
        raise as_user_error(error, path) from None
    raise UserError(
        found=f"{path}: {reason}",
        expected=f"a file of up to {max_bytes:,} bytes, not a directory, device, pipe or socket",
        hint="name the right file, or copy the content to a file first",
    )


def check_is_file(path: Path, expected: str = "a regular file") -> None:
    """Raise `UserError` for a device, pipe or socket, whose content may have no end. Directories are allowed."""
    if _is_stream(path):
        raise UserError(
            found=f"{path} is not a regular file",
            expected=expected,
            hint=f"name the right file, or copy the content to a file first (ls -l {quote(path)})",
        )


def check_zip(path: Path, max_ratio: int = 1, allowance: int = 0) -> None:
    """Check a zip archive that someone else may have prepared, before a library extracts it.

    Args:
        path: The archive.
        max_ratio: Largest ratio of the size of its members to the size of the file.
        allowance: Bytes of members that do not count.

    Raises:
        OSError: It cannot be read.
        ValueError: It is not a regular file, or its members are larger.
        zipfile.BadZipFile: It is no archive.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("not a regular file")
    with zipfile.ZipFile(path) as archive:
        size = sum(member.file_size for member in archive.infolist())
    if size - allowance > max_ratio * status.st_size:
        raise ValueError(f"{size:,} bytes in an archive of {status.st_size:,}")


def make_directory(path: Path, purpose: Path | None = None) -> None:
    """Make a directory and its parents.

    Args:
        path: The directory.
        purpose: What it is made for (default: itself).

    Raises:
        UserError: The operating system refuses. The error names the purpose.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:  # it names the first of the parents that is missing
        raise as_user_error(error, purpose or path) from None


def check_writable(path: Path) -> None:
    """Raise `UserError` if a file cannot be written at `path`."""
    directory = _real_path(path).parent
    if path.is_dir():
        raise UserError(
            found=f"{path}, a directory", expected="the path of a file", hint=f"name a file: {quote(path / 'NAME')}"
        )
    if not directory.is_dir():
        raise NotFoundError(
            found=f"no such directory: {directory}",
            expected="a file in an existing directory",
            hint=f"mkdir -p {quote(directory)}",
        )
    if not os.access(path if _is_stream(path) else directory, os.W_OK):
        raise as_user_error(PermissionError(errno.EACCES, "Permission denied"), path)


def _is_stream(path: Path) -> bool:
    """Whether a path is that of a device, pipe or socket (/dev/stdout): it cannot be replaced, only written to."""
    return path.exists() and not path.is_file() and not path.is_dir()


def _real_path(path: Path) -> Path:
    """Return where a link leads: not the link is replaced, but what it names."""
    return Path(os.path.realpath(path))


@contextmanager
def created_directory(path: Path, purpose: Path | None = None) -> Iterator[None]:
    """Make a directory and its parents as `make_directory` does; at the end remove those of them that are empty."""
    created = [parent for parent in (path, *path.parents) if not parent.exists()]
    try:
        make_directory(path, purpose)
        yield
    finally:
        for parent in created:
            with suppress(OSError):  # not empty, or gone
                parent.rmdir()


@contextmanager
def file_lock(path: Path, busy: UserError | None = None) -> Iterator[None]:
    """Hold a lock file, and remove it at the end. The lock of a killed process is free.

    Args:
        path: The lock file.
        busy: The error to raise if another process holds the lock; None: wait for it.
    """
    # A soft lock outlives a dead host. The file of a killed process remains: other users have to be able to lock it.
    lock = FileLock(path, fallback_to_soft=False, mode=0o666)
    missing = False
    try:
        with os_errors_as_user_errors(path):
            try:
                _acquire(lock, busy)
            except (NotImplementedError, OSError) as error:
                if isinstance(error, OSError) and error.errno not in NO_LOCKS:
                    raise
                missing = True
                _warn_of_missing_locks(path.parent)
        yield
    finally:
        if lock.is_locked or missing:
            if _REMOVES_OPEN_FILES:
                with suppress(PermissionError):  # another user, whose process was killed, has created it
                    path.unlink(missing_ok=True)
            lock.release()
            if not _REMOVES_OPEN_FILES:
                with suppress(OSError):  # another process has locked it meanwhile
                    path.unlink()


@functools.cache
def _warn_of_missing_locks(directory: Path) -> None:
    log.warning("%s is on a file system without locks: run one process at a time", directory)


def _acquire(lock: FileLock, busy: UserError | None) -> None:
    try:
        _acquire_within(lock, 0)
        return
    except Timeout:
        if busy is not None:
            raise busy from None
    try:
        _acquire_within(lock, _WAIT_SILENTLY)
    except Timeout:
        log.warning("waiting for another process that holds %s", lock.lock_file)
        _acquire_within(lock, -1)


def _acquire_within(lock: FileLock, seconds: float) -> None:
    """Acquire a lock; raise Timeout after some seconds (-1: never).

    On NFS another host may remove the lock file between open and flock here: then the handle is stale, and the next
    attempt creates the file again.
    """
    for left in reversed(range(1 + int(_WAIT_SILENTLY / _STALE_PAUSE))):
        try:
            with _deferred_signals() if seconds == 0 else nullcontext():
                lock.acquire(timeout=seconds)
            return
        except OSError as error:
            if error.errno != errno.ESTALE or not left:
                raise
        time.sleep(_STALE_PAUSE)


@contextmanager
def _deferred_signals() -> Iterator[None]:
    """Call the handlers of SIGINT, SIGTERM and SIGHUP at the end.

    Between the creation of a lock file and the assignment of its descriptor, an exception would leave both behind.
    """
    numbers = {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}
    handlers = {number: handler for number in numbers if callable(handler := signal.getsignal(number))}
    if threading.current_thread() is not threading.main_thread():  # handlers run in the main thread
        handlers = {}
    received: list[tuple[int, FrameType | None]] = []
    try:
        for number in handlers:
            signal.signal(number, lambda *call: received.append(call))
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for number, frame in received:
            handlers[signal.Signals(number)](number, frame)


@contextmanager
def name_in_errors(path: Path) -> Iterator[None]:
    """Name a file in the `OSError` of a failed write or flush, which names none."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise


def sync_directory(path: Path) -> None:
    """Flush the entries of a directory to disk, so that renames survive a power failure.

    A file system that cannot flush directories (VirtualBox shared folders, some of FUSE) is left to itself.
    """
    if os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with name_in_errors(path):
            os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise
    finally:
        os.close(descriptor)


def rename(source: Path, target: Path) -> None:
    """Rename a file or directory, and replace a file at the target. On Windows, wait for programs that hold it open."""
    end = time.monotonic() + _RENAME_SECONDS
    while True:
        try:
            return os.replace(source, target)
        except PermissionError:
            if time.monotonic() >= end:
                raise
        time.sleep(0.1)


@contextmanager
def replace_file(path: Path) -> Iterator[BinaryIO]:
    """Open a binary file that replaces `path` if the block ends without an exception.

    Until then `path` is unchanged. The temporary name is fixed, so the next writer overwrites an incomplete file that
    a killed one has left. Only one process may write the same `path` at a time. A device or pipe is written to.
    """
    if _is_stream(path):
        with open(path, "wb") as file:
            yield file
        return
    path = _real_path(path)
    temporary = path.with_name(f".{path.name}.partial")
    try:
        temporary.unlink(missing_ok=True)  # it may be a pipe or a link
        with name_in_errors(path), open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        rename(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def write_file(path: Path, content: bytes | str) -> None:
    """Replace the content of a file atomically. Text is encoded as UTF-8."""
    with replace_file(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def append_line(path: Path, line: str) -> None:
    """Append a line of text and flush it to disk. After a failure the file is as it was.

    An incomplete last line, which a killed process has left, is removed first.
    """
    with name_in_errors(path), open(path, "a+b", buffering=0) as file:
        size, content = file.tell(), memoryview(f"{line}\n".encode())
        file.seek(max(0, size - 1))
        if file.read(1) not in (b"", b"\n"):
            file.seek(0)
            size = file.read().rfind(b"\n") + 1
            file.truncate(size)
        try:
            while content:
                content = content[file.write(content) :]
            os.fsync(file.fileno())
        except OSError:
            file.truncate(size)
            raise


def with_checksum(fields: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a JSON object with a field `sha256`: the checksum of the others, as they are when parsed."""
    content = json.dumps(fields, sort_keys=True).encode()
    return {**fields, _CHECKSUM: hashlib.sha256(content).hexdigest()}


def without_checksum(fields: dict[str, Any], required: bool = True) -> dict[str, Any]:
    """Return the fields of a JSON object without its checksum; raise ValueError if it does not fit."""
    content = {name: value for name, value in fields.items() if name != _CHECKSUM}
    if (required or _CHECKSUM in fields) and with_checksum(content)[_CHECKSUM] != fields.get(_CHECKSUM):
        raise ValueError("its content does not fit its checksum")
    return content


def write_json(path: Path, fields: dict[str, Any]) -> None:
    """Replace a file by a JSON object with a checksum; see `read_json`."""
    write_file(path, json.dumps(with_checksum(fields)))


def read_json(path: Path) -> dict[str, Any]:
    """Return the fields of a file that `write_json` has written, empty if it is missing or damaged."""
    try:
        return without_checksum(json.loads(read_file(path, _MAX_JSON_BYTES)))
    except (OSError, UserError, ValueError, AttributeError, RecursionError):
        return {}


def file_identity(status: os.stat_result) -> FileIdentity:
    """Return what distinguishes a file from one that replaces it, and from itself before a change."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def replaced_error(path: object) -> MismatchError:
    """Return the error for a file that is not the one that was opened."""
    return MismatchError(
        found=f"{path}, which was replaced, changed or removed while it was read",
        expected="files that stay as they are while a process reads them",
        hint="run the command again; write other versions of a data set in use to another directory",
    )


@contextmanager
def detect_replacement(*paths: Path) -> Iterator[None]:
    """Raise `MismatchError` if a file is replaced during the block, whatever error that may cause there."""
    before = list(map(_identity_at, paths))
    failure = None
    try:
        yield
    except (UserError, OSError) as error:
        failure = error
    for path, old in zip(paths, before, strict=True):
        if _identity_at(path) != old:
            raise replaced_error(path) from None
    if failure is not None:
        raise failure


def _identity_at(path: Path) -> FileIdentity | None:
    try:
        return file_identity(path.stat())
    except OSError:
        return None


def staging_directory(target: Path) -> Path:
    """Return the hidden directory beside `target`, on the same file system, in which its replacement is prepared."""
    target = _real_path(target)
    return target.parent / f".{target.name}.packing"


class Replacement:
    """A directory in preparation: the caller fills `path`, then `commit()` renames it to the target.

    Attributes:
        path: The directory.
        journal: A directory in which the caller records what is complete in `path`, so that a later call can continue.
        keep: Whether `path` and `journal` remain if there is no `commit()`.
    """

    def __init__(self, target: Path) -> None:
        self._target = _real_path(target)
        self._staging = staging_directory(target)
        self._old = self._staging / "old"
        # Each call has paths of its own: processes that outlive a killed call cannot use them.
        self._work = self._staging / f"{_WORK}{secrets.token_hex(4)}"
        self.path, self.journal = self._work / "new", self._work / "journal"
        self.keep = False
        self._before: FileIdentity | None = None

    def start(self, resume: bool) -> None:
        """Restore the target if a killed writer has moved it aside. Keep or remove what it has prepared."""
        self.roll_back()
        self._before = _identity_at(self._target)
        shutil.rmtree(self._old, ignore_errors=True)
        left = [*self._staging.glob(f"{_WORK}*")]
        if resume and len(left) == 1 and (left[0] / self.journal.name).is_dir():
            rename(left[0], self._work)
            return
        for stale in left:
            shutil.rmtree(stale, ignore_errors=True)
        self._work.mkdir()
        self.clear()

    def clear(self) -> None:
        """Make both directories empty. The journal is removed first: it must not describe files that are gone."""
        for path in (self.journal, self.path):
            shutil.rmtree(path, ignore_errors=True)
        for path in (self.path, self.journal):
            path.mkdir()

    def commit(self) -> None:
        """Exchange the new directory and the target; where that is impossible, move the target aside before.

        Raises:
            UserError: If another process has created or changed the target since `start`, or the system refuses to
                rename. The error names the place of the new directory, beside the target or in the staging directory.
        """
        sync_directory(self.path)
        shutil.rmtree(self.journal, ignore_errors=True)  # before `path` may become the old directory
        try:
            if _identity_at(self._target) != self._before:
                raise FileExistsError(errno.EEXIST, "created or changed by another process meanwhile")
            if not (self._target.exists() and _exchange(self.path, self._target)):
                if self._target.exists():
                    rename(self._target, self._old)
                rename(self.path, self._target)
        except OSError as error:
            kept = self._target.with_name(f"{self._target.name}-{secrets.token_hex(4)}")
            advice = "use the complete result where it is now, or move it to a free path"
            try:
                rename(self.path, kept)
            except OSError:
                kept, self.keep = self.path, True
                advice = "move the complete result to a free path before the next call, which removes it"
            raise UserError(
                found=f"{self._target}: {error.strerror}",
                expected="a directory that can be replaced, and that no other process writes",
                hint=f"{advice}: {quote(kept)}",
            ) from None
        sync_directory(self._target.parent)

    def roll_back(self) -> None:
        """Undo an incomplete commit: between two renames only the old directory exists."""
        if self._old.exists() and not self._target.exists():
            rename(self._old, self._target)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two paths, so that each exists at any time; returns False if the system or file system cannot."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None) if os.name == "posix" else None  # Linux
    if rename is None:
        return False
    return rename(_WORKING_DIRECTORY, os.fsencode(one), _WORKING_DIRECTORY, os.fsencode(other), _RENAME_EXCHANGE) == 0


@contextmanager
def replace_directory(target: Path, resume: bool = False) -> Iterator[Replacement]:
    """Prepare a directory that replaces `target` at `commit()`. Without a commit the target is unchanged.

    A lock in the staging directory excludes a second writer of the same target.

    Args:
        target: The directory.
        resume: Whether the caller continues with what a killed writer has left; otherwise it is removed.

    Raises:
        UserError: If the target cannot be renamed, or another process writes it.
    """
    staging, real = staging_directory(target), _real_path(target)
    if (is_mount := os.path.ismount(real)) or Path.cwd().is_relative_to(real):
        raise UserError(
            found=f"{target}, {'a mount point' if is_mount else 'which holds the working directory'}",
            expected="a directory that can be renamed",
            hint=f"name a directory in it: {quote(target / 'NAME')}",
        )
    busy = UserError(
        found=f"another process that is writing {target}",
        expected="one writer at a time",
        hint="wait for it to end, or choose another directory",
    )
    replacement = Replacement(target)
    with created_directory(staging, target), file_lock(staging / "lock", busy):
        try:
            replacement.start(resume)
            with name_in_errors(target):
                yield replacement
        finally:
            replacement.roll_back()
            # Before the lock is released: a writer that started earlier would lose its files to this removal.
            if not replacement.keep:
                shutil.rmtree(staging, ignore_errors=True)
