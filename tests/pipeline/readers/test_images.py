"""Picture files: their pixels are right, whatever their kind, and damaged ones are refused in bounded memory."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from support.image_files import turned_exif
from support.raw_files import in_a_process, picture, pixels, png_claiming, turned_without_exif_block

from pipeline.readers.archives.files import CorruptFileError
from pipeline.readers.formats.image import decode, header, make_record
from shards.stores import image_header
from shards.stores.base import EncodedImage
from shards.stores.image_header import ImageHeader, read_image_header

# As `pipeline.readers.formats.image` wants it; pytest puts its own filters in place of those of modules.
pytestmark = pytest.mark.filterwarnings("error::PIL.Image.DecompressionBombWarning")

GRAY, COLOR = pixels(channels=1), pixels(channels=3)
LOSSLESS = {"PNG": {}, "BMP": {}, "WEBP": {"lossless": True}}


def refused(content: bytes) -> str:
    with pytest.raises(CorruptFileError) as caught:
        decode(content, 1, None)
    return str(caught.value)


class TestPixels:
    @pytest.mark.parametrize("kind", LOSSLESS)
    def test_of_lossless_kinds_are_the_same(self, kind: str) -> None:
        np.testing.assert_array_equal(decode(picture(COLOR, kind, **LOSSLESS[kind]), 3, None), COLOR)
        np.testing.assert_array_equal(decode(picture(GRAY, kind, **LOSSLESS[kind]), 1, None), GRAY)

    @given(st.integers(1, 40), st.integers(1, 40), st.sampled_from([1, 3]), st.integers(0, 9))
    def test_of_any_size_survive_a_png(self, height: int, width: int, channels: int, seed: int) -> None:
        image = pixels(height, width, channels, seed)
        content = picture(image)
        assert header(content) == ImageHeader(height, width, gray=channels == 1)
        np.testing.assert_array_equal(decode(content, channels, None), image)
        assert make_record(content) == EncodedImage(content, "png")

    def test_of_a_tiff_of_12_bits_are_refused(self) -> None:
        """Pillow reads them without scaling them to 16 bits, which would be almost black."""
        content = bytearray(picture(np.full((4, 4), 4000, np.uint16), "TIFF"))
        entry = content.index(struct.pack("<HHI", 258, 3, 1))
        content[entry + 8 : entry + 10] = struct.pack("<H", 12)
        assert "a TIFF of 12 bits" in refused(bytes(content))

    def test_of_a_jpeg_are_close(self) -> None:
        smooth = np.add.outer(np.arange(16), np.arange(16)).astype(np.uint8)[..., None] * 8
        decoded = decode(picture(smooth, "JPEG", quality=95), 1, None)
        assert np.abs(decoded.astype(int) - smooth).max() <= 3

    def test_gray_is_stored_as_color_and_color_as_gray(self) -> None:
        np.testing.assert_array_equal(decode(picture(GRAY), 3, None), np.repeat(GRAY, 3, axis=2))
        luma = COLOR.astype(float) @ [0.299, 0.587, 0.114]  # ITU-R BT.601
        assert np.abs(decode(picture(COLOR), 1, None)[..., 0] - luma).max() <= 1

    def test_sixteen_bits_are_scaled(self) -> None:
        levels = np.array([[0, 128, 129, 256, 32768, 65406, 65407, 65535]], np.uint16)
        decoded = decode(picture(Image.fromarray(levels)), 1, None)
        assert decoded[0, :, 0].tolist() == [0, 0, 1, 1, 128, 254, 255, 255]

    def test_what_is_transparent_is_white(self) -> None:
        half = np.array([[[10, 20, 30, 255], [10, 20, 30, 0], [0, 0, 0, 128]]], np.uint8)
        assert decode(picture(half), 3, None)[0].tolist() == [[10, 20, 30], [255, 255, 255], [127, 127, 127]]
        gray = np.array([[[7, 255], [7, 0]]], np.uint8)
        assert decode(picture(gray), 1, None)[0, :, 0].tolist() == [7, 255]

    def test_a_transparent_color_of_a_palette_is_white(self) -> None:
        image = Image.new("P", (2, 1))
        image.putpalette([9, 9, 9, 200, 0, 0])
        image.putdata([0, 1])
        assert decode(picture(image, transparency=1), 3, None)[0].tolist() == [[9, 9, 9], [255, 255, 255]]

    def test_of_an_animation_are_the_first_frame(self) -> None:
        frames = [Image.fromarray(COLOR), Image.new("RGB", (8, 8))]
        content = picture(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)
        np.testing.assert_array_equal(decode(content, 3, None), COLOR)

    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_are_turned_as_exif_says(self, orientation: int) -> None:
        """The eight orientations of the EXIF standard: where row 0 and column 0 of the stored picture are seen."""
        image = pixels(4, 6, 3)
        seen = {
            1: image,
            2: image[:, ::-1],
            3: image[::-1, ::-1],
            4: image[::-1],
            5: image.swapaxes(0, 1),
            6: image.swapaxes(0, 1)[:, ::-1],
            7: image.swapaxes(0, 1)[::-1, ::-1],
            8: image.swapaxes(0, 1)[::-1],
        }[orientation]
        content = picture(image, exif=turned_exif(orientation))
        assert (header(content).height, header(content).width) == seen.shape[:2]
        np.testing.assert_array_equal(decode(content, 3, None), seen)

    @pytest.mark.parametrize("name", turned_without_exif_block(Image.fromarray(COLOR)))
    def test_are_turned_as_xmp_and_texts_say(self, name: str) -> None:
        image = pixels(16, 24, 3)
        content = turned_without_exif_block(Image.fromarray(image))[name]
        seen = decode(content, 3, None)
        assert (header(content).height, header(content).width) == seen.shape[:2] == (24, 16)
        record = make_record(content)
        assert record.extension == "png" and record.content != content, "DALI would not turn the file"
        np.testing.assert_array_equal(image_header.decode(record.content, 3), seen)


class TestHeaders:
    @pytest.mark.parametrize("mode", ["1", "L", "LA", "I;16", "P"])
    def test_gray_kinds_are_gray(self, mode: str) -> None:
        gray = Image.fromarray(GRAY[..., 0])
        image = Image.fromarray(GRAY[..., 0].astype(np.uint16)) if mode == "I;16" else gray.convert(mode)
        assert header(picture(image)).gray

    @pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
    def test_color_kinds_are_not(self, mode: str) -> None:
        assert not header(picture(Image.fromarray(COLOR).convert(mode))).gray

    def test_cmyk_is_color(self) -> None:
        assert not header(picture(Image.fromarray(COLOR).convert("CMYK"), "JPEG")).gray


class TestFit:
    def test_the_size_that_it_has_changes_nothing(self) -> None:
        for fit in ("pad", "crop", "stretch"):
            np.testing.assert_array_equal(decode(picture(COLOR), 3, (8, 8), fit), COLOR)

    @pytest.mark.parametrize("ink, paper", [(255, 0), (0, 255), (30, 200)])
    def test_pad_keeps_all_and_fills_with_the_background(self, ink: int, paper: int) -> None:
        image = np.full((20, 10, 1), paper, np.uint8)
        image[4:16, 3:7] = ink
        image[0, 0] = ink  # a speck on the border does not count
        padded = decode(picture(image), 1, (20, 20), "pad")
        assert (padded[:, :5] == paper).all() and (padded[:, 15:] == paper).all()
        np.testing.assert_array_equal(padded[:, 5:15], image)

    def test_pad_fills_each_channel(self) -> None:
        image = np.full((4, 8, 3), (10, 20, 30), np.uint8)
        assert np.unique(decode(picture(image), 3, (8, 8), "pad").reshape(-1, 3), axis=0).tolist() == [[10, 20, 30]]

    def test_crop_takes_the_middle(self) -> None:
        image = pixels(8, 20, 3)
        np.testing.assert_array_equal(decode(picture(image), 3, (8, 8), "crop"), image[:, 6:14])

    def test_stretch_takes_all(self) -> None:
        image = np.repeat(np.array([0, 200], np.uint8), 16)[None, :, None].repeat(4, axis=0)
        stretched = decode(picture(image), 1, (8, 8), "stretch")
        assert stretched.shape == (8, 8, 1)
        assert (stretched[:, 0] == 0).all() and (stretched[:, -1] == 200).all()

    def test_reducing_averages(self) -> None:
        """Antialiased: a fine checkerboard becomes gray."""
        board = (np.indices((64, 64)).sum(axis=0) % 2 * 255).astype(np.uint8)[..., None]
        assert np.abs(decode(picture(board), 1, (8, 8), "stretch").astype(int) - 128).max() <= 2

    def test_a_thin_picture_keeps_a_pixel(self) -> None:
        assert decode(picture(pixels(1, 500)), 1, (8, 8), "pad").shape == (8, 8, 1)
        assert decode(picture(pixels(500, 1)), 1, (8, 8), "crop").shape == (8, 8, 1)

    @given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 20), st.integers(1, 20))
    def test_any_picture_gets_any_size(self, height: int, width: int, to_height: int, to_width: int) -> None:
        content = picture(np.full((height, width, 1), 77, np.uint8))
        for fit in ("pad", "crop", "stretch"):
            image = decode(content, 1, (to_height, to_width), fit)
            assert image.shape == (to_height, to_width, 1)
            assert (image == 77).all()

    def test_a_large_jpeg_decoded_smaller_looks_the_same(self) -> None:
        """The fast way (decoding at a fraction of the size) against the slow one."""
        rows, columns = np.indices((512, 640))
        image = np.stack([rows // 2, columns // 3, (rows + columns) // 5], axis=2).astype(np.uint8)
        content = picture(image, "JPEG", quality=95)
        slow = np.asarray(Image.fromarray(decode(content, 3, None)).resize((32, 32), Image.Resampling.BILINEAR))
        fast = decode(content, 3, (32, 32), "stretch")
        assert np.abs(fast.astype(int) - slow).max() <= 4


class TestBadPictures:
    @pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "GIF"])
    def test_a_cut_one_is_refused_wherever_it_is_cut(self, kind: str) -> None:
        content = picture(COLOR, kind)
        end = -2 if kind == "GIF" else 0  # all of a GIF's picture is there before its two end marks
        for kept in range(len(content) + end):
            with pytest.raises(CorruptFileError):
                decode(content[:kept], 3, (16, 16))

    def test_a_changed_byte_of_a_png_is_refused(self) -> None:
        content = picture(COLOR)
        for place in range(len(content)):
            damaged = bytearray(content)
            damaged[place] ^= 0x10
            try:
                np.testing.assert_array_equal(decode(bytes(damaged), 3, None), COLOR)
            except CorruptFileError:
                continue

    @given(st.sampled_from(["PNG", "JPEG", "WEBP", "BMP", "GIF"]), st.data())
    def test_whatever_is_changed_nothing_but_a_refusal_comes_of_it(self, kind: str, data: st.DataObject) -> None:
        content = bytearray(picture(COLOR, kind))
        for _ in range(data.draw(st.integers(1, 6))):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
        try:
            assert decode(bytes(content), 3, (8, 8)).shape == (8, 8, 3)
        except CorruptFileError as error:
            assert str(error)

    @given(st.binary(max_size=200))
    def test_noise_is_refused(self, content: bytes) -> None:
        for head in (b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"BM", b"RIFF\x10\0\0\0WEBP", b"GIF89a"):
            for read in (header, make_record):
                try:
                    read(head + content)
                except CorruptFileError as error:
                    assert str(error)

    @pytest.mark.parametrize(
        "content", [b"", b"not a picture", b"<html></html>", b"\x80\x04\x95cos\nsystem\n(S'true'\ntR.", b"%PDF-1.4"]
    )
    def test_something_else_is_told_from_a_picture(self, content: bytes) -> None:
        assert refused(content) == "not a PNG, JPEG, WebP, BMP, GIF or TIFF image"

    def test_kinds_that_are_not_listed_are_refused(self) -> None:
        """Pillow knows many more, some of which run other programs."""
        for kind in ("PPM", "ICO", "EPS"):
            assert "not a PNG" in refused(picture(COLOR, kind))

    @pytest.mark.parametrize("height, width", [(60_000, 60_000), (8193, 8192), (1, 0x7FFFFFFF)])
    def test_a_picture_that_claims_to_be_huge_is_refused(self, height: int, width: int) -> None:
        assert "pixels" in refused(png_claiming(height, width))
        with pytest.raises(CorruptFileError, match="pixels"):
            header(png_claiming(height, width))

    def test_a_bomb_takes_no_memory(self) -> None:
        """The claimed pixels would be 3.6 GB."""
        code = """
