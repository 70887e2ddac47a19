"""Training decodes image files to the pixels that previews show, whatever the variant of the format."""

from __future__ import annotations

import struct

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, ImageCms
from PIL.PngImagePlugin import PngInfo
from support.raw_files import picture, turned_without_exif_block

from pipeline.readers.formats import image as image_format
from pipeline.transforms.dali_backend import DaliEncodedTransform
from pipeline.transforms.spec import TransformSpec, UndecodableImage
from shards.stores.image_header import decode, read_image_header

SIDE = 24
Y, X = np.mgrid[0:SIDE, 0:SIDE]
RGB = np.stack([X * 10, Y * 10, (X + Y) * 5], -1).astype(np.uint8)
COLOR, GRAY = Image.fromarray(RGB), Image.fromarray(RGB[..., 2])
ALPHA = COLOR.copy()
ALPHA.putalpha(GRAY)
OTHERS = [COLOR.rotate(90)]
DEEP = Image.fromarray(RGB[..., 2].astype(np.uint16) * 257 + 100)
LAB = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()


def exif(orientation: int, order: str = "<") -> Image.Exif:
    result = Image.Exif()
    result.endian = order
    result[0x0112] = orientation
    return result


def chunk(kind: bytes, *values: int) -> PngInfo:
    info = PngInfo()
    info.add(kind, struct.pack(f">{len(values)}I", *values))
    return info


def without_marker(content: bytes, marker: int) -> bytes:
    """A JPEG without one of its segments."""
    start = content.index(bytes([0xFF, marker]))
    return content[:start] + content[start + 2 + int.from_bytes(content[start + 2 : start + 4], "big") :]


def with_segment(content: bytes, marker: int, data: bytes) -> bytes:
    """A JPEG with a segment in front of all others."""
    return content[:2] + bytes([0xFF, marker]) + struct.pack(">H", len(data) + 2) + data + content[2:]


JPEG = picture(COLOR, "JPEG", subsampling="4:4:4")
PLAIN = {
    "JPEG": JPEG,
    "JPEG 4:2:2": picture(COLOR, "JPEG", subsampling="4:2:2"),
    "JPEG 4:2:0 progressive": picture(COLOR, "JPEG", subsampling="4:2:0", progressive=True),
    "JPEG with restart markers": picture(COLOR, "JPEG", restart_marker_blocks=2),
    "JPEG of a camera, without JFIF": without_marker(picture(COLOR, "JPEG", exif=exif(1)), 0xE0),
    "JPEG with a profile": picture(COLOR, "JPEG", icc_profile=LAB),
    "JPEG gray progressive": picture(GRAY, "JPEG", progressive=True),
    **{f"JPEG orientation {n}": picture(COLOR, "JPEG", exif=exif(n, "<>"[n % 2])) for n in range(1, 9)},
    "JPEG with XMP before EXIF": with_segment(
        picture(COLOR, "JPEG", exif=exif(6)), 0xE1, b"http://ns.adobe.com/xap/1.0/\0<x/>"
    ),
    "PNG": picture(COLOR),
    "PNG gray": picture(GRAY),
    "WebP": picture(COLOR, "WEBP"),
    "WebP lossless": picture(COLOR, "WEBP", lossless=True),
    "BMP": picture(COLOR, "BMP"),
}
CMYK = picture(Image.merge("CMYK", [*COLOR.split(), GRAY]), "JPEG")
OTHER = {
    "JPEG CMYK": CMYK,
    "JPEG CMYK without Adobe": without_marker(CMYK, 0xEE),
    "JPEG RGB": picture(COLOR, "JPEG", keep_rgb=True),
    "JPEG RGB without Adobe": without_marker(picture(COLOR, "JPEG", keep_rgb=True), 0xEE),
    "JPEG with two EXIF": with_segment(picture(COLOR, "JPEG", exif=exif(6)), 0xE1, exif(8).tobytes()),
    "JPEG with bytes behind": JPEG + bytes(9),
    "PNG palette": picture(COLOR.convert("P")),
    "PNG palette with transparency": picture(COLOR.convert("P"), transparency=3),
    "PNG of 1 bit": picture(GRAY.convert("1")),
    "PNG of 16 bits": picture(DEEP),
    "PNG gray with alpha": picture(ALPHA.convert("LA")),
    "PNG with alpha": picture(ALPHA),
    "PNG with a transparent color": picture(COLOR, transparency=(0, 0, 0)),
    "PNG with a profile": picture(COLOR, icc_profile=LAB),
    "PNG with gamma": picture(COLOR, pnginfo=chunk(b"gAMA", 100000)),
    "PNG with chromaticities": picture(
        COLOR, pnginfo=chunk(b"cHRM", 31270, 32900, 64000, 33000, 30000, 60000, 15000, 6000)
    ),
    "PNG turned": picture(COLOR, exif=exif(6)),
    **turned_without_exif_block(COLOR),
    "PNG animated": picture(COLOR, save_all=True, append_images=OTHERS),
    "WebP with EXIF": picture(COLOR, "WEBP", exif=exif(6)),
    "WebP with alpha": picture(ALPHA, "WEBP", lossless=True),
    "WebP animated": picture(COLOR, "WEBP", save_all=True, append_images=OTHERS),
    "BMP gray": picture(GRAY, "BMP"),
    "BMP of 1 bit": picture(GRAY.convert("1"), "BMP"),
    "BMP palette": picture(COLOR.convert("P"), "BMP"),
    "BMP of 32 bits": picture(ALPHA, "BMP"),
    "BMP from the top": b"".join(
        (
            picture(COLOR, "BMP")[:22],
            struct.pack("<i", -SIDE),
            picture(COLOR.transpose(Image.Transpose.FLIP_TOP_BOTTOM), "BMP")[26:],
        )
    ),
}


