"""Files that any thread or process can read at any offset, temporary files, and the error for corrupt content."""

from __future__ import annotations

import mmap
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from shards.atomic import check_is_file
from shards.errors import UserError, as_user_error
from shards.stores.split_files import OpenFile, report_bus_errors

_MIN_EXPANDED_BYTES = 256 << 20
_MAX_RATIO = 100  # pixels and tars of small files expand two to ten times
_RESERVE = 256 << 20  # bytes of the disk that stay free
_CHECK_EVERY = 64 << 20  # bytes written between two checks of the free space


class CorruptFileError(Exception):
    """A file, or a member of an archive, that is damaged or of another format. The message is the reason."""


@contextmanager
def corrupt_as_user_error(path: object, expected: str, hint: str) -> Iterator[None]:
    """Raise each `CorruptFileError` of the block as a `UserError` that names the file."""
    try:
        yield
    except CorruptFileError as error:
        raise UserError(found=f"{path}: {error}", expected=expected, hint=hint) from None


def max_expanded_bytes(compressed: int) -> int:
    """Return the limit in bytes for the content of a compressed file; beyond it the file counts as a bomb."""
    return _MIN_EXPANDED_BYTES + _MAX_RATIO * compressed


class StoredFile:
    """An open file that forked processes and threads share.

    Attributes:
        file: The file object.
        size: The size of the file in bytes.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.size = os.fstat(file.fileno()).st_size
        self._open = OpenFile(os.dup(file.fileno()))

    def read(self, offset: int, size: int) -> bytes:
        """Return exactly `size` bytes from `offset` on.

        Raises:
            CorruptFileError: If the file has fewer bytes.
        """
        if offset < 0 or size < 0 or offset + size > self.size:
            raise CorruptFileError(f"it ends at {self.size:,}, before byte {offset + size:,}")
        content = self._open.read(offset, size)
        if len(content) != size:
            raise CorruptFileError(f"only {len(content):,} of {size:,} bytes could be read; it was changed meanwhile")
        return content

    def read_into(self, offset: int, buffer: NDArray[np.uint8]) -> None:
        """Fill a buffer with bytes from `offset` on; raises `CorruptFileError` if the file has fewer."""
        if self._open.read_into(offset, buffer) != buffer.nbytes:
            buffer[...] = np.frombuffer(self.read(offset, buffer.nbytes), np.uint8)  # its error: too short

    def mapped(self) -> mmap.mmap:
        """Map the file into memory. If it shrinks, an access beyond its end ends the process with a message."""
        report_bus_errors(str(self.file.name), self.size)
        if hasattr(mmap, "MAP_PRIVATE"):  # not on Windows
            return mmap.mmap(self.file.fileno(), self.size, mmap.MAP_PRIVATE, mmap.PROT_READ)
        return mmap.mmap(self.file.fileno(), self.size, access=mmap.ACCESS_READ)


def open_file(path: Path) -> StoredFile:
    """Open a file; raises `UserError` if that fails."""
    check_is_file(path)
    try:
        return StoredFile(open(path, "rb"))
    except OSError as error:
        raise as_user_error(error, path) from None


class TempFile:
    """A temporary file without a name, first written, then read at any offset.

    It is created in the directory for temporary files (TMPDIR) and disappears when the process ends.

    Args:
        what: The content, for messages.
        max_bytes: The limit of its size; `write` raises `CorruptFileError` beyond it.

    Raises:
        UserError: If the disk is nearly full (also raised by `write` and `finish`).
    """

    def __init__(self, what: str, max_bytes: int) -> None:
        self._what = what
        self._max_bytes = max_bytes
        self._file = tempfile.TemporaryFile(prefix="inkstream-")  # noqa: SIM115  `finish` hands it over
        self._checked = 0
        self._check_disk()
        self.size = 0

    def write(self, content: bytes) -> None:
        """Append bytes."""
        if self.size + len(content) > self._max_bytes:
            raise CorruptFileError(f"it expands to more than {self._max_bytes:,} bytes, the limit for its size")
        if self.size + len(content) - self._checked > _CHECK_EVERY:
            self._check_disk()
            self._checked = self.size
        try:
            self._file.write(content)
        except OSError:
            raise self._disk_full() from None
        self.size += len(content)

    def finish(self) -> StoredFile:
        """Return the complete file for reading."""
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
            expected="room for its content, which is read from there during packing",
            hint="use a directory with more room: TMPDIR=/large/disk python -m pipeline.shard ...",
        )


def write_temp_file(chunks: Iterable[bytes], what: str, max_bytes: int) -> StoredFile:
    """Write chunks into a temporary file; see `TempFile`."""
    file = TempFile(what, max_bytes)
    for chunk in chunks:
        file.write(chunk)
    return file.finish()
