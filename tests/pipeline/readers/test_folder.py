"""The source `folder`: every way in which pictures lie about, and every way in which that goes wrong."""

from __future__ import annotations

import csv
import hashlib
import io
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from conftest import run_module
from hypothesis import given
from hypothesis import strategies as st
from support.raw_files import (
    load,
    picture,
    pixels,
    png_claiming,
    read_all,
    refusal,
    unreadable,
    write_tar,
    write_tree,
    write_zip,
)

from pipeline.packing.pack import PackSettings, pack
from pipeline.readers.naming import natural_order
from pipeline.readers.raw_split import RawSplit
from shards import UserError, open_split
from shards.manifest import RawFile
from shards.stores.base import EncodedImage

IMAGES = {name: pixels(seed=seed) for seed, name in enumerate(("cat/2", "cat/10", "dog/a/1", "dog/b"))}
CLASSES = {f"{name}.png": picture(image) for name, image in IMAGES.items()}
PARTS = {f"{part}/{name}": content for part in ("train", "test") for name, content in CLASSES.items()}


def folder(raw: Path, **options: object) -> tuple[RawSplit, ...]:
    return load("folder", raw, **options)


def paths(part: RawSplit) -> list[str]:
    return part.columns["path"].tolist()


def table(*rows: tuple[str, ...], separator: str = ",") -> bytes:
    text = io.StringIO()
    csv.writer(text, delimiter=separator, lineterminator="\r\n").writerows(rows)
    return text.getvalue().encode()