@pytest.fixture(scope="module")
def transforms() -> dict[int, DaliEncodedTransform]:
    made = {}
    for channels in (1, 3):
        zeros, ones = (0.0,) * channels, (1.0,) * channels
        spec = TransformSpec((None, None, channels), False, SIDE, "linear", zeros, ones)
        made[channels] = DaliEncodedTransform(spec, torch.device("cpu"), len(PLAIN) + len(OTHER))
    return made


def trained_on(transform: DaliEncodedTransform, contents: list[bytes]) -> NDArray[np.uint8]:
    batch = transform([np.frombuffer(content, np.uint8) for content in contents])
    return (batch * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize("channels", [1, 3])
def test_training_sees_what_previews_show(transforms: dict[int, DaliEncodedTransform], channels: int) -> None:
    """In adopted shards, whose files stay as they are."""
    files = {**PLAIN, **OTHER}
    seen = trained_on(transforms[channels], list(files.values()))
    for (name, content), pixels in zip(files.items(), seen, strict=True):
        shown = decode(content, channels)
        # Color becomes gray by other roundings.
        exact = channels == 3 or read_image_header(content).gray or name in OTHER
        assert np.abs(pixels.astype(int) - shown).max() <= (0 if exact else 1), name


def test_packed_records_are_what_previews_show(transforms: dict[int, DaliEncodedTransform]) -> None:
    files = {**PLAIN, **OTHER}
    records = [image_format.make_record(content) for content in files.values()]
    seen = trained_on(transforms[3], [record.content for record in records])
    for (name, content), record, pixels in zip(files.items(), records, seen, strict=True):
        assert (record.content == content) == (name in PLAIN), name
        assert read_image_header(record.content).plain, name
        np.testing.assert_array_equal(pixels, image_format.decode(content, 3, None), err_msg=name)


def test_what_previews_show_is_right() -> None:
    """Not only equal: the scene, independently of any decoder."""
    lossless = ["PNG", "WebP lossless", "BMP", "BMP from the top", "PNG with gamma", "PNG animated"]
    for name in lossless:
        np.testing.assert_array_equal(decode({**PLAIN, **OTHER}[name], 3), RGB, err_msg=name)
    np.testing.assert_array_equal(decode(OTHER["PNG turned"], 3), np.rot90(RGB, -1))
    alpha = RGB[..., 2:].astype(float) / 255
    white = np.abs(decode(OTHER["PNG with alpha"], 3) - (RGB * alpha + 255 * (1 - alpha)))
    assert white.max() <= 1
    inks = Image.merge("CMYK", [*COLOR.split(), GRAY])
    assert np.abs(decode(CMYK, 3).astype(int) - np.asarray(inks.convert("RGB"))).mean() < 6


@pytest.mark.parametrize("name", ["JPEG", "PNG", "WebP", "BMP"])
def test_half_a_file_is_named_and_not_trained_on(transforms: dict[int, DaliEncodedTransform], name: str) -> None:
    half = PLAIN[name][: len(PLAIN[name]) * 2 // 3]
    with pytest.raises(UndecodableImage) as caught:
        trained_on(transforms[3], [PLAIN["PNG"], half])
    assert caught.value.position == 1
