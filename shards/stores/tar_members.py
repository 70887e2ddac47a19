"""Iterate over the members of an untrusted tar file.

POSIX (ustar, PAX) and GNU files are supported: https://pubs.opengroup.org/onlinepubs/9699919799/utilities/pax.html
"""

from __future__ import annotations

import os
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from shards.errors import CorruptError
from shards.stores.base import read_at

BLOCK = 512
_MAX_EXTENDED_HEADER = 64 << 10  # bytes of a name, and of the PAX records of one member
_FILES = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
_EXTENDED = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
_TYPES = {
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a device",
    b"4": "a device",
    b"6": "a pipe",
    b"S": "a sparse file",
}
_CHUNK = 1 << 20
_NO_TAR = "it is no uncompressed tar file"
_PAX_RECORD = re.compile(rb"(\d{1,6}) ([^=]+)=")
_SIZE = re.compile(rb"[\x80].{11}|[ 0-7]{0,12}[ \0]*", re.DOTALL)  # octal, or base 256 as GNU writes large sizes


class Member(NamedTuple):
    """A regular file in a tar file: its name, and the byte offset and size of its content."""

    name: str
    offset: int
    size: int


def read_members(path: Path) -> Iterator[Member]:
    """Iterate over the regular files of a tar file in order; see `iterate_members`.

    Raises:
        CorruptError: For links, devices, compressed, damaged and truncated files. Names the byte of the header.
    """
    try:
        with open(path, "rb", buffering=0) as file:
            yield from iterate_members(file)
    except ValueError as error:
        raise CorruptError(
            found=f"{path}: {error}",
            expected="a complete, uncompressed tar file of regular files",
            hint="download or write it again; tar tf lists its readable members",
        ) from None


def iterate_members(file: BinaryIO) -> Iterator[Member]:
    """Iterate over the regular files of a tar file in order; directories are skipped.

    Tar files may follow one another in the file: after the zeros that end one of them, the next non-zero block must be
    a header.

    Raises:
        ValueError: For links, devices, compressed, damaged and truncated files. Names the byte of the header.
    """
    start = offset = 0
    extended: dict[str, str] = {}
    length = file.seek(0, os.SEEK_END)
    try:
        while True:
            header = _read_header(file, offset)
            if header is None:
                if extended:
                    raise ValueError("the file ends after an extended header")
                start = offset = _skip_zeros(file, offset)
                if offset >= length:
                    return
                continue
            offset += BLOCK
            name = extended.get("path") or header.name
            size = header.size if header.type in _EXTENDED else _size(extended, header)
            if offset + size > length:
                raise ValueError(f"{name!r} claims {size:,} bytes, {length - offset:,} are left")
            if header.type in _EXTENDED:
                extended |= _read_extended_header(file, offset, header)
                offset = round_up(offset + size)
                continue
            if header.type in _FILES and not name.endswith("/"):
                yield Member(name, offset, size)
            elif header.type not in (*_FILES, tarfile.DIRTYPE):
                raise ValueError(f"{name!r} is {_TYPES.get(header.type, f'of type {header.type!r}')}")
            start = offset = round_up(offset + size)
            extended = {}
    except ValueError as error:
        raise ValueError(f"{error} (header at byte {start:,})") from None


def _skip_zeros(file: BinaryIO, offset: int) -> int:
    """Return the start of the first block that is not zero, at or after a byte offset, or the end of the file."""
    while content := read_at(file, offset, _CHUNK):
        if rest := content.lstrip(b"\0"):
            return offset + (len(content) - len(rest)) // BLOCK * BLOCK
        offset += len(content)
    return offset


def _read_header(file: BinaryIO, offset: int) -> tarfile.TarInfo | None:
    """Return the header at a byte offset, None for the zeros that end a tar file."""
    content = read_at(file, offset, BLOCK)
    if not content:
        raise ValueError("it ends without the zeros that end a tar file")
    if content == bytes(BLOCK):
        return None
    try:
        header = tarfile.TarInfo.frombuf(content, "utf-8", "backslashreplace")
    except (tarfile.HeaderError, ValueError):
        truncated = len(content) < BLOCK
        fault = "it ends inside a header" if truncated else "a damaged header (its checksum is wrong)"
        raise ValueError(fault if offset else _NO_TAR) from None
    if not _SIZE.fullmatch(content[124:136]):
        raise ValueError(f"the invalid size {content[124:136]!r}")
    return header


def _read_extended_header(file: BinaryIO, offset: int, header: tarfile.TarInfo) -> dict[str, str]:
    """Return the fields of the next member that an extended header at a byte offset replaces."""
    if header.size > _MAX_EXTENDED_HEADER:
        raise ValueError(f"an extended header of {header.size:,} bytes, more than {_MAX_EXTENDED_HEADER:,}")
    content = read_at(file, offset, header.size)
    if header.type == tarfile.XHDTYPE:
        return _pax_records(content)
    return {"path": _text(content)} if header.type == tarfile.GNUTYPE_LONGNAME else {}


def _size(extended: dict[str, str], header: tarfile.TarInfo) -> int:
    if "size" not in extended:
        return header.size
    if not re.fullmatch(r"[0-9]{1,18}", extended["size"]):
        raise ValueError(f"a size {extended['size'][:40]!r}")
    return int(extended["size"])


def _pax_records(content: bytes) -> dict[str, str]:
    """Return keys and values of a PAX header: lines of `LENGTH KEY=VALUE`."""
    records = {}
    offset = 0
    while offset < len(content) and content[offset]:
        match = _PAX_RECORD.match(content, offset)
        end = offset + int(match[1]) if match else 0
        if not match or not match.end() < end <= len(content) or content[end - 1 : end] != b"\n":
            raise ValueError("a damaged PAX header")
        key = _text(match[2])
        if key.startswith("GNU.sparse"):
            raise ValueError("a sparse file")
        records[key] = _text(content[match.end() : end - 1])
        offset = end
    return records


def _text(content: bytes) -> str:
    return content.partition(b"\0")[0].decode("utf-8", "backslashreplace")


def round_up(offset: int) -> int:
    """Return the start of the 512-byte block at or after a byte offset, where the next header begins."""
    return -(-offset // BLOCK) * BLOCK