from support.raw_files import png_claiming
from pipeline.readers.archives.files import CorruptFileError
from pipeline.readers.formats.image import decode, header, make_record
for read in (header, make_record, lambda content: decode(content, 3, (32, 32))):
    try:
        read(png_claiming(60_000, 60_000))
    except CorruptFileError as error:
        print(error)
"""
        lines, memory = in_a_process(code)
        assert len(lines) == 3 and all("pixels" in line for line in lines)
        assert memory < 400

    def test_a_text_that_grows_without_end_is_refused(self) -> None:
        """A compressed comment of a gigabyte inside a small PNG."""
        content = picture(GRAY)
        text = b"Comment\0\0" + zlib.compress(bytes(1 << 27))
        chunk = struct.pack(">I", len(text)) + b"zTXt" + text + struct.pack(">I", zlib.crc32(b"zTXt" + text))
        assert "text" in refused(content[:33] + chunk + content[33:]).lower()


class TestRecords:
    @pytest.mark.parametrize("kind, extension", [("PNG", "png"), ("JPEG", "jpg"), ("WEBP", "webp"), ("BMP", "bmp")])
    def test_plain_files_are_kept(self, kind: str, extension: str) -> None:
        content = picture(COLOR, kind)
        assert make_record(content) == EncodedImage(content, extension)

    @pytest.mark.parametrize("kind", ["GIF", "TIFF"])
    @pytest.mark.parametrize("image", [GRAY, COLOR], ids=["gray", "color"])
    def test_kinds_that_dali_cannot_decode_become_png(self, kind: str, image: NDArray) -> None:
        record = make_record(picture(image, kind))
        assert record.extension == "png" and read_image_header(record.content).gray == (image is GRAY)
        shown = decode(picture(image, kind), image.shape[2], None)
        np.testing.assert_array_equal(image_header.decode(record.content, image.shape[2]), shown)

    def test_a_bmp_of_another_header_becomes_png(self) -> None:
        bmp = picture(COLOR, "BMP")
        content = bmp[:2] + struct.pack("<IIIIHHHH", len(bmp) - 28, 0, 26, 12, 8, 8, 1, 24) + bmp[54:]
        record = make_record(content)
        assert record.extension == "png"
        np.testing.assert_array_equal(image_header.decode(record.content, 3), COLOR)

    def test_transparency_becomes_white(self) -> None:
        clear = np.concatenate([COLOR, np.full((8, 8, 1), 255, np.uint8)], axis=2)
        clear[3, 3, 3] = 0
        expected = COLOR.copy()
        expected[3, 3] = 255
        np.testing.assert_array_equal(image_header.decode(make_record(picture(clear)).content, 3), expected)

    def test_a_cut_one_is_refused(self) -> None:
        for kind in ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF"):
            with pytest.raises(CorruptFileError):
                make_record(picture(COLOR, kind)[:-20])


class TestTiff:
    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_is_turned_as_it_says(self, orientation: int) -> None:
        exif = Image.Exif()
        exif[0x0112] = orientation
        image = pixels(4, 6, 3)
        expected = decode(picture(image, exif=turned_exif(orientation)), 3, None)
        content = picture(image, "TIFF", exif=exif)
        np.testing.assert_array_equal(decode(content, 3, None), expected)
        assert (header(content).height, header(content).width) == expected.shape[:2]

    def test_of_sixteen_bits_is_scaled(self) -> None:
        levels = np.array([[0, 129, 65535]], np.uint16)
        assert decode(picture(Image.fromarray(levels), "TIFF"), 1, None)[0, :, 0].tolist() == [0, 1, 255]

    def test_of_several_pages_or_floats_is_refused(self) -> None:
        page = Image.fromarray(COLOR)
        assert "a TIFF of 3 pages" in refused(picture(page, "TIFF", save_all=True, append_images=[page, page]))
        assert "floats" in refused(picture(Image.fromarray(GRAY[..., 0].astype(np.float32)), "TIFF"))
        assert "32 bits" in refused(picture(Image.fromarray(GRAY[..., 0].astype(np.int32)), "TIFF"))

    def test_of_sixteen_bits_from_white_is_refused(self) -> None:
        content = picture(Image.fromarray(np.array([[0, 129, 65535]], np.uint16)), "TIFF")
        photometric = struct.pack("<HHIH", 0x0106, 3, 1, 1)
        assert content.count(photometric) == 1
        assert "in which 0 is white" in refused(content.replace(photometric, photometric[:-2] + b"\0\0"))


def test_genuine_pictures_have_the_pixels_that_pillow_sees(shared_data: Path) -> None:
    import io
    import zipfile

    with zipfile.ZipFile(shared_data / "cifar10" / "cifar10-jpg-subset.zip") as archive:
        for name in archive.namelist()[::1000]:
            content = archive.read(name)
            expected = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
            np.testing.assert_array_equal(decode(content, 3, None), expected)
            assert header(content) == ImageHeader(32, 32, gray=False)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(("kind", "is_plain"), [(1, False), (3, True), (4, True), (9, False)])
def test_an_orientation_of_another_type_is_not_plain(order: str, kind: int, is_plain: bool) -> None:
    """DALI and Pillow differ about an orientation that is stored as a byte."""
    value = struct.pack(f"{order}H2x", 6) if kind == 3 else struct.pack(f"{order}I", 6)
    if kind == 1:
        value = b"\6\0\0\0"
    head = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HI", 42, 8)
    exif = b"Exif\0\0" + head + struct.pack(f"{order}HHHI", 1, 0x0112, kind, 1) + value + bytes(4)
    content = picture(pixels(8, 12, 3), "JPEG", exif=exif)
    assert read_image_header(content).plain == is_plain
    assert (make_record(content).extension == "jpg") == is_plain
