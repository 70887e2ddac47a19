"""Bytes of raw files that any thread or process may read at any place, and files that are not what they should be."""

from __future__ import annotations

import hashlib
import mmap
import os
import shutil
import tempfile
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

from isal import isal_zlib

from shards.errors import UserError, no_permission
from shards.manifest import RawFile

_CHUNK = 1 << 20
_FLOOR = 256 << 20  # bytes that anything may expand to
_RATIO = 100  # and beyond them, times its size: pixels and tars of small files expand two to ten times
_RESERVE = 256 << 20  # bytes of the disk that are left free
_LOOK_EVERY = 64 << 20  # bytes between two looks at the free space


class BadFile(Exception):
    """A file, or a member of an archive, that is damaged or not what it should be; the text says what is wrong."""


def most_expanded(compressed: int) -> int:
    """How many bytes something of this many compressed bytes may expand to, before it counts as a bomb."""
    return _FLOOR + _RATIO * compressed


class StoredFile:
    """An open file, read at any offset; forked processes and threads may share it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._lock = threading.Lock()
        self.size = os.fstat(file.fileno()).st_size

    def read(self, offset: int, size: int) -> bytes:
        """Exactly these bytes; raises `BadFile` where the file has fewer."""
        if offset < 0 or size < 0 or offset + size > self.size:
            raise BadFile(f"it ends at {self.size:,}, before byte {offset + size:,}")
        if hasattr(os, "pread"):
            content = os.pread(self._file.fileno(), size, offset)
        else:
            with self._lock:
                self._file.seek(offset)
                content = self._file.read(size)
        if len(content) != size:
            raise BadFile(f"only {len(content):,} of {size:,} bytes could be read; it was changed meanwhile")
        return content

    def crc32(self, offset: int, size: int) -> int:
        """The CRC-32 of these bytes; raises `BadFile` where the file has fewer."""
        checksum = 0
        for start in range(offset, offset + size, _CHUNK):
            checksum = isal_zlib.crc32(self.read(start, min(_CHUNK, offset + size - start)), checksum)
        return checksum

    def mapped(self, offset: int, size: int) -> memoryview:
        """These bytes as memory, read where it is looked at; the file must not shrink meanwhile."""
        start = offset - offset % mmap.ALLOCATIONGRANULARITY
        mapping = mmap.mmap(self._file.fileno(), offset + size - start, access=mmap.ACCESS_READ, offset=start)
        return memoryview(mapping)[offset - start :]


def open_file(path: Path) -> StoredFile:
    """Raises `UserError` if it cannot be opened."""
    try:
        return StoredFile(open(path, "rb"))
    except OSError as error:
        raise no_permission(error, path) from None


def record_file(path: Path) -> RawFile:
    """A file's name, size and hash."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return RawFile(name=path.name, bytes=file.tell(), sha256=digest)


class Spool:
    """A temporary file without a name, for what can only be read from front to back: written once, read at random.

    It lies in the directory for temporary files (TMPDIR) and is gone when the process ends, however it ends.
    what: what is written, for messages. most: bytes it may have; `BadFile` beyond. Raises `UserError` when the disk
    is nearly full.
    """

    def __init__(self, what: str, most: int) -> None:
        self._what = what
        self._most = most
        self._file = tempfile.TemporaryFile(prefix="inkstream-")
        self._looked = 0
        self._look()
        self.size = 0

    def write(self, content: bytes) -> None:
        if self.size + len(content) > self._most:
            raise BadFile(f"it expands to more than {self._most:,} bytes, which no such file does")
        if self.size + len(content) - self._looked > _LOOK_EVERY:
            self._look()
            self._looked = self.size
        try:
            self._file.write(content)
        except OSError:
            raise self._no_room() from None
        self.size += len(content)

    def finish(self) -> StoredFile:
        """What was written, to be read."""
        try:
            self._file.flush()
        except OSError:
            raise self._no_room() from None
        return StoredFile(self._file)

    def _look(self) -> None:
        if shutil.disk_usage(tempfile.gettempdir()).free < _RESERVE + _LOOK_EVERY:
            raise self._no_room()

    def _no_room(self) -> UserError:
        directory = tempfile.gettempdir()
        free = shutil.disk_usage(directory).free
        return UserError(
            found=f"no room to unpack {self._what}: {free / 1e6:,.0f} MB free in {directory}",
            expected="room for its content, which is read from there while it is packed",
            hint="name a directory with more room: TMPDIR=/large/disk python -m pipeline.shard ...",
        )


def spool(chunks: Iterable[bytes], what: str, most: int) -> StoredFile:
    """Write chunks into a temporary file; see `Spool`."""
    target = Spool(what, most)
    for chunk in chunks:
        target.write(chunk)
    return target.finish()
