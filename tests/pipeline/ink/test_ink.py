"""Ink is found in pictures of any kind, and laid as the images of the set have it."""

from __future__ import annotations

import gzip
import io
from pathlib import Path

import numpy as np
import pytest
from conftest import pack_splits, synthetic_splits
from numpy.typing import NDArray
from PIL import Image

from pipeline.datasets import find_source
from pipeline.ink.adapter import InputAdapter
from pipeline.ink.geometry import SCAN_SIDE, Ink, InkFrame, NoInkError, find_ink, frame_ink
from pipeline.ink.shading import remove_shading
from pipeline.readers.archives.files import CorruptFileError
from pipeline.readers.raw_split import SourceOptions
from pipeline.transforms.ops.resize import resize_weights
from shards import open_split

_SIDE = 28 * SCAN_SIDE / (SCAN_SIDE + 10)
EMNIST = InkFrame(True, False, _SIDE, (0.0, 0.0), 0.75 * _SIDE, 1.2 * _SIDE, 1.5)  # as the paper has it


def stroke(height: int, width: int, box: tuple[int, int, int, int], ink: int = 0, paper: int = 255) -> NDArray:
    """A letter L of a third of its box's width: uint8 [height, width]."""
    picture = np.full((height, width), paper, np.uint8)
    top, bottom, left, right = box
    thick = max(1, (right - left) // 3)
    picture[top:bottom, left : left + thick] = ink
    picture[bottom - thick : bottom, left:right] = ink
    return picture


def slow_frame(ink: Ink, frame: InkFrame, size: int) -> NDArray[np.float64]:
    """The definition, pixel by pixel in float64: scaled to the scan, blurred with sigma 1, resized by the cubic."""
    scan_size = round(size * SCAN_SIDE / frame.side)
    scan = scan_size / size
    zoom = frame.side / ink.side * scan
    width = max(1.0, 1 / zoom)
    centre = ink.centre(frame.by_mass)

    def pixel(row: int, column: int) -> float:
        return ink.values[row, column] if 0 <= row < len(ink.values) and 0 <= column < len(ink.values[0]) else 0.0

    def taps(place: float) -> list[tuple[int, float]]:
        around = range(int(np.floor(place - width)) - 1, int(np.ceil(place + width)) + 2)
        weights = [(one, max(0.0, 1 - abs(one + 0.5 - place) / width)) for one in around]
        total = sum(weight for _, weight in weights)
        return [(one, weight / total) for one, weight in weights if weight]

    def source(number: int, axis: int) -> float:
        return centre[axis] + ((number + 0.5 - scan_size / 2) / scan - frame.centre[axis]) / (zoom / scan)

    scanned = np.zeros((scan_size, scan_size))
    for y in range(scan_size):
        for x in range(scan_size):
            for row, down in taps(source(y, 0)):
                for column, across in taps(source(x, 1)):
                    scanned[y, x] += down * across * pixel(row, column)
    norm = sum(np.exp(-(d**2) / 2) for d in range(-4, 5))
    blurred = np.zeros_like(scanned)
    for y in range(scan_size):
        for x in range(scan_size):
            for dy in range(-4, 5):
                for dx in range(-4, 5):
                    if 0 <= y + dy < scan_size and 0 <= x + dx < scan_size:
                        blurred[y, x] += np.exp(-(dy**2 + dx**2) / 2) / norm**2 * scanned[y + dy, x + dx]
    cubic = resize_weights(scan_size, size, "cubic")
    laid = (cubic @ blurred @ cubic.T).clip(0, None)
    return laid * 255 / laid.max()


@pytest.mark.parametrize(
    ("shape", "box", "frame"),
    [
        ((60, 90), (10, 40, 50, 70), EMNIST),
        ((24, 20), (0, 24, 3, 20), EMNIST),  # touches the border, and is enlarged
        ((70, 50), (5, 30, 20, 30), InkFrame(True, True, 20.0, (0.5, 0.5), 19, 20, 0.7)),  # MNIST's, by mass
    ],
)
def test_the_geometry_is_that_of_the_definition(shape: tuple, box: tuple, frame: InkFrame) -> None:
    ink = find_ink(stroke(*shape, box))
    assert ink.box == box
    assert not ink.is_light
    assert np.abs(frame_ink(ink, frame, (28, 28)) - slow_frame(ink, frame, 28)).max() <= 0.5 + 1e-6


def test_emnist_leaves_a_border_of_two_pixels_of_the_scan() -> None:
    image = frame_ink(find_ink(stroke(300, 200, (50, 250, 60, 160))), EMNIST, (28, 28))
    rows, columns = np.flatnonzero((image > 127).any(axis=1)), np.flatnonzero((image > 127).any(axis=0))
    assert abs(len(rows) - 22.4) <= 1
    assert abs(len(columns) - 11.2) <= 1, "the proportions are kept"
    assert abs(rows.mean() - 13.5) <= 0.5
    assert abs(columns.mean() - 13.5) <= 0.5
    assert not image[:1].any()
    assert not image[-1:].any()
    assert image.max() == 255


def test_size_place_and_polarity_of_the_picture_do_not_matter() -> None:
    plain = frame_ink(find_ink(stroke(100, 100, (20, 80, 30, 60))), EMNIST, (28, 28))
    for picture in (
        stroke(640, 480, (300, 540, 10, 130)),
        stroke(100, 100, (20, 80, 30, 60), ink=255, paper=0),
        stroke(100, 100, (20, 80, 30, 60), ink=90, paper=170),
        stroke(60, 30, (0, 60, 0, 30)),  # nothing around the ink
    ):
        difference = np.abs(frame_ink(find_ink(picture), EMNIST, (28, 28)).astype(int) - plain)
        assert difference.mean() < 2


def test_a_pale_smudge_does_not_move_the_ink() -> None:
    picture = stroke(100, 100, (5, 15, 20, 30), ink=145)
    frame = InkFrame(True, True, 20.0, (0.5, 0.5), 19, 20, 0.7)
    clean = frame_ink(find_ink(picture), frame, (28, 28))
    picture[93:, 93:] = 218
    smudged = find_ink(picture)
    assert smudged.values[95, 95] > 0, "no speck, and no background"
    np.testing.assert_allclose(frame_ink(smudged, frame, (28, 28)), clean, atol=2)


def test_dust_and_noise_do_not_move_the_ink() -> None:
    picture = stroke(300, 300, (100, 200, 120, 170))
    clean = find_ink(picture)
    noise = np.random.default_rng(0).normal(0, 12, picture.shape)
    picture = (picture * 0.7 + 40 + noise).clip(0, 255).astype(np.uint8)
    picture[5:7, 280:282] = 0
    found = find_ink(picture)
    assert np.abs(np.subtract(found.box, clean.box)).max() <= 1


@pytest.mark.parametrize("angle", [0.0, 1.0, 3.0])
def test_shaded_paper_counts_as_even(angle: float) -> None:
    box = (100, 200, 120, 170)
    inked = stroke(300, 240, box, ink=1, paper=0)
    y, x = np.mgrid[:300, :240]
    place = (y / 300 - 0.5) * np.sin(angle) + (x / 240 - 0.5) * np.cos(angle)
    paper = 150 - 130 * place + np.random.default_rng(0).normal(0, 2, inked.shape)
    photograph = (paper * (1 - 0.7 * inked)).clip(0, 255).astype(np.uint8)
    assert find_ink(photograph).box != box, "one threshold for all of it does not do"
    ink = find_ink(remove_shading(photograph))
    assert np.abs(np.subtract(ink.box, box)).max() <= 1
    assert not ink.is_light
    with pytest.raises(NoInkError):
        find_ink(remove_shading(paper.clip(0, 255).astype(np.uint8)))


def test_evenly_lit_pictures_stay_as_they_are(digits_set: Path) -> None:
    for picture in (
        stroke(300, 240, (100, 200, 120, 170)),
        stroke(100, 90, (0, 100, 0, 90)),  # much ink and nothing around it
        *open_split(digits_set, "test").read(np.arange(50))[..., 0],
    ):
        np.testing.assert_array_equal(remove_shading(picture), picture)


def test_a_dot_that_belongs_to_the_character_stays() -> None:
    picture = stroke(200, 200, (80, 160, 95, 107))
    picture[50:62, 95:107] = 0
    assert find_ink(picture).box[0] == 50


@pytest.mark.parametrize("level", [0, 128, 255])
def test_a_blank_picture_has_no_ink(level: int) -> None:
    with pytest.raises(NoInkError, match="0 of 255"):
        find_ink(np.full((30, 40), level, np.uint8))
    grain = np.random.default_rng(0).integers(-4, 5, (30, 40))
    with pytest.raises(NoInkError, match="low contrast"):
        find_ink((np.full((30, 40), level) + grain).clip(0, 255).astype(np.uint8))


def test_how_ink_lies_is_measured_on_the_set(digits_set: Path, synthetic_set: Path) -> None:
    digits = InputAdapter.of(open_split(digits_set, "train"))
    assert digits.image_shape == (8, 8, 1)
    assert digits.frame is not None
    assert (digits.frame.is_light, digits.frame.side) == (True, 8)
    assert InputAdapter.from_state_dict(digits.state_dict()) == digits
    assert InputAdapter.of(open_split(synthetic_set, "train")).frame is None, "noise with a band is not ink"


def test_emnist_and_mnist_are_told_apart(shared_data: Path) -> None:
    train, _ = find_source("emnist").load(SourceOptions(shared_data / "emnist", variant="byclass"))
    emnist = InkFrame.measure(np.asarray(train.read(np.arange(0, 90_000, 200)))[..., 0].swapaxes(1, 2))
    assert emnist is not None
    assert not emnist.by_mass
    assert emnist.side == pytest.approx(EMNIST.side, abs=0.5), "as the paper has it"
    assert emnist.centre == (0, 0)
    images = read_idx(shared_data / "mnist" / "t10k-images-idx3-ubyte.gz")
    mnist = InkFrame.measure(images[:400])
    assert mnist is not None
    assert mnist.by_mass
    assert mnist.side == pytest.approx(20, abs=0.2), "normalised to fit in a 20x20 box, and centred by mass"
    assert mnist.centre == pytest.approx((0.5, 0.5), abs=0.1)


def read_idx(path: Path) -> NDArray[np.uint8]:
    return np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8, offset=16).reshape(-1, 28, 28)


