"""Image files (PNG, JPEG, WebP, BMP, GIF, TIFF): their headers, and their pixels at one size.

An image is rotated according to its EXIF orientation, composited on white where it is transparent, and scaled to
8 bits. Of an animation the first frame is used. Truncated files are refused. A changed byte is detected if the format
has checksums (PNG) or if it breaks the coding; in a JPEG, WebP or BMP it may remain undetected.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from pipeline.readers.archives.files import CorruptFileError
from shards.errors import first_line
from shards.stores.base import EncodedImage
from shards.stores.image_header import MAX_BYTES, MAX_PIXELS, ImageHeader, may_rotate_png, read_image_header, to_mode

KINDS = "PNG, JPEG, WebP, BMP, GIF or TIFF"
EXTENSIONS = frozenset({"png", "jpg", "jpeg", "jpe", "jfif", "webp", "bmp", "gif", "tif", "tiff"})
# Images that are not supported. They are named in an error, where other files are skipped.
OTHER_EXTENSIONS = frozenset({"jp2", "avif", "heic", "heif", "jxl", "svg", "ppm", "pgm", "pbm", "dcm"})
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
_RECORD_EXTENSIONS = {"PNG": "png", "JPEG": "jpg", "MPO": "jpg", "WEBP": "webp", "BMP": "bmp"}  # DALI decodes them too
_PNG_END = b"IEND\xaeB`\x82"
_ORIENTATION = 0x0112  # EXIF; 5 to 8 exchange height and width
_BITS_PER_SAMPLE = 0x0102  # of a TIFF
_PHOTOMETRIC = 0x0106  # of a TIFF; 0 if white is 0
_GRAY_MODES = {"1", "L", "LA", "La", "I;16", "I;16B", "I;16L", "I"}

# Pillow warns of images beyond MAX_PIXELS, which are refused; as a warning it would only be printed.
warnings.simplefilter("error", Image.DecompressionBombWarning)


def header(content: bytes) -> ImageHeader:
    """Return the header of an image file, with height and width after the rotation that EXIF requests.

    Raises:
        CorruptFileError: If the file is not a supported image.
    """
    with _decoder_errors():
        image = _open(content)
        # Pillow has rotated a TIFF already. In a PNG it would decode all pixels to look for EXIF behind them.
        may_be_rotated = image.format != "PNG" or may_rotate_png(memoryview(content))
        is_rotated = may_be_rotated and image.format != "TIFF" and image.getexif().get(_ORIENTATION, 1) in (5, 6, 7, 8)
        height, width = (image.width, image.height) if is_rotated else (image.height, image.width)
        return ImageHeader(height=height, width=width, gray=_is_gray(image))


def decode(content: bytes, channels: int, size: tuple[int, int] | None, fit: str = "pad") -> NDArray[np.uint8]:
    """Decode an image file.

    Args:
        content: The bytes of the file.
        channels: 1 for gray, 3 for RGB.
        size: Size (H, W) of the result; None for the size of the image.
        fit: `pad` keeps the complete image and its aspect ratio and fills the rest with the median of the image's
            border, which most likely is its background; `crop` keeps the aspect ratio and crops both sides equally;
            `stretch` does neither. Scaling is bilinear, with antialiasing where the image gets smaller.

    Returns:
        The pixels, uint8 [H, W, channels].

    Raises:
        CorruptFileError: If the file is not a supported image, or is damaged.
    """
    mode = "L" if channels == 1 else "RGB"
    with _decoder_errors():
        image = _open(content)
        if size is not None:
            # A large JPEG is decoded at a half, a quarter or an eighth, still twice as large as needed.
            image.draft(mode if image.mode in ("L", "RGB") else None, (2 * max(size), 2 * max(size)))
        _load(image, content)
        ImageOps.exif_transpose(image, in_place=True)
        image = to_mode(image, mode)
    if size is not None and image.size != size[::-1]:
        image = _FITS[fit](image, size)
    return np.asarray(image).reshape(image.height, image.width, channels)


def make_record(content: bytes) -> EncodedImage:
    """Return an image file as a record: unchanged if every decoder gives the same pixels, else converted to PNG.

    Raises:
        CorruptFileError: If the file is not a supported image, or is damaged.
    """
    with _decoder_errors():
        image = _open(content)
        extension = _RECORD_EXTENSIONS.get(image.format or "")
        if extension and _is_plain(content):
            _load(image, content)
            return EncodedImage(content, extension)
        return EncodedImage(encode_png(decode(content, 1 if _is_gray(image) else 3, None)), "png")


def _is_plain(content: bytes) -> bool:
    try:
        return read_image_header(content).plain
    except ValueError:  # a variant that only Pillow reads
        return False


def encode_png(pixels: NDArray[np.uint8], compress_level: int = 6) -> bytes:
    """Return pixels [H, W], [H, W, 1] or [H, W, 3] as a PNG file."""
    content = io.BytesIO()
    image = Image.fromarray(pixels[..., 0] if pixels.shape[2:] == (1,) else pixels)
    image.save(content, "PNG", compress_level=compress_level)
    return content.getvalue()


def is_image_file(content: bytes) -> bool:
    """Return whether this is an image file, whatever its name."""
    try:
        header(content)
    except CorruptFileError:
        return False
    return True


@contextmanager
def _decoder_errors() -> Iterator[None]:
    """Raise any exception as a `CorruptFileError`: for damaged files decoders raise exceptions of any type."""
    try:
        yield
    except CorruptFileError:
        raise
    except Image.UnidentifiedImageError:
        raise CorruptFileError(f"not a {KINDS} image") from None
    except Exception as error:
        raise CorruptFileError(first_line(error)) from None


def _open(content: bytes) -> Image.Image:
    """An image whose header has been read."""
    if len(content) > MAX_BYTES:
        raise CorruptFileError(f"of {len(content):,} bytes; an image file may have {MAX_BYTES:,}")
    image = Image.open(io.BytesIO(content), formats=_FORMATS)
    width, height = image.size
    if not 0 < width * height <= MAX_PIXELS:
        raise CorruptFileError(f"of {height} x {width} pixels; an image may have 1 to {MAX_PIXELS:,} pixels")
    if image.format == "TIFF" and (pages := getattr(image, "n_frames", 1)) > 1:
        raise CorruptFileError(f"a TIFF of {pages} pages; an image file may have one")
    if image.mode == "F" or (image.format == "TIFF" and image.mode == "I"):
        pixels = "floats" if image.mode == "F" else "signed or of 32 bits"
        raise CorruptFileError(f"its pixels are {pixels}, whose range is unknown; convert them to 8 or 16 bits")
    if image.format == "TIFF" and image.mode.startswith("I;16"):
        tags = image.getexif()
        if tags.get(_PHOTOMETRIC) == 0:
            raise CorruptFileError(
                "a TIFF of 16 bits in which 0 is white, which is not supported; convert it to 8 bits"
            )
        bits = tags.get(_BITS_PER_SAMPLE, 16)
        if bits not in (16, (16,)):
            raise CorruptFileError(f"a TIFF of {bits} bits, which is not supported; convert it to 8 or 16 bits")
    return image


def _load(image: Image.Image, content: bytes) -> None:
    image.load()
    # Pillow accepts a PNG that ends after its last pixel.
    if image.format == "PNG" and _PNG_END not in content:
        raise CorruptFileError("it is truncated")


def _is_gray(image: Image.Image) -> bool:
    if image.mode != "P":
        return image.mode in _GRAY_MODES
    palette = image.getpalette() or []
    return palette[0::3] == palette[1::3] == palette[2::3]


def _pad(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    scale = min(size[0] / image.height, size[1] / image.width)
    height, width = max(1, round(image.height * scale)), max(1, round(image.width * scale))
    scaled = _scale(image, (height, width))
    if (height, width) == size:
        return scaled
    padded = Image.new(image.mode, size[::-1], _background(image))
    padded.paste(scaled, ((size[1] - width) // 2, (size[0] - height) // 2))
    return padded


def _background(image: Image.Image) -> tuple[int, ...]:
    """The median of the pixels along the border, channel by channel."""
    pixels = np.asarray(image).reshape(image.height, image.width, -1)
    border = np.concatenate([pixels[0], pixels[-1], pixels[1:-1, 0], pixels[1:-1, -1]])
    return tuple(np.sort(border, axis=0)[len(border) // 2].tolist())


def _crop(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    scale = max(size[0] / image.height, size[1] / image.width)
    height, width = min(size[0] / scale, image.height), min(size[1] / scale, image.width)  # min: rounding errors
    left, top = (image.width - width) / 2, (image.height - height) / 2
    return _scale(image, size, (left, top, left + width, top + height))


def _scale(
    image: Image.Image, size: tuple[int, int], box: tuple[float, float, float, float] | None = None
) -> Image.Image:
    return image.resize(size[::-1], Image.Resampling.BILINEAR, box)


_FITS = {"pad": _pad, "crop": _crop, "stretch": _scale}
