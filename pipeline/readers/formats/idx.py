"""The idx format of the MNIST family: http://yann.lecun.com/exdb/mnist/, end of the page.

Two zero bytes, a type byte (8: uint8, 12: int32), the number of dimensions, each dimension as a big-endian uint32,
then the values, big-endian, in C order. The published files are compressed by gzip.
"""

from __future__ import annotations

import io
import math
import struct

import numpy as np
from numpy.typing import NDArray

from pipeline.readers.archives.compression import decompress, is_compressed
from pipeline.readers.archives.files import CorruptFileError, corrupt_as_user_error, max_expanded_bytes
from pipeline.readers.raw_dir import RawContent
from shards.errors import UserError, quote

_UINT8, _INT32 = 0x08, 0x0C
_DTYPES: dict[int, np.dtype] = {_UINT8: np.dtype(np.uint8), _INT32: np.dtype(">i4")}
_CONTENT = {1: "labels", 3: "images"}  # by number of dimensions


def decode(raw: RawContent, dimensions: int, kind: int = _UINT8) -> NDArray:
    """Decode an idx file, compressed or not.

    Args:
        raw: The file.
        dimensions: 1 for labels [N], 2 for a table of labels [N, columns], 3 for images [N, H, W].
        kind: The type byte: 8 (uint8) or 12 (int32).

    Returns:
        A read-only array, uint8 or big-endian int32.

    Raises:
        UserError: If the file is incomplete, or has another type or number of dimensions.
    """
    with corrupt_as_user_error(
        raw.path,
        expected="a complete idx file (idx3 for images, idx1 or idx2 for labels), as published",
        hint=f"remove it and run again to download it: rm {quote(raw.path)}",
    ):
        content = _decompressed(raw.content)
        header = 4 + 4 * dimensions
        if len(content) < header:
            raise CorruptFileError(f"of {len(content)} bytes")
        zeros, kind_of_file, dimensions_of_file = struct.unpack(">HBB", content[:4])
        if zeros != 0 or kind_of_file != kind:
            raise CorruptFileError(f"begins with {content[:4].hex(' ')}")
        if dimensions_of_file != dimensions:
            what = _CONTENT.get(dimensions_of_file, "neither images nor labels")
            raise CorruptFileError(f"with {dimensions_of_file} dimensions, {what}")
        shape = struct.unpack(f">{dimensions}I", content[4:header])
        count, rest = divmod(len(content) - header, _DTYPES[kind].itemsize)
        if count != math.prod(shape) or rest:
            raise CorruptFileError(f"with {count:,} values where its header says {math.prod(shape):,}")
        if count == 0:
            raise CorruptFileError("empty")
        values = np.frombuffer(content, _DTYPES[kind], offset=header).reshape(shape)
    values.flags.writeable = False
    return values


def decode_table(raw: RawContent, columns: int) -> NDArray[np.int32]:
    """Decode a table of labels (idx2-int), int32 [N, columns].

    Raises:
        UserError: If the file is incomplete or has another number of columns.
    """
    table = decode(raw, 2, _INT32)
    if table.shape[1] != columns:
        raise UserError(
            found=f"{raw.path}, with {table.shape[1]} columns",
            expected=f"{columns} columns, as published",
            hint=f"remove it and run again to download it: rm {quote(raw.path)}",
        )
    return table.astype(np.int32)


def decode_pair(
    images: RawContent, labels: RawContent, classes: int, first_label: int = 0
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Decode the images and labels of one split.

    Args:
        images: The file of images.
        labels: The file of labels.
        classes: The number of classes.
        first_label: The number of the first class in the file.

    Returns:
        Images uint8 [N, H, W, 1] and labels int64 [N], numbered from 0.
    """
    pixels, numbers = decode(images, 3)[..., None], decode(labels, 1)
    check_pair(images, len(pixels), labels, numbers, classes, first_label)
    return pixels, numbers.astype(np.int64) - first_label


def check_pair(
    images: RawContent, count: int, labels: RawContent, numbers: NDArray, classes: int, first_label: int = 0
) -> None:
    """Check the number of labels (one per image) and their range (first_label .. first_label + classes - 1).

    Raises:
        UserError: If the labels do not fit.
    """
    if count != len(numbers):
        raise UserError(
            found=f"{count:,} images in {images.path} and {len(numbers):,} labels in {labels.path}",
            expected="one label per image",
            hint="use files of one release: remove both and run again to download them",
        )
    low, high = int(numbers.min()), int(numbers.max())
    if low < first_label or high >= first_label + classes:
        raise UserError(
            found=f"labels {low} .. {high} in {labels.path}",
            expected=f"labels {first_label} .. {first_label + classes - 1}, the {classes} classes of this data set",
            hint="check that the file belongs to this data set and variant",
        )


def _decompressed(content: bytes) -> bytes | bytearray:
    """The content, decompressed within a limit."""
    if not is_compressed(content):
        return content
    limit = max_expanded_bytes(len(content))
    result = bytearray()
    for chunk in decompress(io.BytesIO(content)):
        result += chunk
        if len(result) > limit:
            raise CorruptFileError(f"expands to more than {limit:,} bytes")
    return result