def png(image: Image.Image) -> bytes:
    content = io.BytesIO()
    image.save(content, "PNG")
    return content.getvalue()


def test_every_kind_of_picture_file_gives_the_same_image() -> None:
    adapter = InputAdapter((28, 28, 1), "pad", EMNIST)
    gray = stroke(120, 90, (30, 100, 20, 60))
    plain = Image.fromarray(gray)
    expected = adapter.adapt(png(plain))
    assert "dark ink inverted" in expected.description
    assert "120x90" in expected.description
    clear = Image.merge("LA", (Image.new("L", plain.size, 0), Image.fromarray(255 - gray)))
    wide = Image.fromarray(gray.astype(np.uint16) * 257)
    for picture in (plain.convert("RGB"), plain.convert("P"), clear, clear.convert("RGBA"), wide, plain.convert("1")):
        adapted = adapter.adapt(png(picture))
        assert np.abs(adapted.image.astype(int) - expected.image).max() <= 1, picture.mode
    light = adapter.adapt(png(Image.fromarray(255 - gray)))
    assert "inverted" not in light.description
    np.testing.assert_array_equal(light.image, expected.image)


def test_an_image_of_the_set_is_taken_as_it_is(digits_set: Path) -> None:
    store = open_split(digits_set, "test")
    adapter = InputAdapter.of(store)
    images = store.read(np.arange(len(store)))
    for image in images:
        adapted = adapter.adapt(png(Image.fromarray(image[..., 0])))
        assert adapted.description == "unchanged"
        np.testing.assert_array_equal(adapted.image, image)
    inverted = adapter.adapt(png(Image.fromarray(255 - images[0, ..., 0])))
    assert "dark ink inverted" in inverted.description
    off_centre = np.zeros((28, 28), np.uint8)
    off_centre[2:12, 3:6] = 255
    assert "centred" in InputAdapter((28, 28, 1), "pad", EMNIST).adapt(png(Image.fromarray(off_centre))).description


def test_pictures_for_other_sets_are_brought_to_size(tmp_path: Path) -> None:
    parts = synthetic_splits(train=70, shape=(12, 16, 3), transposed=False)
    adapter = InputAdapter.of(open_split(pack_splits(parts, tmp_path / "set"), "train"))
    assert adapter.frame is None
    picture = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    adapted = adapter.adapt(png(Image.fromarray(picture)))
    np.testing.assert_array_equal(adapted.image, picture)
    assert adapted.description == "unchanged"
    adapted = adapter.adapt(png(Image.fromarray(picture).resize((50, 70))))
    assert adapted.image.shape == (12, 16, 3)
    assert adapted.description == "resized from 70x50 to 12x16 (pad)"


def test_what_cannot_be_used_says_why() -> None:
    adapter = InputAdapter((28, 28, 1), "pad", EMNIST)
    with pytest.raises(NoInkError, match="low contrast"):
        adapter.adapt(png(Image.new("L", (50, 50), 255)))
    whole = png(Image.fromarray(stroke(120, 90, (30, 100, 20, 60))))
    for content in (b"", b"hello", whole[: len(whole) // 2]):
        with pytest.raises(CorruptFileError):
            adapter.adapt(content)
