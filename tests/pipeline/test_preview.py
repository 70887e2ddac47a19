"""The contact sheet shows raw and processed images, and the processed ones are upright."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conftest import run_module
from PIL import Image, ImageDraw

from pipeline import preview
from pipeline.preview import contact_sheet, upright
from pipeline.transforms.augmentation import Augmentation
from pipeline.transforms.preprocess import Preprocessing
from shards import UserError, open_split
from trainer.models.auto import CPU_RESOLUTION

CLASSES = 5


def tiles(sheet: Image.Image, label: int) -> tuple[np.ndarray, np.ndarray]:
    """The first pair of a class, raw and processed, as gray values [side, side]; sheets of one column only."""
    side = preview._TILE
    left = preview._MARGIN + preview._LABEL
    top = preview._HEADER + label * (side + 2 * preview._GAP)
    pixels = np.asarray(sheet.convert("L"))[top : top + side]
    processed = left + side + preview._GAP
    return pixels[:, left : left + side], pixels[:, processed : processed + side]


def bright_lines(profile: np.ndarray) -> np.ndarray:
    """Lines of a tile that belong to a band of 255, among noise below 100."""
    return np.flatnonzero(profile > 200)


def test_the_band_stands_in_the_raw_image_and_lies_in_the_processed(synthetic_set: Path) -> None:
    sheet = contact_sheet(open_split(synthetic_set, "train"), resolution=112)
    for label in range(CLASSES):
        raw, processed = tiles(sheet, label)
        band = np.arange(2 * (label * 28 // CLASSES), 2 * ((label + 1) * 28 // CLASSES))
        assert np.array_equal(bright_lines(raw.mean(axis=0)), band)
        assert len(bright_lines(raw.mean(axis=1))) == 0
        lying = bright_lines(processed.mean(axis=1))
        assert abs(lying[0] - band[0]) <= 1
        assert abs(lying[-1] - band[-1]) <= 1
        assert len(bright_lines(processed.mean(axis=0))) == 0


def test_the_processed_image_is_what_a_person_reads(synthetic_set: Path) -> None:
    store = open_split(synthetic_set, "train")
    raw = preview.read_images(store, np.flatnonzero(store.labels == 1)[:3])
    for image in raw:
        assert np.all(upright(image, transposed=True)[28 // CLASSES : 2 * 28 // CLASSES] == 255)
        assert np.array_equal(upright(image, transposed=False), image)


def test_the_command_writes_a_picture_beside_the_set_or_where_it_is_told(synthetic_set: Path, tmp_path: Path) -> None:
    out = tmp_path / "sheet.png"
    process = run_module("pipeline.preview", synthetic_set, "--out", out, "--resolution", 28)
    assert process.returncode == 0, process.stderr
    assert process.stdout.strip() == str(out)
    with Image.open(out) as sheet:
        assert sheet.format == "PNG"
        expected = contact_sheet(open_split(synthetic_set, "train"), resolution=28)
        assert np.array_equal(np.asarray(sheet), np.asarray(expected))
    assert [path.name for path in tmp_path.iterdir()] == ["sheet.png"]


def test_what_a_recipe_trains_on_is_shown_beside_the_raw_images(synthetic_set: Path, tmp_path: Path) -> None:
    out = tmp_path / "sheet.png"
    overrides = (f"data.shards={synthetic_set}", "data.invert=true", "augment.rotation=20", "data.resolution=28")
    process = run_module("trainer.predict.preview", "configs/quickstart.yaml", *overrides, "--out", out)
    assert process.returncode == 0, process.stderr
    assert process.stdout.strip() == str(out)
    store = open_split(synthetic_set, "train")
    steps, augmentation = Preprocessing(invert=True), Augmentation(rotation=20)
    expected = contact_sheet(store, 28, "linear", steps, augmentation)
    with Image.open(out) as sheet:
        assert np.array_equal(np.asarray(sheet), np.asarray(expected))
    raw, first = tiles(expected, 2)
    versions = [first]
    gray = np.asarray(expected.convert("L"))
    left, top = preview._MARGIN + preview._LABEL, preview._HEADER + 2 * (preview._TILE + 2 * preview._GAP)
    for version in range(2, 5):
        x = left + version * (preview._TILE + preview._GAP)
        versions.append(gray[top : top + preview._TILE, x : x + preview._TILE])
    assert len({each.tobytes() for each in versions}) == 4, "each in another way"
    for each in versions:
        assert each.mean() == pytest.approx(255 - raw.mean(), abs=12), "inverted"


def test_images_are_shown_at_the_resolution_of_the_automatic_model(synthetic_set: Path, tmp_path: Path) -> None:
    recipe, sheets = tmp_path / "auto.yaml", []
    recipe.write_text(f"data: {{shards: {synthetic_set}}}")
    for override in ("model.name=auto", f"data.resolution={CPU_RESOLUTION}"):
        sheets.append(tmp_path / f"{len(sheets)}.png")
        process = run_module("trainer.predict.preview", recipe, "device=cpu", override, "--out", sheets[-1])
        assert process.returncode == 0, process.stderr
    assert sheets[0].read_bytes() == sheets[1].read_bytes()


def test_one_part_can_be_shown(synthetic_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "sheet.png"
    _run(monkeypatch, synthetic_set / "test", "--out", out)
    with Image.open(out) as sheet:
        expected = contact_sheet(open_split(synthetic_set, "test"), resolution=112)
        assert np.array_equal(np.asarray(sheet), np.asarray(expected))


def test_an_out_that_cannot_be_written_to_is_the_users_mistake(
    synthetic_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError) as missing:
        _run(monkeypatch, synthetic_set, "--out", tmp_path / "nowhere" / "sheet.png")
    assert missing.value.hint == f"mkdir -p {tmp_path / 'nowhere'}"
    with pytest.raises(UserError, match="a directory"):
        _run(monkeypatch, synthetic_set, "--out", tmp_path)
    assert list(tmp_path.iterdir()) == []


def drawn(text: str, width: int = 400) -> np.ndarray:
    sheet = Image.new("RGB", (400, 40), "white")
    preview.draw_text(ImageDraw.Draw(sheet), (4, 4), text, 20, width)
    return np.asarray(sheet)


def test_letters_beyond_ascii_are_drawn_and_not_boxes() -> None:
    pictures = [drawn(letter) for letter in ("é", "ü", "ক" if preview._font_file(frozenset({0x995})) else "ß")]
    assert all((picture != 255).any() for picture in pictures)
    assert len({picture.tobytes() for picture in pictures}) == 3, "a box is the same for each letter"


def test_letters_that_no_font_has_are_drawn_as_escape_sequences() -> None:
    assert np.array_equal(drawn("a\U0010fffe"), drawn("a\\U0010fffe"))


def test_long_names_are_shortened_to_the_width() -> None:
    assert (drawn("a name longer than the label", 100)[:, 104:] == 255).all()
    assert not np.array_equal(drawn("a name longer than the label", 100), drawn("a name", 100))


def _run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr("sys.argv", ["preview", *map(str, arguments)])
    preview.main()
