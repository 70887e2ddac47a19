"""Image files: size from the header, and pixels.

Headers are parsed here and not by a library because the loader reads one for every image of every batch: it takes a
few microseconds, and a file that only claims to be huge is refused before memory is allocated for its pixels.
"""

from __future__ import annotations

import io
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

FORMATS = "JPEG, PNG, WebP or BMP"
EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp")
MAX_PIXELS = 1 << 26
MAX_BYTES = 1 << 28  # per file
Content: TypeAlias = bytes | NDArray[np.uint8]

_SCANS = {0xD9, 0xDA}  # JPEG markers that end the header
_SIZES = set(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # JPEG markers that carry the size
_EXIF_START = 1024  # bytes at the start of EXIF that are searched for the orientation; a thumbnail may follow
_WITHOUT_LENGTH = {0x01, *range(0xD0, 0xD8)}
_TEXT_CHUNKS = {b"tEXt", b"zTXt", b"iTXt"}  # of a PNG
_PLAIN_CHUNKS = {b"IHDR", b"IDAT", b"tIME", b"pHYs", b"sRGB", *_TEXT_CHUNKS}
# Pillow rotates by XMP and by EXIF in texts too, DALI by EXIF in its own block only.
# DALI and Pillow interpret an orientation differently if its type is not SHORT (3) or LONG (4).
_ODD_ORIENTATION = re.compile(
    rb"\x12\x01[^\x03\x04]\x00\x01\x00\x00\x00|\x01\x12\x00[^\x03\x04]\x00\x00\x00\x01", re.DOTALL
)
_XMP_ROTATION = re.compile(rb'tiff:Orientation(="|>)[2-8]')
_ROTATING_TEXT = re.compile(rb"XML:com\.adobe\.xmp|Raw profile type")  # of a PNG


@dataclass(frozen=True, slots=True)
class ImageHeader:
    """Size and color of an image, as its file header states them.

    Attributes:
        height: Pixels, before the EXIF rotation if it comes from `read_image_header`.
        width: Pixels, likewise.
        gray: Whether the image has no color.
        plain: Whether every decoder gives the same pixels: only the common variants of each format, without alpha, and
            complete. DALI decodes others differently from Pillow (CMYK without an Adobe marker, gamma), or not at all
            (WebP with EXIF), or does not rotate them (by XMP).
    """

    height: int
    width: int
    gray: bool
    plain: bool = field(default=False, compare=False)


def read_image_header(content: Content) -> ImageHeader:
    """Parse the header of an image file.

    Raises:
        ValueError: If the file is not one of `FORMATS`, or its image is too large.
    """
    view = (memoryview(content) if isinstance(content, bytes) else content.data).cast("B")
    try:
        header = _parse_header(view)
    except (struct.error, IndexError):
        raise ValueError(f"a picture that ends inside its header, after {len(view):,} bytes") from None
    if header.width < 1 or header.height < 1:
        raise ValueError(f"a picture of {header.height} x {header.width} pixels")
    if header.width * header.height > MAX_PIXELS:
        raise ValueError(f"a picture of {header.height} x {header.width} pixels, more than {MAX_PIXELS:,}")
    return header


def _parse_header(view: memoryview) -> ImageHeader:
    start = bytes(view[:16])
    if start[:3] == b"\xff\xd8\xff":
        return _jpeg(view)
    if start[:8] == b"\x89PNG\r\n\x1a\n":
        width, height, bits, color = struct.unpack_from(">IIBB", view, 16)
        return ImageHeader(height, width, color in (0, 4), bits == 8 and color in (0, 2) and _is_plain_png(view))
    if start[:4] == b"RIFF" and start[8:12] == b"WEBP":
        return _webp(view)
    if start[:2] == b"BM":
        return _bmp(view)
    raise ValueError(f"no {FORMATS} picture: it begins with {start[:12]!r}" if len(view) else "an empty file")


def _jpeg(view: memoryview) -> ImageHeader:
    offset = 2
    header: ImageHeader | None = None
    is_common = is_jfif = rotates_unlike_dali = False
    adobe = None  # the color transform of the Adobe marker; 1 is YCbCr
    exifs = 0
    try:
        while True:
            marker = view[offset + 1]
            if view[offset] != 0xFF:
                if header:
                    return header
                raise ValueError(f"a JPEG picture whose header breaks off at byte {offset:,}")
            if marker == 0xFF:  # padding
                offset += 1
            elif marker in _WITHOUT_LENGTH:
                offset += 2
            elif marker in _SCANS:
                break
            else:
                end = offset + 2 + struct.unpack_from(">H", view, offset + 2)[0]
                if marker in _SIZES:
                    bits, height, width, channels = struct.unpack_from(">BHHB", view, offset + 4)
                    header = ImageHeader(height, width, gray=channels == 1)
                    components = bytes(view[offset + 10 : offset + 10 + 3 * channels : 3])
                    is_common = marker in (0xC0, 0xC2) and bits == 8 and len(components) in (1, 3)
                elif marker == 0xE0:
                    is_jfif |= bytes(view[offset + 4 : offset + 8]) == b"JFIF"
                elif marker == 0xEE and bytes(view[offset + 4 : offset + 9]) == b"Adobe":
                    adobe = view[offset + 15]
                elif marker == 0xE1:
                    exifs += bytes(view[offset + 4 : offset + 8]) == b"Exif"
                    rotates_unlike_dali |= bool(_XMP_ROTATION.search(view[offset:end]))
                    rotates_unlike_dali |= bool(_ODD_ORIENTATION.search(view[offset : min(end, offset + _EXIF_START)]))
                offset = end
    except (struct.error, IndexError):
        if header:
            return header
        raise
    if header is None:
        raise ValueError("a JPEG picture without a size")
    is_ycbcr = adobe == 1 or (adobe is None and (is_jfif or components == b"\1\2\3"))
    is_rotated_once = exifs <= 1 and not rotates_unlike_dali
    plain = is_common and (header.gray or is_ycbcr) and is_rotated_once and bytes(view[-2:]) == b"\xff\xd9"
    return ImageHeader(header.height, header.width, header.gray, plain)


def may_rotate_png(view: memoryview) -> bool:
    """Return whether a PNG has EXIF or XMP, which may state a rotation, before or behind its pixels."""
    return any(kind == b"eXIf" or _is_rotating_text(view, kind, start) for kind, start in _png_chunks(view))


def _is_plain_png(view: memoryview) -> bool:
    """Whether a PNG is complete and has no chunk that changes its pixels, such as transparency, gamma and animation."""
    for kind, start in _png_chunks(view):
        if kind == b"IEND":
            return True
        if kind not in _PLAIN_CHUNKS or _is_rotating_text(view, kind, start):
            return False
    return False


def _png_chunks(view: memoryview) -> Iterator[tuple[bytes, int]]:
    """The type of each chunk and the offset of its content."""
    offset = 8
    while offset + 12 <= len(view):
        size, kind = struct.unpack_from(">I4s", view, offset)
        yield kind, offset + 8
        offset += 12 + size


def _is_rotating_text(view: memoryview, kind: bytes, start: int) -> bool:
    return kind in _TEXT_CHUNKS and _ROTATING_TEXT.match(view, start) is not None


def _webp(view: memoryview) -> ImageHeader:
    size, _, kind = struct.unpack_from("<I4s4s", view, 4)
    complete = 8 + size <= len(view)
    if kind == b"VP8X":
        width, width_high, height, height_high = struct.unpack_from("<HBHB", view, 24)
        return ImageHeader((height | height_high << 16) + 1, (width | width_high << 16) + 1, gray=False)
    if kind == b"VP8L":
        (bits,) = struct.unpack_from("<I", view, 21)
        plain = complete and not bits >> 28 & 1  # without alpha
        return ImageHeader((bits >> 14 & 0x3FFF) + 1, (bits & 0x3FFF) + 1, False, plain)
    if kind == b"VP8 ":
        width, height = struct.unpack_from("<HH", view, 26)
        return ImageHeader(height & 0x3FFF, width & 0x3FFF, False, complete)
    raise ValueError(f"a WebP picture of unknown kind {kind!r}")


def _bmp(view: memoryview) -> ImageHeader:
    start, size = struct.unpack_from("<II", view, 10)
    if size < 40:
        raise ValueError(f"a BMP picture with a header of {size} bytes, as no program has written for decades")
    width, height, _, bits, compression = struct.unpack_from("<iiHHI", view, 18)
    (colors,) = struct.unpack_from("<I", view, 46)
    palette = bytes(view[14 + size : 14 + size + 4 * (colors or 1 << bits)]) if bits <= 8 else b""
    gray = bool(palette) and palette[0::4] == palette[1::4] == palette[2::4]
    stored = start + (3 * width + 3) // 4 * 4 * height  # bytes; height is negative if the top row comes first
    plain = size == 40 and bits == 24 and compression == 0 and height > 0 and stored <= len(view)
    return ImageHeader(abs(height), width, gray, plain)


def decode(content: Content, channels: int) -> NDArray[np.uint8]:
    """Decode an image file, with the EXIF rotation applied, on white where it is transparent.

    Args:
        content: The bytes of the file.
        channels: 1 (gray) or 3 (RGB).

    Returns:
        uint8 [H, W, channels].

    Raises:
        ValueError: If the file cannot be decoded.
    """
    read_image_header(content)
    try:
        with Image.open(io.BytesIO(bytes(content)), formats=("JPEG", "PNG", "WEBP", "BMP")) as image:
            upright = ImageOps.exif_transpose(image)
            pixels = np.asarray(to_mode(upright, "L" if channels == 1 else "RGB"))
    except Exception as error:  # Pillow raises many types for damaged files
        raise ValueError(f"a picture that cannot be decoded: {error}") from None
    return pixels.reshape(*pixels.shape[:2], channels)


def to_mode(image: Image.Image, mode: str) -> Image.Image:
    """Convert an image to 8 bits and mode L or RGB, on white where it is transparent."""
    image = _to_8_bits(image)
    if image.has_transparency_data:
        foreground = image.convert("RGBA")
        image = Image.new("RGBA", foreground.size, "white")
        image.alpha_composite(foreground)
    return image if image.mode == mode else image.convert("RGB").convert(mode)


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Scale 16-bit gray levels to 8 bits (Pillow would clip them at 255). Other images are returned unchanged."""
    if not image.mode.startswith("I"):
        return image
    levels = np.asarray(image, dtype=np.int64).clip(0, 0xFFFF)
    return Image.fromarray(((levels * 255 + 0x7FFF) // 0xFFFF).astype(np.uint8))
