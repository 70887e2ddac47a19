"""Zip and tar archives whose members are read at random, by any thread or process, without unpacking them."""

from __future__ import annotations

import io
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Container
from pathlib import Path
from typing import NamedTuple

from isal import isal_zlib

from pipeline.readers.archives.compression import decompressed, is_compressed
from pipeline.readers.archives.file_trees import Archive, DirectoryTree, FileTree, inner_name, is_hidden
from pipeline.readers.archives.files import BadFile, StoredFile, most_expanded, open_file, spool
from pipeline.readers.naming import natural_order, printable
from shards.errors import first_line, no_permission
from shards.stores.image_header import MAX_BYTES

_LOCAL_HEADER = struct.Struct("<4s22xHH")  # of a zip member: signature, ..., lengths of name and extra field
_TAR_BLOCK = 512
_MOST_TAR_HEADER = 1 << 20  # bytes of a long name or a PAX header
_CHUNK = 1 << 20
_WRONG_SUM = "it differs from its checksum in the archive"
_DEFLATED_END = 8  # a deflated member may be this much longer than what it holds


class _ZipMember(NamedTuple):
    raw_name: str
    header: int
    stored_size: int
    size: int
    crc: int
    deflated: bool


class ZipTree(Archive):
    """A zip archive. Raises `BadFile` if it is damaged, encrypted, or compressed with anything but deflate."""

    def __init__(self, place: Path) -> None:
        super().__init__(place)
        self._file = open_file(place)
        self._members: dict[str, _ZipMember] = {}
        for info in _zip_directory(place):
            if info.is_dir():
                continue
            name = _checked_name(info.filename, self._members)
            if is_hidden(name):
                continue
            member = printable(name)
            if stat.S_ISLNK(info.external_attr >> 16):
                raise BadFile(f"its member {member} is a link")
            if info.flag_bits & 1:
                raise BadFile(f"its member {member} is encrypted")
            if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise BadFile(f"its member {member} is compressed by method {info.compress_type}, not by deflate (8)")
            deflated = info.compress_type == zipfile.ZIP_DEFLATED
            raw_name = name if name == info.filename else info.filename  # one text in memory where they are equal
            self._members[name] = _ZipMember(
                raw_name, info.header_offset, info.compress_size, info.file_size, info.CRC, deflated
            )
        self.names = natural_order(self._members)

    def read(self, name: str, most: int = MAX_BYTES) -> bytes:
        member = self._members[name]
        if max(member.size, member.stored_size - _DEFLATED_END) > most:
            raise BadFile(f"of {max(member.size, member.stored_size):,} bytes, where at most {most:,} are expected")
        content = self._file.read(self._start(member), member.stored_size)
        if member.deflated:
            try:
                content = isal_zlib.decompressobj(-zlib.MAX_WBITS).decompress(content, member.size + 1)
            except isal_zlib.error as error:
                raise BadFile(f"it does not decompress: {first_line(error)}") from None
        if len(content) != member.size or isal_zlib.crc32(content) != member.crc:
            raise BadFile(_WRONG_SUM)
        return content

    def open(self, name: str) -> tuple[StoredFile, int, int]:
        """A member that may be larger than the memory, checked: a file to read at random, and offset and size in it."""
        member = self._members[name]
        if not member.deflated:
            start = self._start(member)
            if self._file.crc32(start, member.stored_size) != member.crc:
                raise BadFile(_WRONG_SUM)
            return self._file, start, member.stored_size
        try:
            with zipfile.ZipFile(self.place) as archive, archive.open(member.raw_name) as content:
                chunks = iter(lambda: content.read(_CHUNK), b"")
                file = spool(chunks, self.place_of(name), min(member.size, most_expanded(member.stored_size)))
        except (zipfile.BadZipFile, zlib.error, OSError, EOFError) as error:
            raise BadFile(first_line(error)) from None
        return file, 0, file.size

    def _start(self, member: _ZipMember) -> int:
        """Where the bytes of a member begin, after a header of its own."""
        header = self._file.read(member.header, _LOCAL_HEADER.size)
        signature, name_length, extra_length = _LOCAL_HEADER.unpack(header)
        if signature != b"PK\x03\x04":
            raise BadFile("the archive has something else in its place")
        return member.header + _LOCAL_HEADER.size + name_length + extra_length


