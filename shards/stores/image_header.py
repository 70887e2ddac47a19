"""Image files: the size in their header, and their pixels.

Headers are parsed here and not by a library because the loader reads one for every image of every batch: it takes a
few microseconds, and a file that only claims to be huge is refused before memory is allocated for its pixels.
"""

from __future__ import annotations

import io
import struct
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

FORMATS = "JPEG, PNG, WebP or BMP"
EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp")
MAX_PIXELS = 1 << 26
MAX_BYTES = 1 << 28  # of a file
Content: TypeAlias = bytes | NDArray[np.uint8]

_SCANS = {0xD9, 0xDA}  # JPEG markers after which no size can come
_SIZES = set(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # JPEG markers that carry the size
_WITHOUT_LENGTH = {0x01, *range(0xD0, 0xD8)}


@dataclass(frozen=True, slots=True)
class ImageHeader:
    """What an image file says of its image.

    height, width: Pixels. From `read_image_header` as stored, before any rotation that EXIF asks for.
    gray: Whether the image has no color.
    """

    height: int
    width: int
    gray: bool


def read_image_header(content: Content) -> ImageHeader:
    """What a picture file says of itself; ValueError (what it is instead) if it is none of `FORMATS` or too large."""
    view = memoryview(content).cast("B")
    try:
        header = _parse_header(view)
    except (struct.error, IndexError):
        raise ValueError(f"a picture that ends inside its header, after {len(view):,} bytes") from None
    if header.width < 1 or header.height < 1:
        raise ValueError(f"a picture of {header.width}x{header.height} pixels")
    if header.width * header.height > MAX_PIXELS:
        raise ValueError(f"a picture of {header.width}x{header.height} pixels, more than {MAX_PIXELS:,}")
    return header


def _parse_header(view: memoryview) -> ImageHeader:
    start = bytes(view[:16])
    if start[:3] == b"\xff\xd8\xff":
        return _jpeg(view)
    if start[:8] == b"\x89PNG\r\n\x1a\n":
        width, height, _, colour = struct.unpack_from(">IIBB", view, 16)
        return ImageHeader(height, width, gray=colour in (0, 4))
    if start[:4] == b"RIFF" and start[8:12] == b"WEBP":
        return _webp(view)
    if start[:2] == b"BM":
        return _bmp(view)
    raise ValueError(f"no {FORMATS} picture: it begins with {start[:12]!r}" if len(view) else "an empty file")


def _jpeg(view: memoryview) -> ImageHeader:
    place = 2
    while True:
        if view[place] != 0xFF:
            raise ValueError(f"a JPEG picture whose header breaks off at byte {place:,}")
        marker = view[place + 1]
        if marker == 0xFF:  # a filling byte
            place += 1
        elif marker in _WITHOUT_LENGTH:
            place += 2
        elif marker in _SIZES:
            height, width, channels = struct.unpack_from(">HHB", view, place + 5)
            return ImageHeader(height, width, gray=channels == 1)
        elif marker in _SCANS:
            raise ValueError("a JPEG picture without a size")
        else:
            place += 2 + struct.unpack_from(">H", view, place + 2)[0]


def _webp(view: memoryview) -> ImageHeader:
    (kind,) = struct.unpack_from("4s", view, 12)
    if kind == b"VP8X":
        width, width_high, height, height_high = struct.unpack_from("<HBHB", view, 24)
        return ImageHeader((height | height_high << 16) + 1, (width | width_high << 16) + 1, gray=False)
    if kind == b"VP8L":
        (bits,) = struct.unpack_from("<I", view, 21)
        return ImageHeader((bits >> 14 & 0x3FFF) + 1, (bits & 0x3FFF) + 1, gray=False)
    if kind == b"VP8 ":
        width, height = struct.unpack_from("<HH", view, 26)
        return ImageHeader(height & 0x3FFF, width & 0x3FFF, gray=False)
    raise ValueError(f"a WebP picture of unknown kind {kind!r}")


def _bmp(view: memoryview) -> ImageHeader:
    (size,) = struct.unpack_from("<I", view, 14)
    if size < 40:
        raise ValueError(f"a BMP picture with a header of {size} bytes, as no program has written for decades")
    width, height, _, bits = struct.unpack_from("<iiHH", view, 18)
    (colours,) = struct.unpack_from("<I", view, 46)
    palette = bytes(view[14 + size : 14 + size + 4 * (colours or 1 << bits)]) if bits <= 8 else b""
    gray = bool(palette) and palette[0::4] == palette[1::4] == palette[2::4]
    return ImageHeader(abs(height), width, gray)  # a negative height: rows from top to bottom


def decode(content: Content, channels: int) -> NDArray[np.uint8]:
    """The pixels uint8 [H, W, channels], turned as EXIF asks; channels: 1 (gray) or 3 (RGB).

    What DALI makes of the file, to the last bit for most. ValueError if it cannot be decoded.
    """
    read_image_header(content)
    try:
        with Image.open(io.BytesIO(content), formats=("JPEG", "PNG", "WEBP", "BMP")) as picture:
            picture = ImageOps.exif_transpose(picture)
            pixels = np.asarray(to_8_bits(picture).convert("L" if channels == 1 else "RGB"))
    except Exception as error:  # Pillow's readers raise whatever a damaged file leads them to
        raise ValueError(f"a picture that cannot be decoded: {error}") from None
    return pixels.reshape(*pixels.shape[:2], channels)


def to_8_bits(image: Image.Image) -> Image.Image:
    """Scale gray levels of 16 bits to 8, which Pillow would cut off at 255; other images stay as they are."""
    if not image.mode.startswith("I"):
        return image
    levels = np.asarray(image, dtype=np.int64).clip(0, 0xFFFF)
    return Image.fromarray(((levels * 255 + 0x7FFF) // 0xFFFF).astype(np.uint8))
