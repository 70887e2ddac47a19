"""Decompression in bounded memory: gzip, bzip2 and xz, recognized by their first bytes.

The file classes of `gzip`, `bz2` and `lzma` are not used: the last two ignore garbage behind a stream, and streams
behind padding.
"""

from __future__ import annotations

import bz2
import lzma
from collections.abc import Callable, Iterator
from typing import IO, Any

from isal import igzip_lib  # inflates about twice as fast as zlib

from pipeline.readers.archives.files import CorruptFileError
from shards.errors import first_line

_CHUNK = 1 << 20
_MAX_XZ_MEMORY = 256 << 20  # bytes; the largest preset of xz needs 65 MB

_DECOMPRESSORS: dict[bytes, Callable[[], Any]] = {
    b"\x1f\x8b": lambda: igzip_lib.IgzipDecompressor(flag=igzip_lib.DECOMP_GZIP),
    b"BZh": bz2.BZ2Decompressor,
    b"\xfd7zXZ\0": lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_MAX_XZ_MEMORY),
}


def is_compressed(head: bytes) -> bool:
    """Return whether `decompress` reads a file with these first six bytes."""
    return head.startswith(tuple(_DECOMPRESSORS))


def decompress(file: IO[bytes]) -> Iterator[bytes]:
    """Yield the content of a compressed file in chunks of at most 1 MiB. Consecutive streams count as one.

    The caller limits the total size.

    Raises:
        CorruptFileError: If the content is damaged or incomplete.
    """
    data = file.read(_CHUNK)
    make = next(make for magic, make in _DECOMPRESSORS.items() if data.startswith(magic))
    stream = make()
    try:
        while True:
            yield stream.decompress(data, _CHUNK)
            data = b""
            if stream.eof:
                data = stream.unused_data.lstrip(b"\0")
                while not data:  # zeros between two streams are padding
                    if not (chunk := file.read(_CHUNK)):
                        return
                    data = chunk.lstrip(b"\0")
                stream = make()
            elif stream.needs_input and not (data := file.read(_CHUNK)):
                raise EOFError("it ends before its content does")
    except (igzip_lib.IsalError, lzma.LZMAError, EOFError, OSError, ValueError) as error:  # type: ignore[misc]  # isal
        raise CorruptFileError(f"it does not decompress: {first_line(error)}") from None
