"""What the first bytes of a picture file tell, held against Pillow; and its pixels."""

from __future__ import annotations

import io
import struct
import tracemalloc
import zlib
from collections.abc import Iterable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageCms
from support.raw_files import picture, pixels

from shards.stores.image_header import MAX_PIXELS, ImageHeader, decode, read_image_header

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def rotated(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


KINDS = {
    "JPEG": ("JPEG", {}),
    "progressive": ("JPEG", {"progressive": True}),
    "JPEG with all": ("JPEG", {"icc_profile": SRGB, "comment": b"x" * 70, "exif": rotated(1)}),
    "PNG": ("PNG", {}),
    "PNG with all": ("PNG", {"icc_profile": SRGB, "dpi": (72, 72)}),
    "WebP": ("WEBP", {}),
    "lossless WebP": ("WEBP", {"lossless": True}),
    "WebP with profile": ("WEBP", {"icc_profile": SRGB}),
    "BMP": ("BMP", {}),
}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(1, 1), (7, 300), (300, 7), (129, 64)])
def test_headers_are_as_pillow_reads_them(kind: str, size: tuple[int, int], channels: int) -> None:
    form, options = KINDS[kind]
    content = picture(pixels(*size, channels), form, **options)
    expected = Image.open(io.BytesIO(content))
    assert read_image_header(content) == ImageHeader(expected.height, expected.width, gray=expected.mode == "L")
    assert read_image_header(np.frombuffer(content, np.uint8)) == read_image_header(content)


@pytest.mark.parametrize(("mode", "gray"), [("1", True), ("L", True), ("LA", True), ("RGBA", False), ("P", False)])
def test_modes_of_png_tell_whether_there_is_colour(mode: str, gray: bool) -> None:
    image = Image.fromarray(pixels(5, 6, 3)).convert(mode)
    assert read_image_header(picture(image)) == ImageHeader(5, 6, gray)


def test_a_bmp_of_few_colours_is_gray_if_they_are() -> None:
    assert read_image_header(picture(Image.fromarray(pixels(5, 6, 3)).convert("P"), "BMP")).gray is False
    assert read_image_header(picture(Image.fromarray(pixels(5, 6, 3)).convert("1"), "BMP")).gray is True


def test_bytes_that_fill_a_jpeg_header_are_passed_over() -> None:
    content = picture(pixels(5, 6, 3), "JPEG")
    assert read_image_header(content[:2] + b"\xff" * 7 + content[2:]) == ImageHeader(5, 6, False)


@pytest.mark.parametrize("kind", KINDS)
def test_a_picture_that_ends_too_soon_is_refused_or_says_the_same(kind: str) -> None:
    form, options = KINDS[kind]
    content = picture(pixels(20, 33, 3), form, **options)
    whole = read_image_header(content)
    ends = 0
    for length in range(len(content)):
        try:
            assert read_image_header(content[:length]) == whole
        except ValueError as error:
            ends += 1
            assert length < 2 or "ends inside its header" in str(error) or "begins with" in str(error)
    assert ends > 20


@pytest.mark.parametrize(
    ("form", "places"),
    [("JPEG", range(3)), ("PNG", range(8)), ("WEBP", [0, 1, 2, 3, 8, 9, 10, 11]), ("BMP", range(2))],
)
def test_a_format_is_known_by_all_bytes_of_its_signature(form: str, places: Iterable[int]) -> None:
    content = picture(pixels(20, 33, 3), form)
    for place in places:
        for step in (-1, 1):
            changed = bytearray(content)
            changed[place] = (changed[place] + step) % 256
            with pytest.raises(ValueError, match="begins with"):
                read_image_header(bytes(changed))


@given(
    st.binary(max_size=60),
    st.sampled_from([b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF\0\0\0\0WEBPVP8X", b"BM", b""]),
)
def test_any_bytes_are_a_header_or_a_value_error(rest: bytes, start: bytes) -> None:
    try:
        header = read_image_header(start + rest)
    except ValueError as error:
        assert str(error)
    else:
        assert header.width * header.height <= MAX_PIXELS


@pytest.mark.parametrize("kind", KINDS)
def test_any_changed_byte_is_a_header_or_a_value_error(kind: str) -> None:
    form, options = KINDS[kind]
    content = picture(pixels(20, 33, 3), form, **options)
    for place in range(min(len(content), 700)):
        for bits in (0x01, 0xFF):
            changed = bytearray(content)
            changed[place] ^= bits
            try:
                read_image_header(bytes(changed))
            except ValueError as error:
                assert str(error)


@pytest.mark.parametrize(("width", "height"), [(60_000, 60_000), (2**31 - 1, 2**31 - 1), (MAX_PIXELS + 1, 1), (0, 9)])
def test_a_picture_that_claims_too_much_takes_no_memory(width: int, height: int) -> None:
    content = bytearray(picture(pixels(4, 4, 3)))
    content[16:24] = struct.pack(">II", width, height)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=f"a picture of {height} x {width} pixels"):
            decode(bytes(content), 3)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("form", ["PNG", "BMP"])
def test_pixels_are_those_that_were_stored(form: str, channels: int) -> None:
    image = pixels(9, 14, channels)
    assert np.array_equal(decode(picture(image, form), channels), image)


def test_a_gray_picture_becomes_one_of_three_equal_channels() -> None:
    image = pixels(9, 14, 1)
    assert np.array_equal(decode(picture(image), 3), np.repeat(image, 3, axis=2))


def test_sixteen_bits_are_scaled_and_not_cut_off() -> None:
    levels = np.array([[0, 128, 129, 257, 32768, 65279, 65535]], np.uint16)
    assert decode(picture(Image.fromarray(levels)), 1)[0, :, 0].tolist() == [0, 0, 1, 1, 128, 254, 255]


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
def test_pictures_are_turned_as_exif_asks(form: str) -> None:
    image = np.zeros((16, 32, 3), np.uint8)
    image[:, 16:] = 255  # bright at the right; turned clockwise by 90 degrees, at the bottom
    turned = decode(picture(image, form, exif=rotated(6)), 3)
    assert turned.shape == (32, 16, 3)
    assert turned[:12].max() < 20 and turned[20:].min() > 235


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "BMP"])
def test_half_a_picture_cannot_be_decoded(form: str) -> None:
    content = picture(pixels(40, 40, 3), form)
    with pytest.raises(ValueError, match="cannot be decoded"):
        decode(content[: len(content) // 2], 3)


@pytest.mark.parametrize("form", ["GIF", "TIFF", "PPM", "ICO", "EPS", "PDF"])
def test_other_formats_are_not_even_tried(form: str) -> None:
    with pytest.raises(ValueError, match="no JPEG, PNG, WebP or BMP picture"):
        decode(picture(pixels(20, 20, 3), form), 3)