class TarTree(Archive):
    """A tar archive, compressed (gzip, bzip2, xz) or not. Raises `BadFile` if it is damaged or none.

    A compressed one can only be read from its beginning: it is decompressed once, into a temporary file (`Spool`).
    """

    def __init__(self, place: Path) -> None:
        super().__init__(place)
        self._file = _plain_tar(place)
        self._members = dict(_tar_members(self._file))
        self.names = natural_order(self._members)

    def read(self, name: str, most: int = MAX_BYTES) -> bytes:
        offset, size = self._members[name]
        if size > most:
            raise BadFile(f"of {size:,} bytes, where at most {most:,} are expected")
        return self._file.read(offset, size)


def open_tree(place: Path) -> FileTree:
    """The files below a directory or inside an archive, told by how it begins.

    Raises `UserError` if nothing is there, `BadFile` for a file that is no archive or a damaged one.
    """
    if place.is_dir():
        return DirectoryTree(place)
    try:
        with open(place, "rb") as file:
            head = file.read(2)
    except OSError as error:
        raise no_permission(error, place) from None
    return ZipTree(place) if head == b"PK" else TarTree(place)


def _zip_directory(place: Path) -> list[zipfile.ZipInfo]:
    try:
        with zipfile.ZipFile(place) as archive:
            return archive.infolist()
    # NotImplementedError: a version or a spanned archive; struct.error, ValueError: nonsense in its directory.
    except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError, struct.error, ValueError) as error:
        raise BadFile(first_line(error)) from None


def _checked_name(raw: str, others: Container[str]) -> str:
    name = inner_name(raw)
    if name is None:
        raise BadFile(f"its member {printable(raw)!r} leads out of it")
    if name in others:
        raise BadFile(f"it has two members {printable(name)}")
    return name


def _plain_tar(place: Path) -> StoredFile:
    archive = open_file(place)
    if not is_compressed(archive.read(0, min(6, archive.size))):
        return archive
    with open(place, "rb") as file:
        return spool(decompressed(file), str(place), most_expanded(archive.size))


def _tar_members(file: StoredFile) -> dict[str, tuple[int, int]]:
    """Offset and size of every regular file in a tar."""
    members: dict[str, tuple[int, int]] = {}
    try:
        with tarfile.open(fileobj=_TarHeaders(file), mode="r:") as archive:
            end = 0
            while (info := archive.next()) is not None:
                archive.members = []  # tarfile keeps them all, a kilobyte each
                # A size below zero would lead back to a header that was read before, and round in circles.
                if info.size < 0 or archive.offset <= end:
                    raise BadFile(f"the header at byte {end:,} is damaged")
                end = archive.offset
                if info.isdir():
                    continue
                name = _checked_name(info.name, members)
                if is_hidden(name):
                    continue
                if not info.isreg() or info.issparse():
                    raise BadFile(f"its member {printable(name)} is a link, a device or a sparse file")
                if info.offset_data + info.size > file.size:
                    raise BadFile(f"it is cut short, within {printable(name)}")
                members[name] = (info.offset_data, info.size)
    except (tarfile.TarError, EOFError, ValueError, OverflowError, MemoryError, RecursionError) as error:
        raise BadFile(f"not a zip or tar archive, or a damaged one: {first_line(error)}") from None
    # tarfile takes a header that it does not understand for the end.
    if end + _TAR_BLOCK > file.size:
        raise BadFile("it is cut short: its end mark is missing")
    if any(file.read(end, _TAR_BLOCK)):
        raise BadFile(f"the header at byte {end:,} is damaged")
    return members


class _TarHeaders(io.RawIOBase):
    """A tar as tarfile reads it when it is asked for headers only: what claims to be a huge one is refused."""

    def __init__(self, file: StoredFile) -> None:
        self._file = file
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        assert whence == io.SEEK_SET
        self._position = max(0, offset)
        return self._position

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= _MOST_TAR_HEADER:
            raise tarfile.ReadError(f"a header of {size:,} bytes at byte {self._position:,}")
        content = self._file.read(self._position, max(0, min(size, self._file.size - self._position)))
        self._position += len(content)
        return content
