"""Images that two packed sets share, however they lie in them, and a set without them."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import assert_user_error, pack_splits, run_module
from numpy.typing import NDArray
from support.version_2 import downgrade

from pipeline.dedup.overlap import find_overlaps, remove_leaks
from pipeline.packing.repack import concatenate, packed_splits
from pipeline.readers.raw_split import RawSplit
from shards import UserError, open_split
from shards.convert import upgrade
from shards.verify.check import check_hashes


def some(name: str, images: NDArray[np.uint8], labels: list[int], classes: str, transposed: bool = False) -> RawSplit:
    pixels = np.ascontiguousarray(images.swapaxes(1, 2) if transposed else images)
    return RawSplit.from_arrays(name, pixels, np.array(labels), tuple(classes), transposed=transposed)


@pytest.fixture(scope="module")
def pixels() -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (30, 12, 12, 1), dtype=np.uint8)


@pytest.fixture(scope="module")
def sets(pixels: NDArray[np.uint8], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A: train 0-9, val 10-13, test 14-17; B stores them transposed: train 8-11 and new ones, test 2, 3, 12, 15."""
    directory = tmp_path_factory.mktemp("overlap")
    ours = (
        some("train", pixels[:10], [0, 1] * 5, "ab"),
        some("test", pixels[14:18], [0, 1] * 2, "ab"),
        some("val", pixels[10:14], [0, 1] * 2, "ab"),
    )
    theirs = (
        some("train", pixels[[8, 9, 10, 11, 20, 21]], [1, 0, 1, 0, 0, 0], "ba", transposed=True),
        some("test", pixels[[2, 3, 12, 15, 22]], [1, 1, 1, 0, 0], "ba", transposed=True),
    )
    return pack_splits(ours, directory / "a"), pack_splits(theirs, directory / "b", seed=7)


def test_shared_images_are_counted_by_part(sets: tuple[Path, Path]) -> None:
    found = find_overlaps(*map(packed_splits, sets))
    rows = {(one.split, one.other_split): one.source_index.tolist() for one in found}
    assert rows == {
        ("train", "train"): [8, 9],
        ("train", "test"): [2, 3],
        ("val", "train"): [0, 1],
        ("val", "test"): [2],
        ("test", "train"): [],
        ("test", "test"): [1],
    }
    by_parts = {(one.split, one.other_split): one for one in found}
    one = by_parts["train", "test"]
    assert one.other_source_index.tolist() == [0, 1] and (one.other_matches, one.other_size) == (2, 5)
    # 2 is an a in both, 3 a b here and an a there, although class 1 in both.
    line = "2 train images are in test (2 identical, 1 with another label; they match 2 of the 5 test images)"
    assert str(one) == line
    line = "2 train images are in train (2 identical, 0 with another label; they match 2 of the 6 train images)"
    assert str(by_parts["train", "train"]) == line, "two sets, although the splits have one name"


def test_images_that_are_changed_a_little_are_found_when_asked_for(tmp_path: Path, digits_set: Path) -> None:
    store = open_split(digits_set, "test")
    images = store.read(np.arange(60))
    brighter = np.clip(images.astype(int) + 6, 0, 255).astype(np.uint8)
    labels = store.labels[:60].tolist()
    classes = "0123456789"
    parts = (some("train", brighter[:40], labels[:40], classes), some("test", images[40:], labels[40:], classes))
    changed = packed_splits(pack_splits(parts, tmp_path / "changed"))
    digits = packed_splits(digits_set)
    for near, fewest, most in ((False, 0, 0), (True, 36, 40)):
        found = {(one.split, one.other_split): len(one.source_index) for one in find_overlaps(changed, digits, near)}
        assert fewest <= found["train", "test"] <= most
        assert found["test", "test"] == 20


def test_a_set_is_written_without_what_the_other_is_judged_by(sets: tuple[Path, Path], tmp_path: Path) -> None:
    ours, theirs = sets
    out, report = tmp_path / "clean", tmp_path / "shared.csv"
    process = run_module("pipeline.dedup.overlap", ours, theirs, "--remove", out, "--csv", report)
    assert process.returncode == 0, process.stderr
    assert "removed 3 images; 8 train, 4 test, 3 val images" in process.stdout
    lines = list(csv.DictReader(report.open()))
    assert {(line["part"], line["row"], line["label"], line["in_part"], line["in_label"]) for line in lines} >= {
        ("train", "3", "b", "test", "a"),
        ("train", "2", "a", "test", "a"),
    }
    for part, rows in (("train", [0, 1, 4, 5, 6, 7, 8, 9]), ("val", [0, 1, 3]), ("test", [0, 1, 2, 3])):
        before, after = open_split(ours, part), open_split(out, part)
        assert sorted(after.rows.tolist()) == rows, part
        places = [before.rows.tolist().index(row) for row in after.rows.tolist()]
        assert np.array_equal(after.read(np.arange(len(after))), before.read(np.array(places)))
        assert np.array_equal(after.labels, before.labels[places])
        assert list(check_hashes(out / part, after.manifest)) == []
    assert "0 train images are in test" in run_module("pipeline.dedup.overlap", out, theirs).stdout
    again = run_module("pipeline.dedup.overlap", theirs, ours, "--remove", out)
    assert_user_error(again, str(out), "--force")


def test_a_set_is_not_written_again_after_an_upgrade_of_the_others(sets: tuple[Path, Path], tmp_path: Path) -> None:
    ours, theirs = (downgrade(Path(shutil.copytree(one, tmp_path / one.name))) for one in sets)
    command = ("pipeline.dedup.overlap", ours, theirs, "--remove", tmp_path / "out")
    for _ in range(2):
        process = run_module(*command)  # other settings would be refused without --force
        assert process.returncode == 0, process.stderr
        upgrade(ours), upgrade(theirs)


def test_a_set_that_would_be_empty_is_refused(sets: tuple[Path, Path], pixels: NDArray[np.uint8]) -> None:
    everything = (some("train", pixels[:3], [0, 1, 0], "ab"), some("test", pixels[:10], [0, 1] * 5, "ab"))
    with pytest.raises(UserError, match="all of them also in another split") as caught:
        remove_leaks(everything, find_overlaps(everything, everything))
    assert "--csv FILE lists" in caught.value.hint


def test_sets_of_other_sizes_are_never_equal(sets: tuple[Path, Path], synthetic_set: Path) -> None:
    assert_user_error(run_module("pipeline.dedup.overlap", sets[0], synthetic_set), "[28, 28, 1]", "--near")


def test_parts_are_joined_with_rows_of_their_own(sets: tuple[Path, Path], pixels: NDArray[np.uint8]) -> None:
    train, test, _ = packed_splits(sets[0])
    both = concatenate(train, test)
    assert both.source_index.tolist() == list(range(14))
    wanted = np.array([13, 0, 10, 9])
    assert np.array_equal(both.read(wanted), pixels[[17, 0, 14, 9]])
    assert both.columns["from"].tolist() == ["train"] * 10 + ["test"] * 4
    assert both.columns["from_row"].tolist()[8:12] == ["8", "9", "0", "1"]
    with pytest.raises(UserError, match="transposed"):
        concatenate(train, packed_splits(sets[1])[0])
