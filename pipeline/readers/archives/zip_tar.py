"""Zip and tar archives, read member by member without unpacking, with limits on members, sizes and names."""

from __future__ import annotations

import io
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Container
from pathlib import Path

from isal import isal_zlib

from pipeline.readers.archives.compression import decompress, is_compressed
from pipeline.readers.archives.file_trees import DirectoryTree, FileTree, check_size, inner_name, is_hidden
from pipeline.readers.archives.files import (
    CorruptFileError,
    StoredFile,
    max_expanded_bytes,
    open_file,
    write_temp_file,
)
from pipeline.readers.naming import natural_order, printable
from shards.errors import as_user_error, first_line
from shards.stores.image_header import MAX_BYTES

_LOCAL_HEADER = struct.Struct("<4s22xHH")  # of a zip member: signature, ..., lengths of name and extra field
_DEFLATE_OVERHEAD = 8  # bytes by which a deflated member may exceed its content
_CHUNK = 1 << 20
_TAR_BLOCK = 512
_MAX_TAR_HEADER = 1 << 20  # bytes of a long name or a PAX header
# Errors of zipfile and tarfile for damaged archives. NotImplementedError: an unknown version or flag; struct.error,
# ValueError: fields out of range.
_ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, OSError, EOFError, NotImplementedError, struct.error, ValueError)
_TAR_ERRORS = (tarfile.TarError, EOFError, ValueError, OverflowError, MemoryError, RecursionError)


class ZipTree(FileTree):
    """A zip archive.

    Raises:
        CorruptFileError: If it is damaged, encrypted, or compressed by another method than deflate.
    """

    def __init__(self, path: Path) -> None:
        self._file = open_file(path)
        members: dict[str, zipfile.ZipInfo] = {}
        try:
            with zipfile.ZipFile(path) as archive:
                infos = archive.infolist()
        except _ZIP_ERRORS as error:
            raise CorruptFileError(first_line(error)) from None
        for info in infos:
            if info.is_dir():
                continue
            name = _checked_name(info.filename, members)
            if is_hidden(name):
                continue
            member = f"its member {printable(name)}"
            if stat.S_ISLNK(info.external_attr >> 16):
                raise CorruptFileError(f"{member} is a link")
            if info.flag_bits & 1:
                raise CorruptFileError(f"{member} is encrypted")
            if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise CorruptFileError(f"{member} is compressed by method {info.compress_type}, not by deflate (8)")
            members[name] = info
        self._members = members
        super().__init__(path, natural_order(members), is_archive=True)

    def read(self, name: str, max_bytes: int = MAX_BYTES) -> bytes:
        """Return the bytes of a member; see `FileTree.read`.

        `zipfile` is not used here: it takes 25 us per member, this takes 3 (stored JPEGs), and forked processes share
        its file position. Packing 60,000 members took 13 to 14 s of CPU time with it and takes 10 s without.
        """
        info = self._members[name]
        check_size(max(info.file_size, info.compress_size - _DEFLATE_OVERHEAD), max_bytes)
        header = self._file.read(info.header_offset, _LOCAL_HEADER.size)
        signature, name_length, extra_length = _LOCAL_HEADER.unpack(header)
        if signature != b"PK\x03\x04":
            raise CorruptFileError("the archive has no member at its offset")
        start = info.header_offset + _LOCAL_HEADER.size + name_length + extra_length
        content = self._file.read(start, info.compress_size)
        if info.compress_type == zipfile.ZIP_DEFLATED:
            try:
                content = isal_zlib.decompressobj(-zlib.MAX_WBITS).decompress(content, info.file_size + 1)
            except isal_zlib.error as error:  # type: ignore[misc]  # isal has no types
                raise CorruptFileError(f"it does not decompress: {first_line(error)}") from None
        if len(content) != info.file_size or isal_zlib.crc32(content) != info.CRC:
            raise CorruptFileError("it differs from its checksum in the archive")
        return content

    def unpack(self, name: str) -> StoredFile:
        """Copy a member, which may be larger than the memory, to a temporary file, and check it."""
        info = self._members[name]
        limit = min(info.file_size, max_expanded_bytes(info.compress_size))
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open(info) as content:
                return write_temp_file(iter(lambda: content.read(_CHUNK), b""), self.path_of(name), limit)
        except _ZIP_ERRORS as error:
            raise CorruptFileError(first_line(error)) from None


