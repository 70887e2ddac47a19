"""The idx format of the MNIST family: http://yann.lecun.com/exdb/mnist/, end of the page.

Two zero bytes, a type byte (8: uint8), the number of dimensions, each dimension as a big-endian uint32, then
the values in C order. The files come gzip-compressed.
"""

from __future__ import annotations

import math
import struct

import numpy as np
from isal import igzip, isal_zlib  # inflates about twice as fast as gzip, most of the time of a pack
from numpy.typing import NDArray

from pipeline.raw import RawContent
from shards.errors import UserError

_UINT8 = 0x08
_GZIP_MAGIC = b"\x1f\x8b"


def decode(raw: RawContent, dimensions: int) -> NDArray[np.uint8]:
    """Decode an idx file of uint8 values (gzip-compressed or not), read-only.

    dimensions: 1 for labels [N], 3 for images [N, H, W]. Raises `UserError` for anything but a whole file.
    """
    content = raw.content
    if content[:2] == _GZIP_MAGIC:
        try:
            content = igzip.decompress(content)
        except (EOFError, isal_zlib.error, igzip.BadGzipFile) as error:
            raise _bad(raw, f"which does not decompress: {error}") from None
    header = 4 + 4 * dimensions
    if len(content) < header:
        raise _bad(raw, f"of {len(content)} bytes")
    zeros, kind, found_dimensions = struct.unpack(">HBB", content[:4])
    if zeros != 0 or kind != _UINT8:
        raise _bad(raw, f"which begins with {content[:4].hex(' ')}")
    if found_dimensions != dimensions:
        what = {1: "labels", 3: "images"}
        raise _bad(
            raw, f"with {found_dimensions} dimensions, {what.get(found_dimensions, 'neither images nor labels')}"
        )
    shape = struct.unpack(f">{dimensions}I", content[4:header])
    size = math.prod(shape)
    if len(content) - header != size:
        raise _bad(raw, f"with {len(content) - header:,} values where its header says {size:,}")
    if size == 0:
        raise _bad(raw, "which is empty")
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def decode_pair(
    images: RawContent, labels: RawContent, classes: int, first_label: int = 0
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Decode images and labels that belong together: uint8 [N, H, W, 1] and int64 [N], labels from 0.

    first_label: the number that the raw files give to the first class.
    """
    pixels = decode(images, 3)[..., None]
    numbers = decode(labels, 1)
    if len(pixels) != len(numbers):
        raise UserError(
            found=f"{len(pixels):,} images in {images.place} and {len(numbers):,} labels in {labels.place}",
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
    return pixels, numbers.astype(np.int64) - first_label


def _bad(raw: RawContent, what: str) -> UserError:
    return UserError(
        found=f"{raw.place}, {what}",
        expected="a whole idx file of bytes (idx3 for images, idx1 for labels), as published",
        hint="get the file again: remove it, and it is downloaded",
    )
