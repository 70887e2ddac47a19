"""The members of a tar file that anyone may have written, found without trusting it.

POSIX (ustar, PAX) and GNU files are understood: https://pubs.opengroup.org/onlinepubs/9699919799/utilities/pax.html
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from shards.errors import CorruptError

BLOCK = 512
_MOST_NAME = 64 << 10  # bytes of a name, and of the PAX records of one member
_FILES = b"0\0" + b"7"
_DIRECTORY = b"5"
_PAX, _PAX_OF_ALL, _GNU_NAME, _GNU_LINK = b"x", b"g", b"L", b"K"
_WHAT = {b"1": "a hard link", b"2": "a symbolic link", b"3": "a device", b"4": "a device", b"6": "a pipe"}
_NO_TAR = "it is no uncompressed tar file"
_PAX_RECORD = re.compile(rb"(\d{1,6}) ([^=]+)=")


class Member(NamedTuple):
    """A regular file in a tar file: its name, and where its content begins and how long it is, in bytes."""

    name: str
    offset: int
    size: int


class TarError(ValueError):
    """What is wrong with a tar file; start: the byte at which the header lies that could not be read."""

    start = 0


def iterate_members(file: BinaryIO) -> Iterator[Member]:
    """Iterate over the regular files of an open, seekable tar file in order; directories are skipped.

    Raises:
        TarError: For links, devices, compressed or damaged files, and files that end too soon.
    """
    length = file.seek(0, os.SEEK_END)
    end = start = 0
    try:
        while True:
            start = end
            header, extra, place = _next_header(file, start, length)
            if header is None:
                return
            name = extra.get("path") or _name(header)
            size = _size(extra, header)
            if place + size > length:
                raise TarError(f"{name!r} claims {size:,} bytes, {length - place:,} are left")
            kind = header[156:157]
            if kind in _FILES and not name.endswith("/"):
                yield Member(name, place, size)
            elif kind != _DIRECTORY and kind not in _FILES:
                raise TarError(f"{name!r} is {_WHAT.get(kind, f'of type {kind!r}')}")
            end = round_up(place + size)
    except TarError as error:
        error.start = start
        raise


def read_members(path: Path) -> Iterator[Member]:
    """Iterate over the regular files of a tar file on disk, see `iterate_members`.

    Raises:
        CorruptError: Instead of `TarError`; names the file, the byte and the member before it.
    """
    name = ""
    try:
        with open(path, "rb", buffering=0) as file:
            for member in iterate_members(file):
                name = member.name
                yield member
    except TarError as error:
        after = f", after {name!r}" if name and repr(name) not in str(error) else ""
        raise CorruptError(
            found=f"{path}: {error} (header at byte {error.start:,}{after})",
            expected="a whole, uncompressed tar file that holds regular files",
            hint="fetch or write it again; tar tf lists what can be read of it",
        ) from None


def _next_header(file: BinaryIO, place: int, length: int) -> tuple[bytes | None, dict[str, str], int]:
    """The header of the next member (None at the end), what extended headers before it say, and where it ends."""
    extra: dict[str, str] = {}
    while True:
        header = _read(file, place, BLOCK)
        place += BLOCK
        if len(header) == BLOCK and not any(header):
            if extra:
                raise TarError("the file ends after an extended header")
            return None, extra, place
        if not header:
            raise TarError("it ends without the zeros that end a tar file")
        if len(header) < BLOCK:
            raise TarError("it ends inside a header" if place > BLOCK else _NO_TAR)
        _check_sum(header, place - BLOCK)
        kind = header[156:157]
        if kind not in (_PAX, _PAX_OF_ALL, _GNU_NAME, _GNU_LINK):
            return header, extra, place
        size = _number(header[124:136])
        if size > _MOST_NAME:
            raise TarError(f"an extended header of {size:,} bytes, more than {_MOST_NAME:,}")
        if place + size > length:
            raise TarError("it is cut off inside an extended header")
        content = _read(file, place, size)
        if kind == _PAX:
            extra |= _pax_records(content)
        elif kind == _GNU_NAME:
            extra["path"] = _text(content)
        place = round_up(place + size)


def _read(file: BinaryIO, place: int, size: int) -> bytes:
    file.seek(place)
    return file.read(size)


def _check_sum(header: bytes, place: int) -> None:
    """The check sum is over the header with blanks in its place; some old programs took the bytes as signed."""
    try:
        wanted = _number(header[148:156])
    except TarError:
        wanted = -1
    summed = header[:148] + b" " * 8 + header[156:]
    if wanted != sum(summed) and wanted != sum(summed) - 256 * sum(byte > 127 for byte in summed):
        raise TarError("a damaged header (its check sum is wrong)" if place else _NO_TAR)


def _number(field: bytes) -> int:
    """An octal number, or one of base 256 as GNU writes large ones."""
    if field[0] in (0x80, 0xFF):
        number = int.from_bytes(field[1:], "big", signed=True)
    else:
        digits = field.strip(b" \0")
        if digits.strip(b"01234567"):
            raise TarError(f"a number {digits!r} that is not octal")
        number = int(digits or b"0", 8)
    if number < 0 or field[0] == 0xFF:
        raise TarError("a number below 0")
    return number


def _size(extra: dict[str, str], header: bytes) -> int:
    if "size" not in extra:
        return _number(header[124:136])
    if not re.fullmatch(r"[0-9]{1,18}", extra["size"]):
        raise TarError(f"a size {extra['size'][:40]!r}")
    return int(extra["size"])


def _name(header: bytes) -> str:
    name = _text(header[:100])
    if header[257:263] == b"ustar\0" and header[345]:
        return f"{_text(header[345:500])}/{name}"
    return name


def _pax_records(content: bytes) -> dict[str, str]:
    """Keys and values of a PAX header: lines of `LENGTH KEY=VALUE`."""
    records = {}
    place = 0
    while place < len(content) and content[place]:
        match = _PAX_RECORD.match(content, place)
        end = place + int(match[1]) if match else 0
        if not match or not match.end() < end <= len(content) or content[end - 1 : end] != b"\n":
            raise TarError("a damaged PAX header")
        key = _text(match[2])
        if key.startswith("GNU.sparse"):
            raise TarError("a sparse file")
        records[key] = _text(content[match.end() : end - 1])
        place = end
    return records


def _text(content: bytes) -> str:
    return content.partition(b"\0")[0].decode("utf-8", "backslashreplace")


def round_up(place: int) -> int:
    """The start of the 512-byte block at or after a byte: where the header after a member lies."""
    return -(-place // BLOCK) * BLOCK
