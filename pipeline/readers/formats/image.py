"""Picture files: what they are by their headers, and their pixels at one size. PNG, JPEG, WebP, BMP and GIF.

A picture is turned as its EXIF orientation says, laid over white where it is transparent, and scaled to 8 bits; of an
animation it is the first frame. Truncated files are refused. A changed byte is noticed where the format has checksums
(PNG) or where it breaks the coding; in a JPEG, WebP or BMP it may pass.
"""

from __future__ import annotations

import io
import warnings

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from pipeline.readers.archives.files import CorruptFileError
from shards.errors import first_line
from shards.stores.image_header import MAX_BYTES, MAX_PIXELS, ImageHeader, read_image_header, to_8_bits

EXTENSIONS = frozenset({"png", "jpg", "jpeg", "jpe", "jfif", "webp", "bmp", "gif"})
# Pictures that are not read: to be told of, where a README is passed over.
OTHER_EXTENSIONS = frozenset({"tif", "tiff", "jp2", "avif", "heic", "heif", "jxl", "svg", "ppm", "pgm", "pbm", "dcm"})
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")
_RECORD_EXTENSIONS = {"PNG": "png", "JPEG": "jpg", "MPO": "jpg", "WEBP": "webp", "BMP": "bmp"}  # DALI decodes them too
_PNG_END = b"IEND\xaeB`\x82"
_ORIENTATION = 0x0112  # EXIF; 5 to 8 exchange height and width
_GRAY_MODES = {"1", "L", "LA", "La", "I;16", "I;16B", "I;16L", "I"}

# What it warns of is more than MAX_PIXELS, and refused; the warning alone would only be printed.
warnings.simplefilter("error", Image.DecompressionBombWarning)


def header(content: bytes) -> ImageHeader:
    """The header of an image file, with height and width as it is to be seen: after the rotation that EXIF asks for.

    Raises:
        CorruptFileError: If it is no image that can be read.
    """
    image = _open(content)
    try:
        # Asking for EXIF that is not there makes Pillow decode a whole PNG to look behind its pixels.
        turned = "exif" in image.info and image.getexif().get(_ORIENTATION, 1) in (5, 6, 7, 8)
        height, width = (image.width, image.height) if turned else (image.height, image.width)
        return ImageHeader(height=height, width=width, gray=_is_gray(image))
    except Exception as error:  # see _open
        raise _bad(error) from None


def decode(content: bytes, channels: int, size: tuple[int, int] | None, fit: str = "pad") -> NDArray[np.uint8]:
    """The pixels of a picture file, uint8 [H, W, channels]; 1 channel for gray, 3 for RGB. Raises `CorruptFileError`.

    size: (H, W) to bring it to, None for its own. fit: `pad` keeps all of the picture and its proportions and fills
    the rest with the median of the picture's border, most likely its background, white or black; `crop` keeps the
    proportions and cuts off what is too much, the same at both sides; `stretch` does neither. Scaling is linear, with
    antialiasing where the picture gets smaller.
    """
    image = _open(content)
    mode = "L" if channels == 1 else "RGB"
    try:
        if size is not None:
            # A large JPEG is decoded at a half, a quarter or an eighth, still twice as large as needed.
            image.draft(mode if image.mode in ("L", "RGB") else None, (2 * max(size), 2 * max(size)))
        image.load()
        _check_end(image, content)
        ImageOps.exif_transpose(image, in_place=True)
        image = _convert(image, mode)
    except Exception as error:  # see _open
        raise _bad(error) from None
    if size is not None and image.size != size[::-1]:
        image = _FITS[fit](image, size)
    return np.asarray(image).reshape(image.height, image.width, channels)


def check_record(content: bytes) -> str:
    """The extension of a picture file that may be stored as it is: it decodes, by DALI too, to the same picture.

    Raises `CorruptFileError`.
    """
    image = _open(content)
    if image.format not in _RECORD_EXTENSIONS:
        raise CorruptFileError(f"a {image.format}, which cannot be stored as a record; convert it to PNG")
    try:
        read_image_header(content)  # as it will be when the record is read
        image.load()
        _check_end(image, content)
        transparent = image.has_transparency_data and image.convert("RGBA").getextrema()[3][0] < 255
    except Exception as error:  # see _open
        raise _bad(error) from None
    if transparent:
        raise CorruptFileError("it is transparent, which decoders of records do not heed; lay it over a background")
    return _RECORD_EXTENSIONS[image.format]


def _open(content: bytes) -> Image.Image:
    """An image whose header is read. Decoders meet damaged files with any kind of exception, so all are caught."""
    if len(content) > MAX_BYTES:
        raise CorruptFileError(f"of {len(content):,} bytes; a picture file may have {MAX_BYTES:,}")
    try:
        image = Image.open(io.BytesIO(content), formats=_FORMATS)
    except Exception as error:
        raise _bad(error) from None
    width, height = image.size
    if not 0 < width * height <= MAX_PIXELS:
        raise CorruptFileError(f"of {height} x {width} pixels; a picture may have 1 to {MAX_PIXELS:,} pixels in all")
    return image


def _bad(error: Exception) -> CorruptFileError:
    if isinstance(error, CorruptFileError):
        return error
    if isinstance(error, Image.UnidentifiedImageError):
        return CorruptFileError("not a PNG, JPEG, WebP, BMP or GIF picture")
    return CorruptFileError(first_line(error))


def _check_end(image: Image.Image, content: bytes) -> None:
    """Pillow is content with a PNG that ends after its last pixel."""
    if image.format == "PNG" and _PNG_END not in content:
        raise CorruptFileError("it is truncated")


def _is_gray(image: Image.Image) -> bool:
    if image.mode != "P":
        return image.mode in _GRAY_MODES
    palette = image.getpalette() or []
    return palette[0::3] == palette[1::3] == palette[2::3]


def _convert(image: Image.Image, mode: str) -> Image.Image:
    image = to_8_bits(image)
    if image.has_transparency_data:
        picture = image.convert("RGBA")
        image = Image.new("RGBA", picture.size, "white")
        image.alpha_composite(picture)
    return image if image.mode == mode else image.convert("RGB").convert(mode)


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
    height, width = min(size[0] / scale, image.height), min(size[1] / scale, image.width)  # but for rounding it is less
    left, top = (image.width - width) / 2, (image.height - height) / 2
    return _scale(image, size, (left, top, left + width, top + height))


def _scale(
    image: Image.Image, size: tuple[int, int], box: tuple[float, float, float, float] | None = None
) -> Image.Image:
    return image.resize(size[::-1], Image.Resampling.BILINEAR, box)


_FITS = {"pad": _pad, "crop": _crop, "stretch": _scale}
