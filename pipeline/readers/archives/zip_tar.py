"""Zip and tar archives, read member by member without unpacking, with limits on members, sizes and names."""

from __future__ import annotations

import stat
import struct
import zipfile
import zlib
from collections.abc import Container
from pathlib import Path

from isal import isal_zlib

from pipeline.readers.archives.compression import decompress, is_compressed
from pipeline.readers.archives.file_trees import DirectoryTree, FileTree, check_size, inner_name, is_hidden
from pipeline.readers.archives.files import CorruptFileError, StoredFile, max_expanded_bytes, open_file, write_temp_file
from pipeline.readers.naming import natural_order
from shards.errors import as_user_error, first_line, printable
from shards.stores.image_header import MAX_BYTES
from shards.stores.tar_members import iterate_members

_LOCAL_HEADER = struct.Struct("<4s22xHH")  # of a zip member: signature, ..., lengths of name and extra field
_DEFLATE_OVERHEAD = 8  # bytes by which a deflated member may exceed its content
_CHUNK = 1 << 20
_UTF8_FLAG = 0x800  # of a zip member
_ZIP_END = 22  # bytes of the record that ends a zip, without its comment
_MAX_ZIP_END = _ZIP_END + 0xFFFF
_ZIP_MARKER = 4  # bytes with which archives that could have been split begin
# Errors of zipfile for damaged archives. NotImplementedError: an unknown version or flag; struct.error,
# ValueError: fields out of range.
_ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, OSError, EOFError, NotImplementedError, struct.error, ValueError)


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
        _check_zip_bounds(self._file, infos)
        for info in infos:
            if info.is_dir():
                continue
            name = _checked_name(_zip_name(info), members)
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
            file.file.seek(0)  # on Windows, the read above has moved the position
            file = write_temp_file(decompress(file.file), str(path), max_expanded_bytes(file.size))
        self._file = file
        self._members = _tar_members(file)
        super().__init__(path, natural_order(self._members), is_archive=True)

    def read(self, name: str, max_bytes: int = MAX_BYTES) -> bytes:
        offset, size = self._members[name]
        check_size(size, max_bytes)
        return self._file.read(offset, size)


def open_tree(path: Path, out: Path | None = None) -> FileTree:
    """Open a directory, without the output in it, or an archive, whose kind is recognized by its first bytes.

    Raises:
        UserError: If the path does not exist or may not be read.
        CorruptFileError: If the file is damaged or not an archive.
    """
    if path.is_dir():
        return DirectoryTree(path, out)
    try:
        with open(path, "rb") as file:
            is_zip = file.read(2) == b"PK"
    except OSError as error:
        raise as_user_error(error, path) from None
    return ZipTree(path) if is_zip else TarTree(path)


def _zip_name(info: zipfile.ZipInfo) -> str:
    """Return the name of a member.

    Some zip files of Linux and macOS have UTF-8 names without the UTF-8 flag; zipfile decodes these as cp437.
    """
    if info.flag_bits & _UTF8_FLAG:
        return info.filename
    try:
        return info.filename.encode("cp437").decode("utf-8")
    except UnicodeError:
        return info.filename


def _checked_name(raw: str, others: Container[str]) -> str:
    name = inner_name(raw)
    if name is None:
        raise CorruptFileError(f"its member {printable(raw)!r} leads out of it")
    if name in others:
        raise CorruptFileError(f"it has two members {printable(name)}")
    return name


def _tar_members(file: StoredFile) -> dict[str, tuple[int, int]]:
    """Offset and size of every regular file in a tar."""
    members: dict[str, tuple[int, int]] = {}
    try:
        # Another position in the file than that of `file.file`, which forked processes share.
        with open(file.file.fileno(), "rb", buffering=0, closefd=False) as content:
            for member in iterate_members(content):
                name = _checked_name(member.name, members)
                if not is_hidden(name):
                    members[name] = (member.offset, member.size)
    except ValueError as error:
        raise CorruptFileError(f"not a zip or tar archive, or a damaged one: {error}") from None
    return members


def _check_zip_bounds(file: StoredFile, infos: list[zipfile.ZipInfo]) -> None:
    """Refuse data before the first member or after the end of the directory, such as a second archive."""
    tail = file.read(max(0, file.size - _MAX_ZIP_END), min(file.size, _MAX_ZIP_END))
    end = tail.rfind(b"PK\5\6")
    behind = len(tail) - end - _ZIP_END - int.from_bytes(tail[end + _ZIP_END - 2 : end + _ZIP_END], "little")
    before = min((info.header_offset for info in infos), default=0)
    if behind or before > _ZIP_MARKER:
        where = f"{behind:,} bytes behind its end" if behind else f"{before:,} bytes before its first member"
        raise CorruptFileError(f"{where}, which belong to no member (two archives in one file?)")
