"""Near-duplicates: planted ones are found, different pictures are not, and each part keeps what it should."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from support.image_files import png, smooth

import pipeline.dedup.near_duplicates
from pipeline.datasets import find_source
from pipeline.dedup.between_splits import find_duplicates, remove_duplicates, summarize, write_report
from pipeline.dedup.near_duplicates import Matches, find_near_duplicates
from pipeline.readers.raw_split import RawSplit, SourceOptions, UnreadableImages
from shards import UserError
from shards.stores.base import EncodedImage

Images = NDArray[np.uint8]


def pixels(values: NDArray) -> Images:
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


def noisy(images: Images, levels: float) -> Images:
    return pixels(images + np.random.default_rng(9).normal(0, levels, images.shape))


def jpeg(images: Images, quality: int) -> Images:
    def coded(image: Images) -> Images:
        file = io.BytesIO()
        Image.fromarray(image[..., 0] if image.shape[2] == 1 else image).save(file, "JPEG", quality=quality)
        return np.asarray(Image.open(file)).reshape(image.shape)

    return np.stack([coded(image) for image in images])


def moved(images: Images, down: int, right: int) -> Images:
    """Moved by pixels; those of the border move in."""
    rows = np.clip(np.arange(images.shape[1]) - down, 0, images.shape[1] - 1)
    columns = np.clip(np.arange(images.shape[2]) - right, 0, images.shape[2] - 1)
    return images[:, rows][:, :, columns]


CHANGES: dict[str, Callable[[Images], Images]] = {
    "noise": lambda images: noisy(images, 8),
    "darker": lambda images: pixels(images * 0.8 + 20),
    "recompressed": lambda images: jpeg(images, 60),
    "to the right": lambda images: moved(images, 0, 1),
    "up and left": lambda images: moved(images, -1, -1),
}


@cache
def all_drawings() -> Images:
    """Three thick blurred strokes each, light on black, uint8 [3000, 28, 28, 1]."""
    random = np.random.default_rng(0)
    ends = random.uniform(5, 23, (3000, 3, 2, 2, 1))
    points = ends[:, :, 0] + (ends[:, :, 1] - ends[:, :, 0]) * np.linspace(0, 1, 16)
    points = points.transpose(0, 1, 3, 2).reshape(3000, 48, 2)
    places = np.arange(28)
    ink = np.zeros((3000, 28, 28))
    for y, x in points.transpose(1, 2, 0):
        down, across = (np.exp(-np.square(center[:, None] - places) / 3) for center in (y, x))
        ink = np.maximum(ink, down[:, :, None] * across[:, None, :])
    return pixels(255 * ink)[..., None]


def drawings(count: int, seed: int) -> Images:
    """Others for each seed 0 .. 3; up to 500, with seed 3 up to 1,500."""
    return all_drawings()[500 * seed :][:count].copy()


def photographs(count: int, seed: int) -> Images:
    return smooth(count, 32, 32, 3, seed)


def matched(first: Images, second: Images) -> Matches:
    return find_near_duplicates(part("first", first), part("second", second))


def found_of(first: Images, second: Images, planted: Images) -> dict[int, int]:
    """Plants pictures behind the first set; the position in the second at which each of them is found."""
    found = matched(np.concatenate([first, planted]), second)
    return {int(one) - len(first): int(other) for one, other in zip(found.first, found.second, strict=True)}


@pytest.mark.parametrize("make", [drawings, photographs])
class TestSyntheticPictures:
    @pytest.mark.parametrize("change", CHANGES)
    def test_changed_copies_are_found(self, make: Callable[[int, int], Images], change: str) -> None:
        second = make(300, 1)
        found = found_of(make(500, 2), second, CHANGES[change](second[:100]))
        assert sum(found.get(place) == place for place in range(100)) >= 97
        assert all(found[place] == place for place in found)

    def test_different_ones_are_not(self, make: Callable[[int, int], Images]) -> None:
        found = matched(make(1500, 3), make(500, 2))
        assert found.first.tolist() == found.second_matches.tolist() == []

    def test_equal_ones_are_told_from_similar_ones(self, make: Callable[[int, int], Images]) -> None:
        second = make(60, 1)
        found = matched(np.concatenate([make(40, 2), second[20:30], noisy(second[30:35], 4), second[20:21]]), second)
        assert found.first.tolist() == list(range(40, 56))
        assert found.second.tolist() == [*range(20, 35), 20]
        assert found.identical.tolist() == [True] * 10 + [False] * 5 + [True]
        assert found.similarity[found.identical].tolist() == [1] * 11
        assert (found.similarity[~found.identical] < 1).all() and (found.similarity > 0.9).all()
        assert found.second_matches.tolist() == list(range(20, 35))


def test_mirrored_turned_and_inverted_pictures_are_others() -> None:
    """As the docstring says: whoever wants them found has to look for them."""
    second = drawings(200, 1)
    for planted in (second[:, :, ::-1], second[:, ::-1], second.swapaxes(1, 2), 255 - second):
        assert found_of(drawings(200, 2), second, planted) == {}


def test_the_closest_is_named() -> None:
    second = photographs(50, 1)
    second[10] = noisy(second[3], 12)
    assert found_of(photographs(50, 2), second, noisy(second[3:4], 3)) == {0: 3}


def test_any_number_of_cores_finds_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    second = drawings(400, 1)
    first = np.concatenate([drawings(300, 2), noisy(second[:50], 8), second[50:60]])
    monkeypatch.setattr(pipeline.dedup.near_duplicates, "_BLOCK", 64)
    outcomes = []
    for cores in (1, 3):
        monkeypatch.setattr(pipeline.dedup.near_duplicates, "default_workers", lambda cores=cores: cores)
        outcomes.append(matched(first, second))
    assert len(outcomes[0].first) > 55
    for name, value in vars(outcomes[0]).items():
        np.testing.assert_array_equal(getattr(outcomes[1], name), value)


def test_large_images_are_read_in_small_blocks_by_the_processes_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(pipeline.dedup.near_duplicates, "default_workers")
    counts = []

    def read(rows: NDArray[np.int64]) -> Images:
        counts.append(len(rows))
        return np.zeros((len(rows), 512, 512, 3), np.uint8)

    first, second = (
        RawSplit(name, ("a", "b"), np.arange(12) % 2, (512, 512, 3), False, read) for name in ("train", "test")
    )
    find_duplicates((first, second), workers=1)
    assert sum(counts) == 36 and max(counts) * 512 * 512 * 3 <= 8 << 20


class TestMany:
    def test_equal_pictures_take_no_comparisons(self) -> None:
        first, second = np.zeros((20_000, 28, 28, 1), np.uint8), np.zeros((9_000, 28, 28, 1), np.uint8)
        first[:5_000], second[:3_000] = drawings(1, 1), drawings(1, 1)
        found = matched(first, second)
        assert len(found.first) == 20_000 and found.identical.all()
        assert len(found.second_matches) == 9_000

    def test_empty_pictures_are_not_alike(self) -> None:
        found = matched(np.full((50, 28, 28, 1), 7, np.uint8), np.full((50, 28, 28, 1), 9, np.uint8))
        assert len(found.first) == 0

    def test_thousands_of_almost_equal_ones_are_found(self) -> None:
        one = np.repeat(drawings(1, 1), 2000, axis=0)
        first, second = (
            pixels(one[:count] + np.random.default_rng(count).integers(-1, 2, (count, 28, 28, 1)))
            for count in (2000, 600)
        )
        found = matched(first, second)
        assert len(found.first) == 2000 and not found.identical.any()

    @pytest.mark.parametrize("count", [1, 2, 9])
    def test_few_pictures(self, count: int) -> None:
        second = photographs(count, 1)
        found = matched(noisy(second, 4), second)
        assert found.first.tolist() == found.second.tolist() == list(range(count))
        assert len(matched(photographs(count, 2), second).first) == 0


CLASSES = tuple("abc")


def part(name: str, images: Images, labels: NDArray[np.int64] | None = None) -> RawSplit:
    return RawSplit.from_arrays(name, images, np.arange(len(images)) % 3 if labels is None else labels, CLASSES)


@pytest.fixture
def parts() -> tuple[RawSplit, ...]:
    """Train 0 .. 9 are in test 5 .. 14, train 10 .. 14 in val 3 .. 7, val 0 and 1 in test 0 and 1."""
    test, val, train = drawings(60, 1), drawings(30, 2), drawings(100, 3)
    train[:5], train[5:10] = test[5:10], noisy(test[10:15], 5)
    train[10:15] = noisy(val[3:8], 5)
    val[:2] = test[:2]
    return part("train", train), part("test", test), part("val", val)


class TestParts:
    def test_each_pair_of_parts_is_compared(self, parts: tuple[RawSplit, ...]) -> None:
        found = find_duplicates(parts)
        pairs = {
            (one.split, one.other_split): dict(zip(one.source_index, one.other_source_index, strict=True))
            for one in found
        }
        assert pairs == {
            ("val", "test"): {0: 0, 1: 1},
            ("train", "test"): {row: row + 5 for row in range(10)},
            ("train", "val"): {row: row - 7 for row in range(10, 15)},
        }
        assert summarize(found) == (
            "near-duplicates: 2 val images are in test (2 identical, 0 with another label; they match 2 of the 60 test "
            "images); 10 train images are in test (5 identical, 10 with another label; they match 10 of the 60 test "
            "images); 5 train images are in val (0 identical, 5 with another label; they match 5 of the 30 val images)"
        )

    def test_test_stays_whole(self, parts: tuple[RawSplit, ...]) -> None:
        train, test, val = remove_duplicates(parts, find_duplicates(parts))
        assert test is parts[1]
        assert train.source_index.tolist() == list(range(15, 100))
        assert val.source_index.tolist() == list(range(2, 30))
        again = find_duplicates((train, test, val))
        assert summarize(again) == "near-duplicates: none"
        assert remove_duplicates((train, test, val), again) == (train, test, val)

    def test_raw_rows_are_named(self, parts: tuple[RawSplit, ...]) -> None:
        train, test, _ = parts
        chosen = train.select(np.array([50, 8, 30, 2])), test.select(np.array([40, 13, 7]))
        found = find_duplicates(chosen)[0]
        assert (found.source_index.tolist(), found.other_source_index.tolist()) == ([8, 2], [13, 7])
        assert remove_duplicates(chosen, find_duplicates(chosen))[0].source_index.tolist() == [50, 30]

    def test_report(self, parts: tuple[RawSplit, ...], tmp_path: Path) -> None:
        path = tmp_path / "report.csv"
        write_report(find_duplicates(parts), path)
        lines = list(csv.DictReader(path.open()))
        assert len(lines) == 17
        assert lines[0] == {
            "part": "val",
            "row": "0",
            "label": "a",
            "in_part": "test",
            "in_row": "0",
            "in_label": "a",
            "identical": "yes",
            "similarity": "1.0000",
        }
        of_train = [line for line in lines if (line["part"], line["in_part"]) == ("train", "test")]
        assert [line["row"] for line in of_train[:5]] == list("01234")
        assert [line["identical"] for line in of_train] == ["yes"] * 5 + ["no"] * 5
        similarity = [float(line["similarity"]) for line in of_train]
        assert similarity == sorted(similarity, reverse=True) and similarity[-1] > 0.9
        assert (of_train[0]["label"], of_train[0]["in_label"]) == ("a", "c")

    def test_a_part_that_is_wholly_in_another_is_refused(self, parts: tuple[RawSplit, ...]) -> None:
        copies = (replace(parts[1], name="train"), parts[1])
        with pytest.raises(UserError) as caught:
            remove_duplicates(copies, find_duplicates(copies))
        assert "train split of 60 images" in caught.value.found

    def test_one_class_that_is_left_is_refused(self, parts: tuple[RawSplit, ...]) -> None:
        test = parts[1]
        train = replace(parts[0], labels=(np.arange(100) >= 10).astype(np.int64))
        with pytest.raises(UserError, match="all but those of one class also in another split"):
            remove_duplicates((train, test), find_duplicates((train, test)))

    def test_repeated_train_images_are_found(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Each names an earlier image: of two and three copies the first stays, also if they lie in several blocks."""
        monkeypatch.setattr(pipeline.dedup.near_duplicates, "_BLOCK", 32)
        images = drawings(100, 3)
        images[40], images[90], images[60] = images[7], images[7], noisy(images[30:31], 5)[0]
        images[3] = images[2]
        parts = part("train", images), part("test", drawings(40, 1))
        found = find_duplicates(parts, within_train=True)[-1]
        assert dict(zip(found.source_index, found.other_source_index, strict=True)) == {3: 2, 40: 7, 90: 7, 60: 30}
        assert found.identical.tolist() == [True, True, False, True]
        assert "4 train images repeat an earlier one (3 identical" in summarize([found])
        kept = remove_duplicates(parts, [found])
        assert kept[0].source_index.tolist() == [row for row in range(100) if row not in (3, 40, 60, 90)]
        assert kept[1] is parts[1]
        assert find_duplicates(kept, within_train=True)[-1].source_index.tolist() == []

    def test_a_single_part_has_none(self, parts: tuple[RawSplit, ...]) -> None:
        assert summarize(find_duplicates(parts[:1])) == "near-duplicates: none"

    def test_transposed_pixels(self, parts: tuple[RawSplit, ...]) -> None:
        turned = tuple(
            replace(one, transposed=True, read=lambda rows, one=one: one.read(rows).swapaxes(1, 2)) for one in parts
        )
        assert summarize(find_duplicates(turned)) == summarize(find_duplicates(parts))

    def test_picture_files(self, parts: tuple[RawSplit, ...]) -> None:
        def files(one: RawSplit) -> RawSplit:
            def read(rows: NDArray[np.int64]) -> list[EncodedImage]:
                return [EncodedImage(png(image), "png") for image in one.read(rows)]

            return replace(one, image_shape=(None, None, 1), read=read)

        assert summarize(find_duplicates(tuple(map(files, parts)))) == summarize(find_duplicates(parts))

    def test_unreadable_images_are_passed_over(self, parts: tuple[RawSplit, ...]) -> None:
        train, test, val = parts

        def read(rows: NDArray[np.int64]) -> Images:
            if reasons := {int(row): "cut short" for row in rows if row in (0, 7, 60)}:
                raise UnreadableImages(reasons)
            return train.read(rows)

        found = find_duplicates((replace(train, read=read), test, val))[1]
        assert found.source_index.tolist() == [1, 2, 3, 4, 5, 6, 8, 9]


