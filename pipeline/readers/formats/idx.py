"""The idx format of the MNIST family: http://yann.lecun.com/exdb/mnist/, end of the page.

Two zero bytes, a type byte (8: uint8, 12: int32), the number of dimensions, each dimension as a big-endian uint32,
then the values, big-endian, in C order. The files come gzip-compressed.
"""

from __future__ import annotations

import io
import math
import struct

import numpy as np
from numpy.typing import NDArray

from pipeline.readers.archives.compression import decompress, is_compressed
from pipeline.readers.archives.files import CorruptFileError, max_expanded_bytes
from pipeline.readers.raw_dir import RawContent
from shards.errors import UserError

_KINDS = {0x08: np.dtype(np.uint8), 0x0C: np.dtype(">i4")}
_BYTES, _INTEGERS = _KINDS
_WHAT = {1: "labels", 3: "images"}


def decode(raw: RawContent, dimensions: int, kind: int = _BYTES) -> NDArray[np.uint8] | NDArray[np.int32]:
    """Decode an idx file (compressed or not), read-only: uint8, or int32 as stored where `kind` is 12.

    dimensions: 1 for labels [N], 2 for a table of labels [N, columns], 3 for images [N, H, W]. Raises `UserError` for
    anything but a whole file.
    """
    content = _plain(raw)
    header = 4 + 4 * dimensions
    if len(content) < header:
        raise _bad(raw, f"of {len(content)} bytes")
    zeros, found_kind, found_dimensions = struct.unpack(">HBB", content[:4])
    if zeros != 0 or found_kind != kind:
        raise _bad(raw, f"which begins with {content[:4].hex(' ')}")
    if found_dimensions != dimensions:
        what = _WHAT.get(found_dimensions, "neither images nor labels")
        raise _bad(raw, f"with {found_dimensions} dimensions, {what}")
    shape = struct.unpack(f">{dimensions}I", content[4:header])
    size = math.prod(shape)
    found, rest = divmod(len(content) - header, _KINDS[kind].itemsize)
    if found != size or rest:
        raise _bad(raw, f"with {found:,} values where its header says {size:,}")
    if size == 0:
        raise _bad(raw, "which is empty")
    values = np.frombuffer(content, _KINDS[kind], offset=header).reshape(shape)
    values.flags.writeable = False
    return values


def decode_table(raw: RawContent, columns: int) -> NDArray[np.int32]:
    """Decode a table of labels (idx2-int) of so many columns, int32 [N, columns]; raises `UserError`."""
    table = decode(raw, 2, _INTEGERS)
    if table.shape[1] != columns:
        raise _bad(raw, f"with {table.shape[1]} columns where {columns} belong")
    return table.astype(np.int32)


def decode_pair(
    images: RawContent, labels: RawContent, classes: int, first_label: int = 0
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Decode images and labels that belong together: uint8 [N, H, W, 1] and int64 [N], labels from 0.

    first_label: the number that the raw files give to the first class.
    """
    pixels = decode(images, 3)[..., None]
    numbers = decode(labels, 1)
    check_pair(images, len(pixels), labels, numbers, classes, first_label)
    return pixels, numbers.astype(np.int64) - first_label


def check_pair(
    images: RawContent, count: int, labels: RawContent, numbers: NDArray, classes: int, first_label: int = 0
) -> None:
    """Raise `UserError` unless labels belong to so many images and are first_label .. first_label + classes - 1."""
    if count != len(numbers):
        raise UserError(
            found=f"{count:,} images in {images.place} and {len(numbers):,} labels in {labels.place}",
            expected="as many labels as images",
            hint="get both files from the same release, for instance by removing them so that they are downloaded",
        )
    low, high = int(numbers.min()), int(numbers.max())
    if low < first_label or high >= first_label + classes:
        raise UserError(
            found=f"labels {low} .. {high} in {labels.place}",
            expected=f"labels {first_label} .. {first_label + classes - 1}, the {classes} classes of this data set",
            hint="check that the file belongs to this data set and split",
        )


def _plain(raw: RawContent) -> bytes | bytearray:
    """The content, decompressed if it has to be, and refused where it grows like a bomb."""
    if not is_compressed(raw.content):
        return raw.content
    most = max_expanded_bytes(len(raw.content))
    content = bytearray()
    try:
        for chunk in decompress(io.BytesIO(raw.content)):
            content += chunk
            if len(content) > most:
                raise _bad(raw, f"which expands to more than {most:,} bytes")
    except CorruptFileError as error:
        raise _bad(raw, f"damaged: {error}") from None
    return content


def _bad(raw: RawContent, what: str) -> UserError:
    return UserError(
        found=f"{raw.place}, {what}",
        expected="a whole idx file (idx3 for images, idx1 or idx2 for labels), as published",
        hint="get the file again: remove it, and it is downloaded",
    )