class TestDirectories:
    def test_a_directory_for_each_class_is_a_train_part(self, tmp_path: Path) -> None:
        (train,) = folder(write_tree(tmp_path, CLASSES))
        assert (train.name, train.classes, train.image_shape) == ("train", ("cat", "dog"), (8, 8, 1))
        assert paths(train) == ["cat/2.png", "cat/10.png", "dog/a/1.png", "dog/b.png"]
        assert train.labels.tolist() == [0, 0, 1, 1]
        np.testing.assert_array_equal(read_all(train), np.stack(list(IMAGES.values())))
        np.testing.assert_array_equal(train.read(np.array([3, 0, 3])), [list(IMAGES.values())[n] for n in (3, 0, 3)])

    @pytest.mark.parametrize(
        "names", [("train", "test", "val"), ("training", "testing", "validation"), ("Train", "TEST", "Valid")]
    )
    def test_parts_are_directories_around_the_classes(self, tmp_path: Path, names: tuple[str, ...]) -> None:
        files = {f"{name}/{path}": content for name in names for path, content in CLASSES.items()}
        parts = folder(write_tree(tmp_path, files))
        assert [part.name for part in parts] == ["train", "test", "val"]
        for part in parts:
            assert (part.classes, part.labels.tolist()) == (("cat", "dog"), [0, 0, 1, 1])

    def test_a_train_directory_alone_is_a_part(self, tmp_path: Path) -> None:
        (train,) = folder(write_tree(tmp_path, {f"train/{name}": content for name, content in CLASSES.items()}))
        assert (train.name, train.classes) == ("train", ("cat", "dog"))

    def test_parts_may_have_longer_names(self, tmp_path: Path) -> None:
        files = {f"{name}/{path}": content for name in ("my_train", "my-val") for path, content in CLASSES.items()}
        assert [part.name for part in folder(write_tree(tmp_path, files))] == ["train", "val"]

    def test_a_split_may_be_repeated_below_itself(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        files = {f"{split}/{split}/{path}": CLASSES[path] for split in ("seg_train", "seg_test") for path in CLASSES}
        write_tree(tmp_path, {**files, "seg_pred/seg_pred/1.png": picture(pixels())})
        parts = folder(tmp_path, skip_bad=True)
        assert [(part.name, part.classes, len(part.labels)) for part in parts] == [
            ("train", ("cat", "dog"), 4),
            ("test", ("cat", "dog"), 4),
        ]
        assert "skipped: seg_pred beside" in capsys.readouterr().err

    def test_classes_may_hold_words_of_splits(self, tmp_path: Path) -> None:
        content = picture(pixels())
        names = ("freight_train", "test_tube", "bus")
        assert folder(write_tree(tmp_path, {f"{name}/1.png": content for name in names}))[0].classes == (
            "bus",
            "freight_train",
            "test_tube",
        )

    def test_an_empty_class_directory_is_named(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (write_tree(tmp_path, CLASSES) / "bird").mkdir()
        assert f"no image in {tmp_path}/bird" in refusal(lambda: folder(tmp_path)).found
        assert folder(tmp_path, skip_bad=True)[0].classes == ("cat", "dog")
        assert "bird" in capsys.readouterr().err

    def test_a_class_may_be_called_train(self, tmp_path: Path) -> None:
        content = picture(pixels())
        (train,) = folder(write_tree(tmp_path, {"bus/1.png": content, "train/1.png": content, "test/1.png": content}))
        assert train.classes == ("bus", "test", "train")

    def test_numbers_come_in_their_order(self, tmp_path: Path) -> None:
        content = picture(pixels())
        (train,) = folder(write_tree(tmp_path, {f"{name}/x.png": content for name in ("10", "9", "100", "b", "1")}))
        assert train.classes == ("1", "9", "10", "100", "b")

    def test_what_is_no_picture_is_passed_over(self, tmp_path: Path) -> None:
        clutter = {
            "README.txt": b"text",
            ".DS_Store": b"\0",
            "cat/Thumbs.db": b"\0",
            "cat/.hidden.png": b"\0",
            "__MACOSX/cat/._2.png": b"\0",
            ".git/x.png": b"\0",
            "cat/notes.md": b"text",
        }
        (train,) = folder(write_tree(tmp_path, {**CLASSES, **clutter}))
        assert paths(train) == list(CLASSES)

    def test_extensions_in_capitals_count(self, tmp_path: Path) -> None:
        files = {"a/1.PNG": picture(pixels()), "b/1.JPeG": picture(pixels(), "JPEG")}
        (train,) = folder(write_tree(tmp_path, files))
        assert train.classes == ("a", "b")

    def test_a_link_to_a_directory_is_followed(self, tmp_path: Path) -> None:
        write_tree(tmp_path / "elsewhere", CLASSES)
        (tmp_path / "set").mkdir()
        (tmp_path / "set" / "train").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
        (train,) = folder(tmp_path / "set")
        assert len(train.labels) == 4

    def test_a_link_in_a_circle_ends(self, tmp_path: Path) -> None:
        write_tree(tmp_path, CLASSES)
        for name in ("up", "up again"):
            (tmp_path / "cat" / name).symlink_to(tmp_path, target_is_directory=True)
        assert "symbolic link" in refusal(lambda: folder(tmp_path)).hint

    def test_a_link_that_leads_nowhere_is_named(self, tmp_path: Path) -> None:
        write_tree(tmp_path, CLASSES)
        (tmp_path / "cat" / "1.png").symlink_to(tmp_path / "gone.png")
        assert unreadable(folder(tmp_path)[0]) == {0: f"{tmp_path}/cat/1.png: No such file or directory"}

    def test_a_link_to_itself_is_named(self, tmp_path: Path) -> None:
        (write_tree(tmp_path, CLASSES) / "cat" / "3.png").symlink_to("3.png")
        (train,) = folder(tmp_path)
        assert "cat/3.png" in unreadable(train)[paths(train).index("cat/3.png")]

    def test_a_pipe_called_like_a_picture_is_not_waited_for(self, tmp_path: Path) -> None:
        import os

        write_tree(tmp_path, CLASSES)
        os.mkfifo(tmp_path / "cat" / "pipe.png")
        assert len(folder(tmp_path)[0].labels) == 4

    def test_names_that_are_no_text_are_escaped(self, tmp_path: Path) -> None:
        (tmp_path / "cat").mkdir()
        with open(bytes(tmp_path / "cat") + b"/\xff\x1b[31m.png", "wb") as file:
            file.write(b"no picture")
        write_tree(tmp_path, {"dog/1.png": picture(pixels())})
        (train,) = folder(tmp_path)
        assert paths(train)[0] == r"cat/\udcff\x1b[31m.png"
        assert r"\udcff\x1b[31m.png: not a PNG" in unreadable(train)[0]

    def test_the_pictures_are_hashed_as_sha256sum_prints_them(self, tmp_path: Path) -> None:
        (train,) = folder(write_tree(tmp_path, CLASSES))
        listing = subprocess.run(["sha256sum", *paths(train)], cwd=tmp_path, capture_output=True, check=True).stdout
        size = sum(map(len, CLASSES.values()))
        expected = RawFile(name=f"pictures of {tmp_path.name}", bytes=size, sha256=hashlib.sha256(listing).hexdigest())
        assert train.files == (expected,)

    @pytest.mark.parametrize(
        "files, words",
        [
            ({}, "which is empty"),
            ({"a/readme.txt": b"", "b/x.csv": b""}, "2 files (.csv, .txt)"),
            ({"1.png": b"", "a/2.png": b""}, "1.png, an image outside any class"),
            ({"train/1.png": b"", "train/a/2.png": b""}, "train/1.png, an image outside any class"),
            ({"train/a/1.png": b"", "dog/b/1.png": b""}, "dog beside train"),
            ({"seg_train/a/1.png": b"", "seg_test/a/1.png": b"", "seg_pred/1.png": b""}, "seg_pred beside seg_test"),
            ({"train/cat.1.png": b"", "test1/1.png": b""}, "no directories of classes in test1, train of"),
            ({"x/train/cat.1.png": b"", "x/test/1.png": b""}, "no directories of classes in test, train of"),
            ({"train/a/1.png": b"", "val/a/1.png": b"", "valid/a/1.png": b""}, "train, val, valid"),
            ({"a/1.png": b"", "a/x": picture(pixels()), "b/1.png": b""}, "unsupported format or name: a/x"),
            ({"a/1.png": b"", "a/2.tif": b"", "b/3.HEIC": b""}, "1 image of an unsupported format or name: b/3.HEIC"),
            (
                {"train/a/1.png": b"", "test/a/1.png": b"", "test/b/1.png": b""},
                "no training images of b, a class of the test",
            ),
        ],
    )
    def test_what_is_unclear_is_refused(self, tmp_path: Path, files: dict[str, bytes], words: str) -> None:
        assert words in refusal(lambda: folder(write_tree(tmp_path, files))).found

    def test_a_place_that_is_not_there_is_named(self, tmp_path: Path) -> None:
        assert str(tmp_path / "none") in refusal(lambda: folder(tmp_path / "none")).found


class TestArchives:
    @pytest.mark.parametrize("kind", ["zip", "tar", "gz", "bz2", "xz"])
    @pytest.mark.parametrize("top", ["", "set/", "./", "deep/er/"])
    def test_are_read_like_directories(self, tmp_path: Path, kind: str, top: str) -> None:
        files = {f"{top}{name}": content for name, content in PARTS.items()}
        place = tmp_path / f"set.{kind}"
        if kind == "zip":
            write_zip(place, files)
        else:
            write_tar(place, files, "w" if kind == "tar" else f"w:{kind}")
        parts = folder(place)
        assert [part.name for part in parts] == ["train", "test"]
        for part in parts:
            assert part.classes == ("cat", "dog")
            np.testing.assert_array_equal(read_all(part), np.stack(list(IMAGES.values())))
        digest = hashlib.sha256(place.read_bytes()).hexdigest()
        assert parts[1].files == (RawFile(name=place.name, bytes=place.stat().st_size, sha256=digest),)

    def test_tables_in_archives(self, tmp_path: Path) -> None:
        files = {"set/x/1.png": CLASSES["cat/2.png"], "set/labels.csv": table(("path", "label"), ("x/1.png", "cat"))}
        (train,) = folder(write_zip(tmp_path / "set.zip", files))
        assert (train.classes, paths(train)) == (("cat",), ["set/x/1.png"])

    def test_readmes_beside_the_top_directory_do_not_hide_it(self, tmp_path: Path) -> None:
        files = {"LICENSE": b"text", "set/readme.md": b"text", **{f"set/{name}": c for name, c in CLASSES.items()}}
        assert folder(write_zip(tmp_path / "set.zip", files))[0].classes == ("cat", "dog")

    def test_threads_and_processes_share_an_archive(self, tmp_path: Path) -> None:
        """As the packer's workers do, after a fork."""
        images = {f"{seed % 3}/{seed}.png": pixels(seed=seed) for seed in range(300)}
        files = {name: picture(image) for name, image in images.items()}
        for place in (write_zip(tmp_path / "a.zip", files), write_tar(tmp_path / "a.tgz", files, "w:gz")):
            out = tmp_path / f"{place.name}-packed"
            settings = PackSettings("a", block_size=16)
            pack(lambda place=place: (*folder(place), ten_for_testing(place)), out, settings, workers=3)
            store = open_split(out, "train")
            stored = np.empty((300, 8, 8, 1), np.uint8)
            store.gather(np.arange(300), stored)
            expected = [images[name] for name in paths(folder(place)[0])]
            np.testing.assert_array_equal(stored, np.stack(expected)[store.rows])


def ten_for_testing(place: Path) -> RawSplit:
    (train,) = folder(place)
    return train.select(np.arange(10), "test")


LISTED = {"x/1.png": CLASSES["cat/2.png"], "x/2.png": CLASSES["dog/b.png"], "3.png": CLASSES["cat/10.png"]}


class TestTables:
    def listed(self, tmp_path: Path, **tables: bytes) -> tuple[RawSplit, ...]:
        files = {f"{name}.csv": content for name, content in tables.items()}
        return folder(write_tree(tmp_path, {**LISTED, **files}))

    @pytest.mark.parametrize("separator", [",", ";", "\t"])
    @pytest.mark.parametrize(
        "header", [("path", "label"), ("File", "Class"), ("filename", "target"), ("IMAGE", "label")]
    )
    def test_a_lone_table_is_a_train_part(self, tmp_path: Path, header: tuple[str, str], separator: str) -> None:
        rows = (header, ("x/1.png", "cat"), ("3.png", "a, dog"), ("x\\2.png", "cat"))
        (train,) = self.listed(tmp_path, labels=table(*rows, separator=separator))
        assert (train.classes, train.labels.tolist()) == (("a, dog", "cat"), [1, 0, 1])
        assert paths(train) == ["x/1.png", "3.png", "x/2.png"]
        assert [file.name for file in train.files] == ["labels.csv", f"pictures of {tmp_path.name}"]

    def test_tables_of_parts(self, tmp_path: Path) -> None:
        parts = self.listed(
            tmp_path,
            train=table(("path", "label"), ("x/1.png", "10"), ("x/2.png", "9")),
            validation=table(("label", "path", "note"), ("9", "3.png", "")),
        )
        assert [part.name for part in parts] == ["train", "val"]
        assert parts[1].classes == ("9", "10") and parts[1].labels.tolist() == [0]

    def test_pictures_may_lie_in_the_directory_of_the_part(self, tmp_path: Path) -> None:
        files = {"train/1.png": CLASSES["cat/2.png"], "train.csv": table(("path", "label"), ("1.png", "cat"))}
        assert paths(folder(write_tree(tmp_path, files))[0]) == ["train/1.png"]

    def test_other_columns_are_named(self, tmp_path: Path) -> None:
        write_tree(tmp_path, {**LISTED, "labels.csv": table(("id", "digit"), ("3.png", "7"))})
        (train,) = folder(tmp_path, image_column="id", label_column="digit")
        assert train.classes == ("7",)
        assert folder(tmp_path, image_column="id")[0].classes == ("7",)
        write_tree(tmp_path, {"labels.csv": table(("id", "digit", "site"), ("3.png", "7", "a"))})
        error = refusal(lambda: folder(tmp_path, image_column="id"))
        assert "columns id, digit, site" in error.found and "--label-column" in error.hint
        (tmp_path / "labels.csv").unlink()
        assert "without a CSV table" in refusal(lambda: folder(tmp_path, label_column="digit")).found

    @pytest.mark.parametrize("name", ["annotations.csv", "img/annotations.csv", "metadata.tsv", "img/labels_v2.csv"])
    @pytest.mark.parametrize("column", ["filename", "file_name", "id", "whatever"])
    @pytest.mark.parametrize("extension", [".png", ""])
    def test_a_table_of_any_name_counts(self, tmp_path: Path, name: str, column: str, extension: str) -> None:
        """Pictures in `img/`, their names without directory or extension, and other columns."""
        rows = ((column, "label", "site"), (f"1{extension}", "cat", "A"), (f"2{extension}", "dog", "B"))
        images = {f"img/{number}.png": picture(pixels(seed=number)) for number in (1, 2)}
        (train,) = folder(write_tree(tmp_path, {**images, name: table(*rows)}))
        assert (train.classes, train.labels.tolist()) == (("cat", "dog"), [0, 1])
        assert paths(train) == ["img/1.png", "img/2.png"] and train.columns["site"].tolist() == ["A", "B"]
        np.testing.assert_array_equal(read_all(train), [pixels(seed=1), pixels(seed=2)])

    @pytest.mark.parametrize("path", ["img", "img_path", "Picture"])
    @pytest.mark.parametrize("number", ["", "id", "idx", "image_id"])
    def test_numbers_of_rows_are_not_taken_for_names_of_numbered_images(
        self, tmp_path: Path, number: str, path: str
    ) -> None:
        """As pandas writes an index: `0` is also the name of 0.png without extension."""
        images = {f"x/{name}.png": picture(pixels(seed=name)) for name in range(4)}
        rows = [(str(row), f"x/{3 - row}.png", "high" if row < 2 else "low") for row in range(4)]
        (train,) = folder(write_tree(tmp_path, {**images, "labels.csv": table((number, path, "label"), *rows)}))
        assert paths(train) == ["x/3.png", "x/2.png", "x/1.png", "x/0.png"]
        assert [train.classes[label] for label in train.labels] == ["high", "high", "low", "low"]

    def test_two_columns_that_name_different_images_are_refused(self, tmp_path: Path) -> None:
        images = {f"{name}.png": picture(pixels(seed=name)) for name in range(4)}
        for ending in ("", ".png"):
            rows = [(f"{row}{ending}", f"{3 - row}{ending}", "a") for row in range(4)]
            write_tree(tmp_path, {**images, "labels.csv": table(("before", "after", "label"), *rows)})
            error = refusal(lambda: folder(tmp_path))
            assert "columns before, after name different images" in error.found
            assert error.hint == "choose one: --image-column before"
            assert paths(folder(tmp_path, image_column="after")[0]) == [f"{3 - row}.png" for row in range(4)]

    def test_a_column_of_masks_is_not_that_of_images(self, tmp_path: Path) -> None:
        images = {f"{kind}/{name}.png": picture(pixels(seed=name)) for kind in "am" for name in range(3)}
        rows = [(f"m/{row}.png", f"a/{row}.png", str(row)) for row in range(3)]
        write_tree(tmp_path, {**images, "labels.csv": table(("mask", "image", "label"), *rows)})
        assert paths(folder(tmp_path)[0]) == [f"a/{row}.png" for row in range(3)]

    def test_a_table_without_column_names(self, tmp_path: Path) -> None:
        for rows in ([("3.png", "7"), ("x/1.png", "8")], [("7", "3.png"), ("8", "x/1.png")]):
            (train,) = self.listed(tmp_path, labels=table(*rows))
            assert paths(train) == ["3.png", "x/1.png"] and train.classes == ("7", "8")
        error = refusal(lambda: self.listed(tmp_path, labels=table(("3.png", "7", "a"), ("x/1.png", "8", "b"))))
        assert "labels.csv line 1: the path of an image, '3.png'" in error.found

    def test_predictions_for_the_test_split_are_no_labels(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        rows = [(name.removeprefix("test/"), "dog") for name in PARTS if name.startswith("test/")]
        for name in ("submission.csv", "x/my_predictions.csv"):
            files = {f"x/{path}": content for path, content in PARTS.items()} if name.startswith("x/") else PARTS
            directory = tmp_path / name.replace("/", "-")
            parts = folder(write_tree(directory, {**files, name: table(("file", "species"), *rows)}))
            assert [(part.name, part.labels.tolist()) for part in parts] == [
                ("train", [0, 0, 1, 1]),
                ("test", [0, 0, 1, 1]),
            ]
            assert f"not used as tables of the images: {name}" in capsys.readouterr().err

    def test_names_are_the_same_in_both_normal_forms(self, tmp_path: Path) -> None:
        composed, decomposed = "caf\u00e9", "cafe\u0301"
        images = {f"{decomposed}{row}.png": picture(pixels(seed=row)) for row in range(2)}
        rows = [(f"{composed}0.png", composed), (f"{decomposed}1.png", decomposed)]
        (train,) = folder(write_tree(tmp_path, {**images, "labels.csv": table(("file", "label"), *rows)}))
        assert (train.classes, train.labels.tolist()) == ((composed,), [0, 0])
        np.testing.assert_array_equal(read_all(train), [pixels(seed=0), pixels(seed=1)])

    def test_a_separator_in_a_column_name(self, tmp_path: Path) -> None:
        rows = (("file", "label", "notes (a, b, c)"), ("3.png", "7", ""), ("x/1.png", "8", "a, b"))
        for name in ("labels.csv", "labels.tsv"):
            write_tree(tmp_path / name, {**LISTED, name: table(*rows, separator="\t")})
            assert folder(tmp_path / name)[0].classes == ("7", "8")

    def test_a_table_that_does_not_help_is_named(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        notes = table(("day", "weather"), ("monday", "rain"))
        error = refusal(lambda: folder(write_tree(tmp_path / "one", {"img/1.png": picture(pixels()), "x.csv": notes})))
        assert "one class, 'img', and x.csv without a column of image files" in error.found
        assert folder(write_tree(tmp_path / "two", {**CLASSES, "x.csv": notes}))[0].classes == ("cat", "dog")
        assert "not used as tables of the images: x.csv" in capsys.readouterr().err

    @pytest.mark.parametrize("column", ["name", "class"])
    def test_a_table_of_the_classes_is_not_one_of_their_images(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], column: str
    ) -> None:
        images = {
            f"{kind}/{n}.png": picture(pixels(seed=n))
            for first, kind in ((0, "cat"), (5, "dog"))
            for n in range(first, first + 5)
        }
        classes = table(("id", column), ("0", "Cat"), ("1", "Dog"))
        (train,) = folder(write_tree(tmp_path, {**images, "classes.csv": classes}))
        assert (train.classes, train.class_counts().tolist()) == (("cat", "dog"), [5, 5])
        assert "not used as tables of the images: classes.csv" in capsys.readouterr().err

    def test_images_that_no_table_lists_are_named(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.listed(tmp_path, labels=table(("path", "label"), ("3.png", "a"), ("x/1.png", "b")))
        assert "not used: 1 images that no table lists (x/2.png)" in capsys.readouterr().err

    def test_a_column_of_splits_divides_a_table(self, tmp_path: Path) -> None:
        rows = (("3.png", "a", "train"), ("x/1.png", "a", "Validation"), ("x/2.png", "a", "test"))
        parts = self.listed(tmp_path, labels=table(("path", "label", "split"), *rows))
        assert {part.name: paths(part) for part in parts} == {
            "train": ["3.png"],
            "val": ["x/1.png"],
            "test": ["x/2.png"],
        }
        wrong = table(("path", "label", "split"), ("3.png", "a", "train"), ("x/1.png", "a", "fold 1"))
        assert "line 3: the split 'fold 1'" in refusal(lambda: self.listed(tmp_path, labels=wrong)).found

    def test_tables_are_named_after_their_splits(self, tmp_path: Path) -> None:
        tables = {
            name: table(("path", "label"), (path, "a"))
            for name, path in (("birds_train", "3.png"), ("birds_validation", "x/1.png"), ("birds-test-v2", "x/2.png"))
        }
        assert {part.name: paths(part) for part in self.listed(tmp_path, **tables)} == {
            "train": ["3.png"],
            "val": ["x/1.png"],
            "test": ["x/2.png"],
        }

    def test_tables_may_lie_in_the_directories_of_their_splits(self, tmp_path: Path) -> None:
        """As the Hugging Face Hub reads a folder of images."""
        files = {
            f"{split}/{name}": content
            for split, label in (("train", "a"), ("test", "a"))
            for name, content in (
                ("metadata.csv", table(("file_name", "label"), ("1.png", label))),
                ("1.png", picture(pixels())),
            )
        }
        parts = folder(write_tree(tmp_path, files))
        assert {part.name: paths(part) for part in parts} == {"train": ["train/1.png"], "test": ["test/1.png"]}

    def test_a_test_table_without_labels_is_not_used(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """As Kaggle publishes it, with a sample of a submission."""
        train, test = table(("id", "breed"), ("1", "pug"), ("2", "boxer")), table(("id",), ("3",))
        images = {"train/1.png": picture(pixels()), "train/2.png": picture(pixels()), "test/3.png": picture(pixels())}
        tables = {"train.csv": train, "test.csv": test, "sample_submission.csv": table(("id", "breed"), ("3", "pug"))}
        (only,) = folder(write_tree(tmp_path, {**images, **tables}))
        assert (paths(only), only.classes) == (["train/1.png", "train/2.png"], ("boxer", "pug"))
        assert "not used as tables of the images: sample_submission.csv, test.csv" in capsys.readouterr().err

    @pytest.mark.parametrize("raw", ["in", "in/x/..", "link"])
    def test_absolute_paths_inside_the_directory_are_read(self, tmp_path: Path, raw: str) -> None:
        rows = (("path", "label"), (f"{tmp_path}/in/3.png", "a"), (f"{tmp_path}/in/x/1.png", "b"))
        self.listed(tmp_path / "in", labels=table(*rows))
        (tmp_path / "link").symlink_to("in")
        assert paths(folder(tmp_path / raw)[0]) == ["3.png", "x/1.png"]

    def test_absolute_paths_may_have_backslashes(self, tmp_path: Path) -> None:
        directory = str(tmp_path).replace("/", "\\")
        rows = (("path", "label"), (f"{directory}\\3.png", "a"), (f"{directory}\\x\\1.png", "b"))
        self.listed(tmp_path, labels=table(*rows))
        assert paths(folder(tmp_path)[0]) == ["3.png", "x/1.png"]

    def test_a_name_that_is_no_text_is_escaped(self, tmp_path: Path) -> None:
        content = table(("path", "label"), ("3.png", "a"), ("x/1.png", "b"))
        name = os.fsdecode(b"train_\xe9.csv")
        (train,) = folder(write_tree(tmp_path, {name: content, **{n: picture(pixels()) for n in ("3.png", "x/1.png")}}))
        assert train.files[0].name == "train_\\udce9.csv"

    def test_a_name_that_may_be_two_images_is_refused(self, tmp_path: Path) -> None:
        files = {
            "a/1.png": picture(pixels()),
            "b/1.png": picture(pixels()),
            "t.csv": table(("file", "label"), ("1", "x")),
        }
        assert "'1', which may be a/1.png or b/1.png" in refusal(lambda: folder(write_tree(tmp_path, files))).found

    def test_bad_rows_are_named_together_and_skipped_on_request(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        content = table(("path", "label"), ("3.png", "a"), ("4.png", "a"), ("x/1.png", ""), ("x/2.png", "b"))
        error = refusal(lambda: self.listed(tmp_path, labels=content))
        assert "line 3: the path '4.png'" in error.found and "line 4: no label" in error.found
        assert paths(folder(tmp_path, skip_bad=True)[0]) == ["3.png", "x/2.png"]
        assert "skipped 2 rows of" in capsys.readouterr().err

    def test_excel_writes_a_mark_before_the_header(self, tmp_path: Path) -> None:
        (train,) = self.listed(tmp_path, labels=b"\xef\xbb\xbf" + table(("path", "label"), ("3.png", "café")))
        assert train.classes == ("café",)

    @pytest.mark.parametrize("path", ["../3.png", "/etc/3.png", "x/../../3.png", "C:/3.png", "..\\3.png"])
    def test_a_path_that_leads_outside_is_refused(self, tmp_path: Path, path: str) -> None:
        content = table(("path", "label"), ("3.png", "a"), (path, "b"))
        error = refusal(lambda: self.listed(tmp_path / "in", labels=content))
        assert "labels.csv line 3: the path" in error.found and "leads out of the directory" in error.found

    @pytest.mark.parametrize(
        "content, words",
        [
            (b"", "labels.csv: it is empty"),
            (b"path,label\n", "labels.csv: only one line in it"),
            (b"path,label\n3.png,\n", "line 2: no label for '3.png'"),
            (b"path,label\n3.png,a\n4.png,a\n", "line 3: the path '4.png', where no image is"),
            (b"path,label\n3.png,a\n,b\n", "line 3: no path"),
            (b"path,label\nlabels.csv,a\n", "line 2: the path 'labels.csv', where no image is"),
            (b"path,label\n3.png,a\n\n3.png,b\n", "line 4: '3.png' again, after "),
            (b"path,label\n3.png\n", "line 2: 1 field where the first line has 2"),
            (b"path,label\n3.png,a,b\n", "line 2: 3 fields where the first line has 2"),
            (b"path,label,Label\n3.png,a,b\n", "line 1: two columns named 'Label'"),
            (b"name,label\n4.png,a\n", "with the columns name, label"),
            (b"path\n3.png\n", "with the columns path"),
            (b"path,label\n3.png,\0a\n", "line 2: a zero byte"),
            (b"path,label\n3.png,\xff\xfe\n", "line 2: byte 0xff, which is not UTF-8"),
            (b'path,label\n"3.png,a\n', "unexpected end of data"),
            (b"\x1f\x8b\x08\0\0\0\0\0\0\3", "byte 0x8b, which is not UTF-8"),
            (b"path,label\n3.png," + b"a" * 200_000 + b"\n", "field larger than field limit"),
        ],
    )
    def test_anything_else_is_refused_by_its_line(self, tmp_path: Path, content: bytes, words: str) -> None:
        assert words in refusal(lambda: self.listed(tmp_path, labels=content)).found

    def test_a_picture_in_two_parts_is_refused(self, tmp_path: Path) -> None:
        content = table(("path", "label"), ("3.png", "a"))
        error = refusal(lambda: self.listed(tmp_path, train=content, test=content))
        assert f"test.csv line 2: '3.png' again, after {tmp_path}/train.csv line 2" in error.found

    def test_a_class_without_training_images_is_refused(self, tmp_path: Path) -> None:
        train, test = table(("path", "label"), ("3.png", "a")), table(("path", "label"), ("x/1.png", "b"))
        assert "no training images of b" in refusal(lambda: self.listed(tmp_path, train=train, test=test)).found

    def test_a_test_table_alone_is_refused(self, tmp_path: Path) -> None:
        content = table(("path", "label"), ("3.png", "a"))
        assert "without a train.csv" in refusal(lambda: self.listed(tmp_path, test=content)).found

    def test_two_tables_of_a_part_are_refused(self, tmp_path: Path) -> None:
        content = table(("path", "label"), ("3.png", "a"))
        assert (
            "two tables of the train split"
            in refusal(lambda: self.listed(tmp_path, train=content, labels=content)).found
        )

    @given(st.binary(max_size=60))
    def test_noise_is_refused(self, tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
        directory = write_tree(tmp_path_factory.mktemp("noise"), {"1.png": b"", "labels.csv": content})
        assert "labels.csv" in refusal(lambda: folder(directory)).found


SIZES = {
    "a/1.png": picture(pixels(8, 8)),
    "a/2.png": picture(pixels(8, 8, seed=1)),
    "b/3.png": picture(pixels(20, 10)),
}


class TestSizes:
    @pytest.mark.parametrize("has_dali", [True, False])
    def test_that_differ_are_refused_naming_two(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_dali: bool
    ) -> None:
        monkeypatch.setattr("pipeline.readers.image_splits.has_dali", lambda: has_dali)
        write_tree(tmp_path, SIZES)
        error = refusal(lambda: folder(tmp_path))
        assert f"{tmp_path}/a/1.png of 8 x 8 pixels, {tmp_path}/b/3.png of 20 x 10" in error.found
        assert "--size 64" in error.hint and ("--store records" in error.hint) == has_dali

    def test_are_made_one(self, tmp_path: Path) -> None:
        write_tree(tmp_path, SIZES)
        for fit in ("pad", "crop", "stretch"):
            (train,) = folder(tmp_path, size=(16, 12), fit=fit)
            assert train.image_shape == (16, 12, 1)
            assert read_all(train).shape == (3, 16, 12, 1)

    def test_between_parts_count_too(self, tmp_path: Path) -> None:
        write_tree(tmp_path, {"train/a/1.png": picture(pixels(8, 8)), "test/a/1.png": picture(pixels(8, 9))})
        assert "test/a/1.png of 8 x 9" in refusal(lambda: folder(tmp_path)).found

    def test_are_those_after_turning(self, tmp_path: Path) -> None:
        from support.image_files import turned_exif

        files = {"a/1.png": picture(pixels(8, 6)), "b/2.png": picture(pixels(6, 8), exif=turned_exif(6))}
        assert folder(write_tree(tmp_path, files))[0].image_shape == (8, 6, 1)


class TestColor:
    def test_one_colored_picture_makes_the_set_colored(self, tmp_path: Path) -> None:
        gray = {"train/a/1.png": picture(pixels()), "test/a/1.png": picture(pixels())}
        assert [part.image_shape for part in folder(write_tree(tmp_path, gray))] == [(8, 8, 1)] * 2
        write_tree(tmp_path, {"test/a/2.png": picture(pixels(channels=3))})
        assert [part.image_shape for part in folder(tmp_path)] == [(8, 8, 3)] * 2

    def test_it_can_be_chosen(self, tmp_path: Path) -> None:
        write_tree(tmp_path, {"a/1.png": picture(pixels()), "b/2.png": picture(pixels(channels=3))})
        assert folder(tmp_path, color="gray")[0].image_shape == (8, 8, 1)
        assert folder(tmp_path, color="rgb", size=(9, 9))[0].image_shape == (9, 9, 3)


class TestRecords:
    def test_files_are_kept_as_they_are(self, tmp_path: Path) -> None:
        files = {"a/1.jpeg": picture(pixels(9, 9, 3), "JPEG"), "a/2.png": picture(pixels(5, 7)), "b/3.png": b"\0"}
        files["b/3.png"] = picture(pixels(4, 4, 3), "WEBP")  # the content tells, not the name
        (train,) = folder(write_tree(tmp_path, files), encoded=True)
        assert train.encoded and train.image_shape == (None, None, 3)
        extensions = ("jpg", "png", "webp")
        assert read_all(train) == list(map(EncodedImage, files.values(), extensions))

    def test_a_size_is_refused(self, tmp_path: Path) -> None:
        error = refusal(lambda: folder(write_tree(tmp_path, CLASSES), encoded=True, size=(8, 8)))
        assert "--size 8x8 with --store records" in error.found

    def test_bad_ones_are_named(self, tmp_path: Path) -> None:
        files = {**CLASSES, "cat/5.gif": picture(pixels(), "GIF"), "cat/6.jpg": picture(pixels(), "JPEG")[:-30]}
        (train,) = folder(write_tree(tmp_path, files), encoded=True)
        assert [paths(train)[row] for row in unreadable(train)] == ["cat/6.jpg"]


BAD = {
    "cat/3.png": b"a text",
    "cat/4.png": b"",
    "dog/5.jpg": picture(pixels(channels=1), "JPEG")[:-10],
    "dog/6.png": png_claiming(60_000, 60_000),
    "dog/7.png": picture(pixels())[:-30],
}


class TestUnreadablePictures:
    def test_all_of_them_are_named_with_what_is_wrong(self, tmp_path: Path) -> None:
        (train,) = folder(write_tree(tmp_path, {**CLASSES, **BAD}))
        reasons = unreadable(train)
        assert [paths(train)[row] for row in reasons] == natural_order(BAD)
        for row, words in zip(reasons, ("not a PNG", "not a PNG", "truncated", "pixels", "truncated"), strict=True):
            assert reasons[row].startswith(f"{tmp_path}/{paths(train)[row]}: ") and words in reasons[row]
        good = np.setdiff1d(train.source_index, list(reasons))
        np.testing.assert_array_equal(train.read(good), np.stack(list(IMAGES.values())))

    def test_the_pack_fails_with_all_their_names_and_leaves_nothing(self, tmp_path: Path) -> None:
        write_tree(
            tmp_path / "set", {f"{part}/{n}": c for part in ("train", "test") for n, c in {**CLASSES, **BAD}.items()}
        )
        with pytest.raises(UserError) as caught:
            pack(lambda: folder(tmp_path / "set"), tmp_path / "out", PackSettings("set", block_size=2), workers=2)
        for name in BAD:
            assert f"train/{name}: " in caught.value.found and f"test/{name}: " in caught.value.found
        assert not (tmp_path / "out").exists()

    def test_those_in_archives_are_named(self, tmp_path: Path) -> None:
        place = write_zip(tmp_path / "set.zip", {**CLASSES, **BAD})
        assert unreadable(folder(place)[0])[2].startswith(f"{place}:cat/4.png: ")

    def test_where_there_are_no_others_all_are_named(self, tmp_path: Path) -> None:
        (train,) = folder(write_tree(tmp_path, BAD))
        assert len(unreadable(train)) == len(BAD)

    def test_a_picture_that_vanishes_is_named(self, tmp_path: Path) -> None:
        (train,) = folder(write_tree(tmp_path, CLASSES))
        (tmp_path / "cat" / "2.png").unlink()
        assert unreadable(train) == {0: f"{tmp_path}/cat/2.png: No such file or directory"}

    def test_a_picture_that_changes_its_size_is_named(self, tmp_path: Path) -> None:
        (train,) = folder(write_tree(tmp_path, CLASSES))
        write_tree(tmp_path, {"cat/2.png": picture(pixels(9, 9))})
        assert unreadable(train) == {0: f"{tmp_path}/cat/2.png: of 9 x 9 pixels, where others have 8 x 8"}


class TestNaturalOrder:
    def test_numbers_count_by_value(self) -> None:
        names = ["a10", "a9", "a09", "b", "a", "10", "9", "a1b2", "a1b10", "a/2", "a/10", "a-1", ""]
        assert natural_order(names) == [
            "",
            "9",
            "10",
            "a",
            "a/2",
            "a/10",
            "a1b2",
            "a1b10",
            "a09",
            "a9",
            "a10",
            "a-1",
            "b",
        ]

    @given(st.lists(st.text(alphabet="a0129/-", max_size=6), unique=True), st.randoms())
    def test_it_is_one_order(self, names: list[str], random) -> None:
        shuffled = names.copy()
        random.shuffle(shuffled)
        assert natural_order(shuffled) == natural_order(names)

    def test_a_number_of_any_length_is_compared(self) -> None:
        huge = "9" * 10_000
        assert natural_order([huge, "8" * 10_000, "1" + "0" * 10_000])[-1].startswith("10")


class TestCommand:
    def test_packs_genuine_pictures(self, shared_data: Path, tmp_path: Path) -> None:
        place = shared_data / "cifar10" / "cifar10-jpg-subset.zip"
        process = run_module("pipeline.shard", "folder", "--raw", place, "--out", tmp_path / "out", cwd=tmp_path)
        assert process.returncode == 0, process.stderr
        store = open_split(tmp_path / "out", "train")
        assert (len(store), store.manifest.image_shape) == (10_000, (32, 32, 3))
        assert store.manifest.counts == (1000,) * 10
        assert store.manifest.classes[:3] == ("airplane", "automobile", "bird")
