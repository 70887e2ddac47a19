"""Zip and tar archives, read member by member without unpacking them, within limits on members, sizes and names."""

from __future__ import annotations

import io
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Container
from functools import cached_property
from pathlib import Path

from isal import isal_zlib

from pipeline.readers.archives.compression import decompress, is_compressed
from pipeline.readers.archives.file_trees import DirectoryTree, FileTree, check_size, inner_name, is_hidden
from pipeline.readers.archives.files import (
    CorruptFileError,
    StoredFile,
    max_expanded_bytes,
    open_file,
    record_file,
    write_temp_file,
)
from pipeline.readers.naming import natural_order, printable
from shards.errors import as_user_error, first_line
from shards.manifest import RawFile
from shards.stores.image_header import MAX_BYTES

_LOCAL_HEADER = struct.Struct("<4s22xHH")  # of a zip member: signature, ..., lengths of name and extra field
_DEFLATED_END = 8  # a deflated member may be this much longer than what it holds
_CHUNK = 1 << 20
_TAR_BLOCK = 512
_MAX_TAR_HEADER = 1 << 20  # bytes of a long name or a PAX header
# Errors of zipfile for damaged archives. NotImplementedError: an unknown version or flag; struct.error, ValueError:
# fields out of range.
_ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, OSError, EOFError, NotImplementedError, struct.error, ValueError)
_TAR_ERRORS = (tarfile.TarError, EOFError, ValueError, OverflowError, MemoryError, RecursionError)


class _Archive(FileTree):
    """What zip and tar have in common."""

    _separator = ":"

    def records(self) -> tuple[RawFile, ...]:
        return self._records

    @cached_property
    def _records(self) -> tuple[RawFile, ...]:
        return (record_file(self.place),)


class ZipTree(_Archive):
    """A zip archive.

    Raises:
        CorruptFileError: The archive is damaged, encrypted, or compressed with anything but deflate.
    """

    def __init__(self, place: Path) -> None:
        self._file = open_file(place)
        members: dict[str, zipfile.ZipInfo] = {}
        try:
            with zipfile.ZipFile(place) as archive:
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
        super().__init__(place, natural_order(members))

    def read(self, name: str, max_bytes: int = MAX_BYTES) -> bytes:
        """Read a member; see `FileTree.read`.

        Not by `zipfile`, which takes 25 us a member where this takes 3 (stored JPEGs), and whose position in the file
        forked processes share: packing 60,000 of them took 13 to 14 s of CPU time instead of 10.
        """
        info = self._members[name]
        check_size(max(info.file_size, info.compress_size - _DEFLATED_END), max_bytes)
        header = self._file.read(info.header_offset, _LOCAL_HEADER.size)
        signature, name_length, extra_length = _LOCAL_HEADER.unpack(header)
        if signature != b"PK\x03\x04":
            raise CorruptFileError("the archive has something else in its place")
        start = info.header_offset + _LOCAL_HEADER.size + name_length + extra_length
        content = self._file.read(start, info.compress_size)
        if info.compress_type == zipfile.ZIP_DEFLATED:
            try:
                content = isal_zlib.decompressobj(-zlib.MAX_WBITS).decompress(content, info.file_size + 1)
            except isal_zlib.error as error:
                raise CorruptFileError(f"it does not decompress: {first_line(error)}") from None
        if len(content) != info.file_size or isal_zlib.crc32(content) != info.CRC:
            raise CorruptFileError("it differs from its checksum in the archive")
        return content

    def unpack(self, name: str) -> StoredFile:
        """A member that may be larger than the memory, checked and copied to a temporary file."""
        info = self._members[name]
        limit = min(info.file_size, max_expanded_bytes(info.compress_size))
        try:
            with zipfile.ZipFile(self.place) as archive, archive.open(info) as content:
                return write_temp_file(iter(lambda: content.read(_CHUNK), b""), self.place_of(name), limit)
        except _ZIP_ERRORS as error:
            raise CorruptFileError(first_line(error)) from None


class TarTree(_Archive):
    """A tar archive, compressed (gzip, bzip2, xz) or not.

    A compressed one can only be read from its beginning, so it is decompressed once, into a temporary file.

    Raises:
        CorruptFileError: The file is damaged or not a tar archive.
    """

    def __init__(self, place: Path) -> None:
        file = open_file(place)
        if is_compressed(file.read(0, min(6, file.size))):
            file = write_temp_file(decompress(file.file), str(place), max_expanded_bytes(file.size))
        self._file = file
        self._members = _tar_members(file)
        super().__init__(place, natural_order(self._members))

    def read(self, name: str, max_bytes: int = MAX_BYTES) -> bytes:
        offset, size = self._members[name]
        check_size(size, max_bytes)
        return self._file.read(offset, size)


def open_tree(place: Path) -> FileTree:
    """Open a directory or an archive; the first bytes of a file tell its kind.

    Raises:
        UserError: Nothing is there, or it may not be read.
        CorruptFileError: The file is not an archive, or a damaged one.
    """
    if place.is_dir():
        return DirectoryTree(place)
    try:
        with open(place, "rb") as file:
            is_zip = file.read(2) == b"PK"
    except OSError as error:
        raise as_user_error(error, place) from None
    return ZipTree(place) if is_zip else TarTree(place)


def _checked_name(raw: str, others: Container[str]) -> str:
    name = inner_name(raw)
    if name is None:
        raise CorruptFileError(f"its member {printable(raw)!r} leads out of it")
    if name in others:
        raise CorruptFileError(f"it has two members {printable(name)}")
    return name


class _HeaderReader(io.FileIO):
    """A tar file from which only headers are read: one that claims to be huge is refused."""

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= _MAX_TAR_HEADER:
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
                archive.members = []  # tarfile keeps them all, a kilobyte each
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
    # tarfile takes a header that it does not understand for the end.
    if end + _TAR_BLOCK > file.size:
        raise CorruptFileError("it is cut short: its end mark is missing")
    if any(file.read(end, _TAR_BLOCK)):
        raise CorruptFileError(f"the header at byte {end:,} is damaged")
    return members
