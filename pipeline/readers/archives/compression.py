"""Decompression in bounded memory: gzip, bzip2 and xz, told by how the content begins."""

from __future__ import annotations

import bz2
import lzma
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

from isal import igzip_lib  # inflates about twice as fast as zlib

from pipeline.readers.archives.files import BadFile
from shards.errors import first_line

_CHUNK = 1 << 20
_MOST_XZ_MEMORY = 256 << 20  # bytes; the largest preset of xz takes 65 MB

_MAKERS: dict[bytes, Callable[[], Any]] = {
    b"\x1f\x8b": lambda: igzip_lib.IgzipDecompressor(flag=igzip_lib.DECOMP_GZIP),
    b"BZh": bz2.BZ2Decompressor,
    b"\xfd7zXZ\0": lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_MOST_XZ_MEMORY),
}


def is_compressed(head: bytes) -> bool:
    """Whether a file that begins so (six bytes tell) is one that `decompressed` takes."""
    return any(head.startswith(magic) for magic in _MAKERS)


def decompressed(file: BinaryIO) -> Iterator[bytes]:
    """The content of a compressed file, in chunks of at most 1 MiB; several streams in a row count as one.

    Raises `BadFile` for damaged or incomplete content, when the iteration comes to it. The caller says when it is
    too much.
    """
    data = file.read(_CHUNK)
    make = next(make for magic, make in _MAKERS.items() if data.startswith(magic))
    stream = make()
    try:
        while True:
            yield stream.decompress(data, _CHUNK)
            data = b""
            if stream.eof:
                data = _next_stream(stream.unused_data, file)
                if not data:
                    return
                stream = make()
            elif stream.needs_input:
                data = file.read(_CHUNK)
                if not data:
                    raise EOFError("it ends before its content does")
    except (igzip_lib.IsalError, lzma.LZMAError, EOFError, OSError, ValueError) as error:
        raise BadFile(f"it does not decompress: {first_line(error)}") from None


def _next_stream(data: bytes, file: BinaryIO) -> bytes:
    """What follows a stream, without the zeros that may stand between two."""
    while not (data := data.lstrip(b"\0")):
        data = file.read(_CHUNK)
        if not data:
            break
    return data
