"""Files that any thread or process may read at any offset, temporary files, and the error for corrupt content."""

from __future__ import annotations

import hashlib
import mmap
import os
import shutil
import tempfile
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import IO

from shards.errors import UserError, as_user_error
from shards.manifest import RawFile

_FLOOR = 256 << 20  # bytes that anything may expand to
_RATIO = 100  # and beyond them, times its size: pixels and tars of small files expand two to ten times
_RESERVE = 256 << 20  # bytes of the disk that are left free
_CHECK_EVERY = 64 << 20  # bytes written between two checks of the free space


class CorruptFileError(Exception):
    """A file, or a member of an archive, that is damaged or not what it should be; the text says what is wrong."""


def max_expanded_bytes(compressed: int) -> int:
    """The most bytes that so many compressed bytes may expand to before they count as a bomb."""
    return _FLOOR + _RATIO * compressed


class StoredFile:
    """An open file, read at any offset; forked processes and threads may share it."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.size = os.fstat(file.fileno()).st_size
        self._lock = threading.Lock()

    def read(self, offset: int, size: int) -> bytes:
        """Read exactly these bytes; raises `CorruptFileError` where the file has fewer."""
        if offset < 0 or size < 0 or offset + size > self.size:
            raise CorruptFileError(f"it ends at {self.size:,}, before byte {offset + size:,}")
        if hasattr(os, "pread"):
            content = os.pread(self.file.fileno(), size, offset)
        else:
            with self._lock:
                self.file.seek(offset)
                content = self.file.read(size)
        if len(content) != size:
            raise CorruptFileError(f"only {len(content):,} of {size:,} bytes could be read; it was changed meanwhile")
        return content

    def mapped(self, offset: int, size: int) -> memoryview:
        """Map these bytes into memory; the file must not shrink meanwhile."""
        start = offset - offset % mmap.ALLOCATIONGRANULARITY
        mapping = mmap.mmap(self.file.fileno(), offset + size - start, access=mmap.ACCESS_READ, offset=start)
        return memoryview(mapping)[offset - start :]


def open_file(path: Path) -> StoredFile:
    """Open a file; raises `UserError` if that fails."""
    try:
        return StoredFile(open(path, "rb"))
    except OSError as error:
        raise as_user_error(error, path) from None


def record_file(path: Path) -> RawFile:
    """A file's name, size and SHA-256."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return RawFile(name=path.name, bytes=file.tell(), sha256=digest)


class TempFile:
    """A temporary file without a name, written once and then read at random.

    It lies in the directory for temporary files (TMPDIR) and is gone when the process ends, however it ends.

    Args:
        what: What is written, for messages.
        max_bytes: The most bytes it may have; `write` raises `CorruptFileError` beyond.

    Raises:
        UserError: The disk is nearly full (also raised by `write` and `finish`).
    """

    def __init__(self, what: str, max_bytes: int) -> None:
        self._what = what
        self._max_bytes = max_bytes
        self._file = tempfile.TemporaryFile(prefix="inkstream-")
        self._checked = 0
        self._check_disk()
        self.size = 0

    def write(self, content: bytes) -> None:
        if self.size + len(content) > self._max_bytes:
            raise CorruptFileError(f"it expands to more than {self._max_bytes:,} bytes, which no such file does")
        if self.size + len(content) - self._checked > _CHECK_EVERY:
            self._check_disk()
            self._checked = self.size
        try:
            self._file.write(content)
        except OSError:
            raise self._disk_full() from None
        self.size += len(content)

    def finish(self) -> StoredFile:
        """The file, to be read."""
        try:
            self._file.flush()
        except OSError:
            raise self._disk_full() from None
        return StoredFile(self._file)

    def _check_disk(self) -> None:
        if shutil.disk_usage(tempfile.gettempdir()).free < _RESERVE + _CHECK_EVERY:
            raise self._disk_full()

    def _disk_full(self) -> UserError:
        directory = tempfile.gettempdir()
        free = shutil.disk_usage(directory).free
        return UserError(
            found=f"no room to unpack {self._what}: {free / 1e6:,.0f} MB free in {directory}",
            expected="room for its content, which is read from there while it is packed",
            hint="name a directory with more room: TMPDIR=/large/disk python -m pipeline.shard ...",
        )


def write_temp_file(chunks: Iterable[bytes], what: str, max_bytes: int) -> StoredFile:
    """Write chunks into a temporary file; see `TempFile`."""
    file = TempFile(what, max_bytes)
    for chunk in chunks:
        file.write(chunk)
    return file.finish()