class TarTree(FileTree):
    """A tar archive, compressed (gzip, bzip2, xz) or not.

    A compressed one can only be read from its beginning, so it is decompressed once, into a temporary file.

    Raises:
        CorruptFileError: If the file is damaged or not a tar archive.
    """

    def __init__(self, path: Path) -> None:
        file = open_file(path)
        if is_compressed(file.read(0, min(6, file.size))):
            file = write_temp_file(decompress(file.file), str(path), max_expanded_bytes(file.size))
        self._file = file
        self._members = _tar_members(file)
        super().__init__(path, natural_order(self._members), is_archive=True)

    def read(self, name: str, max_bytes: int = MAX_BYTES) -> bytes:
        offset, size = self._members[name]
        check_size(size, max_bytes)
        return self._file.read(offset, size)


def open_tree(path: Path) -> FileTree:
    """Open a directory or an archive, whose kind is recognized by its first bytes.

    Raises:
        UserError: If the path does not exist or may not be read.
        CorruptFileError: If the file is damaged or not an archive.
    """
    if path.is_dir():
        return DirectoryTree(path)
    try:
        with open(path, "rb") as file:
            is_zip = file.read(2) == b"PK"
    except OSError as error:
        raise as_user_error(error, path) from None
    return ZipTree(path) if is_zip else TarTree(path)


def _checked_name(raw: str, others: Container[str]) -> str:
    name = inner_name(raw)
    if name is None:
        raise CorruptFileError(f"its member {printable(raw)!r} leads out of it")
    if name in others:
        raise CorruptFileError(f"it has two members {printable(name)}")
    return name


class _HeaderReader(io.FileIO):
    """A tar file from which only headers are read; a header that claims to be huge is refused."""

    def read(self, size: int | None = -1) -> bytes:
        if size is None or not 0 <= size <= _MAX_TAR_HEADER:
            raise tarfile.ReadError(f"a header of {size:,} bytes at byte {self.tell():,}")
        return super().read(size)


def _tar_members(file: StoredFile) -> dict[str, tuple[int, int]]:
    """Offset and size of every regular file in a tar."""
    members: dict[str, tuple[int, int]] = {}
    end = 0
    try:
        headers = _HeaderReader(file.file.fileno(), closefd=False)
        headers.seek(0)
        with tarfile.open(fileobj=headers, mode="r:") as archive:
            while (info := archive.next()) is not None:
                # tarfile keeps all members, a kilobyte each.
                archive.members = []  # type: ignore[attr-defined]  # missing in its type stubs
                # A negative size would lead back to an earlier header, in circles.
                if info.size < 0 or archive.offset <= end:
                    raise CorruptFileError(f"the header at byte {end:,} is damaged")
                end = archive.offset
                if info.isdir():
                    continue
                name = _checked_name(info.name, members)
                if is_hidden(name):
                    continue
                if not info.isreg() or info.issparse():
                    raise CorruptFileError(f"its member {printable(name)} is a link, a device or a sparse file")
                if info.offset_data + info.size > file.size:
                    raise CorruptFileError(f"it is cut short, within {printable(name)}")
                members[name] = (info.offset_data, info.size)
    except _TAR_ERRORS as error:
        raise CorruptFileError(f"not a zip or tar archive, or a damaged one: {first_line(error)}") from None
    # tarfile ends without an error at a header that it cannot parse.
    if end + _TAR_BLOCK > file.size:
        raise CorruptFileError("it is cut short: its end mark is missing")
    if any(file.read(end, _TAR_BLOCK)):
        raise CorruptFileError(f"the header at byte {end:,} is damaged")
    return members