def genuine(shared_data: Path, source: str, directory: str, split: str = "") -> tuple[RawSplit, ...]:
    return find_source(source).load(SourceOptions(shared_data / directory, split))


# Positions in the test and train part of the CIFAR-10 subset.
LOOKED_AT = {
    *((159, 214), (159, 909), (164, 571), (210, 1797), (243, 1068), (251, 1896), (464, 2562), (650, 3970), (811, 4476)),
    *((838, 4015), (852, 4520), (884, 4829), (957, 4852), (1368, 6658), (1371, 6549), (1489, 7338), (1567, 7633)),
    *((1580, 7994), (1812, 9427), (1877, 9229), (1898, 9854)),
}


class TestGenuinePictures:
    @pytest.mark.parametrize(("source", "split"), [("emnist", "byclass"), ("mnist", "")])
    def test_changed_copies_are_found_and_few_others(self, shared_data: Path, source: str, split: str) -> None:
        train, test = genuine(shared_data, source, source, split)
        second = test.read(np.arange(2000))
        first = train.read(np.arange(0, len(train.source_index), 3))
        planted = {name: change(second[number::5][:200]) for number, (name, change) in enumerate(CHANGES.items())}
        found = found_of(first, second, np.concatenate(list(planted.values())))
        for number, name in enumerate(planted):
            right = sum(found.get(200 * number + place) == number + 5 * place for place in range(200))
            assert right >= {"up and left": 170, "to the right": 170}.get(name, 196), name
        assert sum(place < 0 for place in found) <= 5

    def test_splits_of_emnist_overlap(self, shared_data: Path) -> None:
        """Two thirds of ByMerge's test images lie in this ByClass's train part, byte for byte."""
        train = genuine(shared_data, "emnist", "emnist", "byclass")[0]
        test = genuine(shared_data, "emnist", "emnist", "bymerge")[1].select(np.arange(3000))
        known = {image.tobytes() for image in train.read(train.source_index)}
        equal = sum(image.tobytes() in known for image in test.read(test.source_index))
        found = find_duplicates((replace(train, classes=test.classes, labels=train.labels % 47), test))[0]
        assert found.identical.sum() == equal > 1800
        assert found.other_matches - equal < 10

    def test_known_ones_of_cifar(self, shared_data: Path) -> None:
        """Pairs that were looked at, and are the same photograph; none of those found is another."""
        archive = shared_data / "cifar10" / "cifar10-jpg-subset.zip"
        found = find_duplicates(find_source("folder").load(SourceOptions(archive)))[0]
        pairs = set(zip(found.other_source_index.tolist(), found.source_index.tolist(), strict=True))
        assert len(pairs) >= 9
        assert pairs <= LOOKED_AT
