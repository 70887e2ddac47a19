"""The sources `npz` and `parquet`: every form in which arrays and tables of pictures come, and hostile ones."""

from __future__ import annotations

import json
import pickle
import sys
import zipfile
from decimal import Decimal
from pathlib import Path

import numpy as np
import pyarrow as arrow
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from support.raw_files import (
    in_a_process,
    load,
    picture,
    pixels,
    png_claiming,
    read_all,
    refusal,
    unreadable,
    write_tree,
    write_zip,
)

from pipeline.readers.raw_split import RawSplit, UnreadableImages
from shards import UserError

GRAY = np.random.default_rng(0).integers(0, 256, (20, 8, 9), np.uint8)
COLOR = np.random.default_rng(1).integers(0, 256, (20, 8, 9, 3), np.uint8)
LABELS = np.arange(20) % 3
KERAS = {"x_train": GRAY, "y_train": LABELS, "x_test": GRAY[:5], "y_test": LABELS[:5]}


def npz(path: Path, arrays: dict[str, np.ndarray], compressed: bool = False) -> Path:
    (np.savez_compressed if compressed else np.savez)(path, **arrays)
    return path


def load_npz(tmp_path: Path, **arrays: np.ndarray) -> tuple[RawSplit, ...]:
    return load("npz", npz(tmp_path / "a.npz", arrays))


def npy_header(shape: tuple[int, ...] | str, descr: str = "'|u1'") -> bytes:
    header = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}".ljust(117).encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header


class TestNpz:
    @pytest.mark.parametrize("compressed", [False, True])
    @pytest.mark.parametrize(
        "names",
        [
            ("x_train", "y_train", "x_test", "y_test"),
            ("train_images", "train_labels", "test_images", "test_labels"),
            ("X_Train", "Y_Train", "X_Test", "Y_Test"),
            ("images_training", "labels_training", "images_testing", "labels_testing"),
        ],
    )
    def test_parts_in_one_file(self, tmp_path: Path, names: tuple[str, ...], compressed: bool) -> None:
        arrays = dict(zip(names, KERAS.values(), strict=True))
        train, test = load("npz", npz(tmp_path / "a.npz", {**arrays, "ids": LABELS}, compressed))
        assert (train.name, train.image_shape, train.classes) == ("train", (8, 9, 1), ("0", "1", "2"))
        np.testing.assert_array_equal(read_all(train)[..., 0], GRAY)
        np.testing.assert_array_equal(train.read(np.array([7, 0, 7]))[..., 0], GRAY[[7, 0, 7]])
        assert (test.name, test.labels.tolist()) == ("test", LABELS[:5].tolist())
        assert [file.name for file in test.files] == ["a.npz"]

    @pytest.mark.parametrize("names", [("x", "y"), ("images", "labels"), ("imgs", "labels")])
    def test_a_pair_is_a_train_part(self, tmp_path: Path, names: tuple[str, str]) -> None:
        (train,) = load_npz(tmp_path, **dict(zip(names, (COLOR, LABELS), strict=True)))
        assert (train.name, train.image_shape) == ("train", (8, 9, 3))
        np.testing.assert_array_equal(read_all(train), COLOR)

    def test_files_of_parts(self, tmp_path: Path) -> None:
        for name in ("train", "test", "validation"):
            npz(tmp_path / f"{name}.npz", {"x": GRAY, "y": LABELS})
        assert [part.name for part in load("npz", tmp_path)] == ["train", "test", "val"]

    def test_images_and_labels_of_a_part_may_lie_in_two_files(self, tmp_path: Path) -> None:
        npz(tmp_path / "train.npz", {"x": GRAY, "y": LABELS, "x_test": GRAY[::-1]})
        npz(tmp_path / "test.npz", {"y": LABELS})
        train, test = load("npz", tmp_path)
        np.testing.assert_array_equal(read_all(test), read_all(train)[::-1])
        assert [file.name for file in test.files] == ["test.npz", "train.npz"]

    def test_the_class_names_may_lie_in_any_file(self, tmp_path: Path) -> None:
        names = np.array(["zebra", "cat", "dog"])
        npz(tmp_path / "test.npz", {"x": GRAY, "y": LABELS})
        npz(tmp_path / "train.npz", {"x": GRAY, "y": LABELS, "classes": names})
        assert {split.classes for split in load("npz", tmp_path)} == {tuple(names)}

    def test_the_only_file_of_a_directory(self, tmp_path: Path) -> None:
        npz(tmp_path / "mnist.npz", KERAS)
        assert [part.name for part in load("npz", tmp_path)] == ["train", "test"]

    @pytest.mark.parametrize("order", ["C", "F"])
    @pytest.mark.parametrize("compressed", [False, True])
    def test_planes_of_color_are_put_together(self, tmp_path: Path, order: str, compressed: bool) -> None:
        planes = np.array(COLOR.transpose(0, 3, 1, 2), order=order)
        (train,) = load("npz", npz(tmp_path / "a.npz", {"x": planes, "y": LABELS}, compressed))
        assert train.image_shape == (8, 9, 3)
        np.testing.assert_array_equal(read_all(train), COLOR)

    @pytest.mark.parametrize("kind", [np.int64, np.uint16, np.int32, ">i2"])
    def test_whole_numbers_of_any_type_are_images(self, tmp_path: Path, kind: object) -> None:
        (train,) = load_npz(tmp_path, x=GRAY.astype(kind), y=LABELS)
        np.testing.assert_array_equal(read_all(train)[..., 0], GRAY)
        assert read_all(train).dtype == np.uint8

    @pytest.mark.parametrize(
        "labels, classes",
        [
            (LABELS, ("0", "1", "2")),
            (LABELS.astype(np.uint8)[:, None], ("0", "1", "2")),
            (LABELS * 5 + 5, ("5", "10", "15")),
            (np.eye(3)[LABELS], ("0", "1", "2")),
            (np.eye(3, dtype=bool)[LABELS], ("0", "1", "2")),
            (np.array(["a10", "a9", "b"])[LABELS], ("a9", "a10", "b")),
            (np.array([b"x", b"y", b"z"])[LABELS], ("x", "y", "z")),
        ],
    )
    def test_labels_of_many_kinds(self, tmp_path: Path, labels: np.ndarray, classes: tuple[str, ...]) -> None:
        (train,) = load_npz(tmp_path, x=GRAY, y=labels)
        assert train.classes == classes
        expected = [1, 0, 2] if "a9" in classes else [0, 1, 2]
        assert train.labels.tolist() == [expected[label] for label in LABELS]

    @pytest.mark.parametrize("name", ["classes", "class_names"])
    def test_class_names(self, tmp_path: Path, name: str) -> None:
        (train,) = load_npz(tmp_path, x=GRAY, y=LABELS, **{name: np.array(["zebra", "cat", "dog", "unused"])})
        assert (train.classes, train.labels.tolist()) == (("zebra", "cat", "dog", "unused"), LABELS.tolist())
        (train,) = load_npz(tmp_path, x=GRAY, y=np.array(["cat", "dog"])[LABELS % 2], classes=np.array(["dog", "cat"]))
        assert (train.classes, train.labels.tolist()) == (("dog", "cat"), (1 - LABELS % 2).tolist())

    @pytest.mark.parametrize(
        "changed, words",
        [
            ({"x": GRAY / 255}, "a.npz:x, float64 [20, 8, 9]"),
            ({"x": GRAY.astype(np.float32)}, "a.npz:x, float32 [20, 8, 9]"),
            ({"x": GRAY > 9}, "a.npz:x, bool [20, 8, 9]"),
            ({"x": GRAY.astype(int) * 3}, "a.npz:x, int64 [20, 8, 9]"),
            ({"x": GRAY.astype(int) - 1}, "a.npz:x, int64 [20, 8, 9]"),
            ({"x": GRAY.reshape(20, 72)}, "a.npz:x, uint8 [20, 72]"),
            ({"x": GRAY[..., None].repeat(2, 3)}, "a.npz:x, uint8 [20, 8, 9, 2]"),
            ({"x": np.zeros((20, 3, 5, 3), np.uint8)}, "a.npz:x, uint8 [20, 3, 5, 3]"),
            ({"x": GRAY[:0]}, "0 images in"),
            ({"x": np.uint8(3)}, "a.npz:x, uint8 []"),
            ({"x": np.array(["text"])}, "a.npz:x, <U4 [1]"),
            ({"y": LABELS[:19]}, "20 images in"),
            ({"y": LABELS / 2}, "a.npz:y, float64 [20]"),
            ({"y": np.eye(3)[LABELS] * 0.9}, "a.npz:y, float64 [20, 3]"),
            ({"y": np.ones((20, 3))}, "a.npz:y, float64 [20, 3]"),
            ({"y": LABELS.reshape(20, 1, 1)}, "a.npz:y, int64 [20, 1, 1]"),
            ({"y": LABELS[:0]}, "a.npz:y, int64 [0]"),
            ({"classes": np.array(["a", "b"])}, "a.npz:y, int64 [20]"),
            ({"classes": np.array(["a", "b", "b"])}, "a.npz:classes, <U1 [3]"),
            ({"classes": np.array([1, 2, 3])}, "a.npz:classes, int64 [3]"),
            ({"y": LABELS - 1, "classes": np.array(["a", "b", "c"])}, "a.npz:y, int64 [20]"),
            ({"y": np.array(["q"] * 20), "classes": np.array(["a"])}, "a.npz:y, <U1 [20]"),
            ({"images": GRAY}, "both images of the train split"),
            ({"x_test": GRAY}, "only x_test for the test split"),
            ({"x_test": GRAY, "y_test": LABELS + 1}, "no training images of 3"),
        ],
    )
    def test_what_does_not_fit_is_refused_by_name(
        self, tmp_path: Path, changed: dict[str, np.ndarray], words: str
    ) -> None:
        assert words in refusal(lambda: load_npz(tmp_path, **{"x": GRAY, "y": LABELS, **changed})).found

    @pytest.mark.parametrize(
        "arrays, words",
        [
            ({}, "no array"),
            ({"a": GRAY, "b": GRAY}, "the arrays a, b"),
            ({"x": GRAY}, "only x for the train split"),
            ({"x_test": GRAY, "y_test": LABELS}, "only test arrays"),
        ],
    )
    def test_arrays_of_other_names_are_refused(self, tmp_path: Path, arrays: dict, words: str) -> None:
        assert words in refusal(lambda: load_npz(tmp_path, **arrays)).found

    def test_directories_without_a_choice_are_refused(self, tmp_path: Path) -> None:
        assert "no npz file" in refusal(lambda: load("npz", tmp_path)).found
        for name in ("a", "b"):
            npz(tmp_path / f"{name}.npz", KERAS)
        assert "the npz files a.npz, b.npz" in refusal(lambda: load("npz", tmp_path)).found
        npz(tmp_path / "val.npz", KERAS), npz(tmp_path / "valid.npz", KERAS)
        assert "several files of one split" in refusal(lambda: load("npz", tmp_path)).found


class Touch:
    """An object that, unpickled, makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


class TestHostileNpz:
    def members(self, tmp_path: Path, **members: bytes) -> UserError:
        files = {f"{name}.npy": content for name, content in members.items()}
        return refusal(lambda: load("npz", write_zip(tmp_path / "a.npz", files)))

    def test_objects_are_refused_and_none_is_made(self, tmp_path: Path) -> None:
        objects = np.empty(20, object)
        objects[:] = [Touch(tmp_path / "ran")] * 20
        error = refusal(lambda: load_npz(tmp_path, x=GRAY, y=objects))
        assert f"{tmp_path}/a.npz:y: it holds pickled objects" in error.found
        plain = pickle.dumps(Touch(tmp_path / "ran"))
        assert "a.npz:x: it is no array" in self.members(tmp_path, x=plain, y=plain).found
        assert not (tmp_path / "ran").exists()

    @pytest.mark.parametrize(
        "header, words",
        [
            (npy_header((-1, 8, 9)), "a shape of [-1, 8, 9]"),
            (npy_header((-20, -8, 9)), "a shape of [-20, -8, 9]"),
            (npy_header((1 << 40, 28, 28)), "862,017,116,176,512 bytes, where it has 1,568"),
            (npy_header((1 << 63, 1 << 63, 1 << 63)), "where it has 1,568"),
            (npy_header((20, 8, 9), "'>f8'"), "11,648 bytes, where it has 1,568"),
            (npy_header((20, 8, 9), "'|O'"), "pickled objects"),
            (npy_header((20, 8, 9), "[('a', '|O')]"), "pickled objects"),
            (npy_header((20, 8, 9), "[('a', '|u1')]"), "not numbers or texts"),
            (npy_header((20, 8, 9), "'M8[s]'"), "not numbers or texts"),
            (npy_header((20, 8, 9), "__import__('os').system('true')"), "it is no array"),
            (npy_header("(20, 8, 'x')"), "it is no array"),
            (npy_header("((" * 500), "it is no array"),
            (b"\x93NUMPY\x03\x00" + npy_header((20, 8, 9))[8:], "version (3, 0)"),
            (b"\x93NUMPY\x02\x00\xff\xff\xff\xff", "it is no array"),
            (b"", "it is no array"),
            (b"text", "it is no array"),
        ],
    )
    def test_headers_that_lie_are_refused(self, tmp_path: Path, header: bytes, words: str) -> None:
        good = npy_header((20, 8, 9)) + GRAY.tobytes()
        error = self.members(tmp_path, x=header + GRAY.tobytes(), y=good)
        assert f"{tmp_path}/a.npz:x: " in error.found and words in error.found

    def test_a_cut_array_is_refused(self, tmp_path: Path) -> None:
        good = npy_header((20, 8, 9)) + GRAY.tobytes()
        assert "1,568 bytes, where it has 1,567" in self.members(tmp_path, x=good[:-1], y=good).found

    def test_what_is_no_npz_is_refused(self, tmp_path: Path) -> None:
        for content in (b"", b"text", npy_header((3,)), pickle.dumps(Touch(tmp_path / "ran"))):
            (tmp_path / "a.npz").write_bytes(content)
            assert str(tmp_path / "a.npz") in refusal(lambda: load("npz", tmp_path / "a.npz")).found
        assert not (tmp_path / "ran").exists()

    @pytest.mark.parametrize("compressed", [False, True])
    @given(data=st.data())
    @settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
    def test_no_changed_value_is_taken(self, tmp_path: Path, compressed: bool, data: st.DataObject) -> None:
        path = npz(tmp_path / "a.npz", {"x": GRAY, "y": LABELS}, compressed)
        content = bytearray(path.read_bytes())
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
        path.write_bytes(content)
        try:
            (train,) = load("npz", path)
        except UserError as error:
            assert str(path) in error.found
        else:
            np.testing.assert_array_equal(read_all(train)[..., 0], GRAY)
            assert train.labels.tolist() == LABELS.tolist()

    def test_claims_and_bombs_take_little_memory(self, tmp_path: Path) -> None:
        """Half a gigabyte of zeros, compressed, in a process that may have little more."""
        with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED) as archive:
            with archive.open("x.npy", "w") as member:
                member.write(npy_header((500, 1024, 1024)))
                for _ in range(500):
                    member.write(bytes(1 << 20))
            archive.writestr("y.npy", npy_header((500,)) + bytes(500))
        code = f"""
from pathlib import Path
from pipeline.datasets import find_source
from pipeline.readers.raw_split import SourceOptions
from shards import UserError
try:
    find_source("npz").load(SourceOptions(Path({str(tmp_path / "a.npz")!r})))
except UserError as error:
    print(error.found)
"""
        (found,), memory = in_a_process(code)
        assert "it expands to more than" in found
        assert memory < 300


PICTURES = [picture(pixels(seed=seed)) for seed in range(12)]
HUB = {b"huggingface": json.dumps({"info": {"features": {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}}})}


def hub_table(pictures: list[bytes | None], labels: list | None = None, name: str = "image") -> arrow.Table:
    """As data-set hubs store pictures: a struct of bytes and path, and labels whose names the schema tells."""
    files = [{"bytes": content, "path": f"{row}.png"} for row, content in enumerate(pictures)]
    struct = arrow.struct([("bytes", arrow.binary()), ("path", arrow.string())])
    numbers = arrow.array([row % 2 for row in range(len(pictures))] if labels is None else labels, arrow.int64())
    table = arrow.table({name: arrow.array(files, struct), "label": numbers})
    return table.replace_schema_metadata(HUB)


def write_parquet(path: Path, table: arrow.Table, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(table, path, **options)
    return path


def plain_table(**columns: object) -> arrow.Table:
    return arrow.table({"image": PICTURES, "label": [row % 3 for row in range(12)], **columns})


class TestParquet:
    @pytest.mark.parametrize("folder", ["", "data/", "plain_text/"])
    def test_files_of_a_hub(self, tmp_path: Path, folder: str) -> None:
        for number, rows in enumerate((slice(0, 5), slice(5, 8))):
            name = f"{folder}train-{number:05}-of-00002-0123456789abcdef.parquet"
            write_parquet(tmp_path / name, hub_table(PICTURES[rows]), row_group_size=2)
        write_parquet(tmp_path / f"{folder}test-00000-of-00001.parquet", hub_table(PICTURES[8:]))
        write_tree(tmp_path, {"README.md": b"text"})
        train, test = load("parquet", tmp_path)
        assert (train.name, train.classes, train.image_shape) == ("train", ("cat", "dog"), (8, 8, 1))
        assert train.labels.tolist() == [0, 1, 0, 1, 0, 0, 1, 0]
        np.testing.assert_array_equal(read_all(train), np.stack([pixels(seed=seed) for seed in range(8)]))
        np.testing.assert_array_equal(train.read(np.array([7, 0])), [pixels(seed=7), pixels(seed=0)])
        assert train.columns["path"].tolist() == [*(f"{n}.png" for n in range(5)), *(f"{n}.png" for n in range(3))]
        assert [file.name for file in train.files] == sorted(path.name for path in tmp_path.glob(f"{folder}train*"))
        assert (test.name, len(test.labels)) == ("test", 4)

    def test_files_in_directories_of_parts(self, tmp_path: Path) -> None:
        for name in ("train/0000", "train/0001", "validation/0000"):
            write_parquet(tmp_path / f"{name}.parquet", hub_table(PICTURES))
        assert [(part.name, len(part.labels)) for part in load("parquet", tmp_path)] == [("train", 24), ("val", 12)]

    @pytest.mark.parametrize("column", ["split", "Split"])
    def test_a_column_of_splits_divides_a_table(self, tmp_path: Path, column: str) -> None:
        values = ["test", "train", "validation"] * 4
        labels = [row // 6 for row in range(12)]
        table = plain_table(**{column: values, "site": [f"s{row}" for row in range(12)], "label": labels})
        train, test, val = load("parquet", write_parquet(tmp_path / "a.parquet", table))
        assert (train.name, test.name, val.name) == ("train", "test", "val")
        for split, first in ((train, 1), (val, 2), (test, 0)):
            rows = range(first, 12, 3)
            np.testing.assert_array_equal(read_all(split), np.stack([pixels(seed=row) for row in rows]))
            assert split.labels.tolist() == labels[first::3]
            assert {name: values.tolist() for name, values in split.columns.items()} == {
                "site": [f"s{row}" for row in rows]
            }
        table = plain_table(split=["train"] * 11 + ["test"]).set_column(0, "image", [[*PICTURES[:11], b"nothing"]])
        _, test = load("parquet", write_parquet(tmp_path / "a.parquet", table), encoded=True)
        assert unreadable(test)[0].startswith(f"{tmp_path}/a.parquet row 11: not a PNG")

    def test_a_class_of_other_rows_than_those_for_training_is_refused(self, tmp_path: Path) -> None:
        path = write_parquet(tmp_path / "a.parquet", plain_table(split=["train", "train", "test"] * 4))
        assert "no training images of 2, a class of the test split" in refusal(lambda: load("parquet", path)).found

    @pytest.mark.parametrize("values", [["train", "holdout"], ["test", "val"], ["", "train"]])
    def test_other_values_of_a_column_of_splits_are_refused(self, tmp_path: Path, values: list[str]) -> None:
        path = write_parquet(tmp_path / "a.parquet", plain_table(split=values * 6))
        error = refusal(lambda: load("parquet", path))
        assert error.found == f"{path}, whose column split holds {', '.join(sorted(values))}"

    def test_one_file_is_a_train_part(self, tmp_path: Path) -> None:
        (train,) = load("parquet", write_parquet(tmp_path / "test.parquet", plain_table()))
        assert (train.name, train.classes, train.columns) == ("train", ("0", "1", "2"), {})
        assert train.labels.tolist() == [row % 3 for row in range(12)]

    @pytest.mark.parametrize(
        "texts", [arrow.string(), arrow.large_string(), arrow.dictionary(arrow.int8(), arrow.string())]
    )
    def test_labels_may_be_texts(self, tmp_path: Path, texts: arrow.DataType) -> None:
        labels = arrow.array([("b", "a10", "a9")[row % 3] for row in range(12)], texts)
        (train,) = load("parquet", write_parquet(tmp_path / "a.parquet", plain_table(label=labels)))
        assert (train.classes, train.labels.tolist()[:3]) == (("a9", "a10", "b"), [2, 1, 0])

    @pytest.mark.parametrize("image", ["img", "image", "anything"])
    @pytest.mark.parametrize("label", ["label", "labels", "fine_label"])
    def test_columns_are_found(self, tmp_path: Path, image: str, label: str) -> None:
        table = arrow.table(
            {"id": list(range(12)), image: arrow.array(PICTURES, arrow.large_binary()), label: [0] * 12}
        )
        assert len(load("parquet", write_parquet(tmp_path / "a.parquet", table))[0].labels) == 12

    def test_columns_are_named(self, tmp_path: Path) -> None:
        table = arrow.table({"thumb": PICTURES, "photo": PICTURES[::-1], "digit": [7] * 12, "label": [1] * 12})
        path = write_parquet(tmp_path / "a.parquet", table)
        error = refusal(lambda: load("parquet", path))
        assert "thumb (binary), photo (binary), digit (int64), label (int64)" in error.found
        assert "--image-column" in error.hint
        (train,) = load("parquet", path, image_column="photo", label_column="digit")
        assert train.classes == ("7",)
        np.testing.assert_array_equal(train.read(np.array([0]))[0], pixels(seed=11))
        for columns in ({"image_column": "digit"}, {"image_column": "photo", "label_column": "thumb"}):
            assert "with the columns" in refusal(lambda columns=columns: load("parquet", path, **columns)).found

    def test_sizes_colors_and_records_are_heeded(self, tmp_path: Path) -> None:
        path = write_parquet(tmp_path / "a.parquet", hub_table([picture(pixels(9, 7, 3)), picture(pixels(5, 5))]))
        assert "row 0 (0.png) of 9 x 7 pixels" in refusal(lambda: load("parquet", path)).found
        assert load("parquet", path, size=(6, 6))[0].image_shape == (6, 6, 3)
        (train,) = load("parquet", path, encoded=True)
        assert [image.extension for image in read_all(train)] == ["png", "png"]

    def test_bad_pictures_are_named_by_file_and_row(self, tmp_path: Path) -> None:
        pictures = [PICTURES[0], b"text", None, PICTURES[3][:-30], png_claiming(60_000, 60_000), PICTURES[5]]
        for number in range(2):
            write_parquet(tmp_path / f"train-{number}.parquet", hub_table(pictures), row_group_size=4)
        reasons = unreadable(load("parquet", tmp_path)[0])
        assert list(reasons) == [1, 2, 3, 4, 7, 8, 9, 10]
        assert reasons[1].startswith(f"{tmp_path}/train-0.parquet row 1 (1.png): not a PNG")
        assert reasons[8] == f"{tmp_path}/train-1.parquet row 2 (2.png): no bytes of an image"

    @pytest.mark.parametrize(
        "labels, words", [([0, None], "row 1: label None"), ([0, 2], "row 1: label 2"), ([-1, 0], "row 0: label -1")]
    )
    def test_labels_that_are_none_are_named_by_row(self, tmp_path: Path, labels: list, words: str) -> None:
        path = write_parquet(tmp_path / "a.parquet", hub_table(PICTURES[:2], labels))
        assert f"{path} {words}" in refusal(lambda: load("parquet", path)).found

    def test_rows_without_a_label_are_skipped_on_request(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """The Hub stores -1 where the labels of a test split are secret."""
        for number, labels in enumerate(([-1, 0, 1], [1, None, 0])):
            table = hub_table(PICTURES[3 * number : 3 * number + 3], labels)
            table = table.append_column("site", arrow.array([f"{number}-{row}" for row in range(3)]))
            write_parquet(tmp_path / f"train-{number}.parquet", table)
        write_parquet(tmp_path / "test-0.parquet", hub_table(PICTURES[6:9], [-1, -1, -1]))
        assert "--skip-bad" in refusal(lambda: load("parquet", tmp_path)).hint
        (train,) = load("parquet", tmp_path, skip_bad=True)
        assert train.labels.tolist() == [0, 1, 1, 0]
        assert train.columns["site"].tolist() == ["0-1", "0-2", "1-0", "1-2"]
        np.testing.assert_array_equal(read_all(train), [pixels(seed=seed) for seed in (1, 2, 3, 5)])
        printed = capsys.readouterr().err
        assert "skipped 2 rows of the train split because of their labels" in printed
        assert f"the first: {tmp_path}/train-0.parquet row 0, label -1" in printed
        assert "the test split, in which no row has a valid label" in printed

    def test_rows_keep_their_numbers_when_others_are_skipped(self, tmp_path: Path) -> None:
        path = write_parquet(tmp_path / "a.parquet", hub_table([PICTURES[0], PICTURES[1], b"text"], [-1, 0, 1]))
        reasons = unreadable(load("parquet", path, skip_bad=True)[0])
        assert reasons[1].startswith(f"{path} row 2 (2.png)")

    @pytest.mark.parametrize(
        "metadata", [b"", b"null", b"[1]", b'{"info": 3}', b'{"info": {"features": {"label": {}}}}']
    )
    def test_a_description_of_another_form_is_done_without(self, tmp_path: Path, metadata: bytes) -> None:
        table = plain_table().replace_schema_metadata({b"huggingface": metadata})
        assert load("parquet", write_parquet(tmp_path / "a.parquet", table))[0].classes == ("0", "1", "2")

    @pytest.mark.parametrize(
        "names, words",
        [
            ([], "no .parquet file in"),
            (["test-0"], "only test files in"),
            (["a/train-0", "b/train-0"], "the tables of several data sets in"),
        ],
    )
    def test_what_is_unclear_is_refused(self, tmp_path: Path, names: list[str], words: str) -> None:
        for name in names:
            write_parquet(tmp_path / f"{name}.parquet", hub_table(PICTURES))
        assert words in refusal(lambda: load("parquet", tmp_path)).found

    def test_other_class_names_in_test_are_refused(self, tmp_path: Path) -> None:
        write_parquet(tmp_path / "train-0.parquet", hub_table(PICTURES))
        write_parquet(tmp_path / "test-0.parquet", plain_table())
        assert "with different class names" in refusal(lambda: load("parquet", tmp_path)).found

    def test_an_empty_table_is_refused(self, tmp_path: Path) -> None:
        path = write_parquet(tmp_path / "a.parquet", hub_table([]))
        assert "no image in the train split" in refusal(lambda: load("parquet", path)).found

    def test_without_pyarrow_it_is_told_how_to_get_it(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "pyarrow", None)
        monkeypatch.delitem(sys.modules, "pipeline.readers.parquet", raising=False)
        (tmp_path / "a.parquet").touch()
        assert ".[parquet]" in refusal(lambda: load("parquet", tmp_path / "a.parquet")).hint


FILE = PICTURES[0]
SQUARE = pixels(seed=0)[..., 0]
WIDE = pixels(4, 6, 3, seed=1)


class TestParquetTypes:
    """Every Arrow type that can hold an image file, pixels or a label."""

    @pytest.mark.parametrize(
        "column",
        [
            arrow.array([FILE] * 2, arrow.binary()),
            arrow.array([FILE] * 2, arrow.large_binary()),
            arrow.array([FILE] * 2, arrow.binary_view()),
            arrow.array([FILE] * 2, arrow.binary(len(FILE))),
            arrow.array([FILE] * 2, arrow.binary()).dictionary_encode(),
            arrow.array(
                [{"bytes": FILE, "path": "a"}] * 2,
                arrow.struct({"bytes": arrow.binary_view(), "path": arrow.string_view()}),
            ),
            arrow.array(
                [{"path": "a", "bytes": FILE}] * 2,
                arrow.struct({"path": arrow.string(), "bytes": arrow.large_binary()}),
            ),
            arrow.array(
                [{"image": {"bytes": FILE}}] * 2, arrow.struct({"image": arrow.struct({"bytes": arrow.binary()})})
            ),
            arrow.array([list(FILE)] * 2, arrow.list_(arrow.uint8())),
            arrow.array([SQUARE.tolist()] * 2, arrow.list_(arrow.list_(arrow.int64()))),
            arrow.array([SQUARE.tolist()] * 2, arrow.list_(arrow.list_(arrow.uint8(), 8), 8)),
            arrow.array([SQUARE.ravel().tolist()] * 2, arrow.large_list(arrow.int16())),
            arrow.array([SQUARE[..., None].tolist()] * 2, arrow.list_(arrow.list_(arrow.list_(arrow.int32())))),
        ],
        ids=lambda column: str(column.type)[:60],
    )
    def test_of_images(self, tmp_path: Path, column: arrow.Array) -> None:
        table = arrow.table({"image": column, "label": ["a", "b"]})
        (train,) = load("parquet", write_parquet(tmp_path / "a.parquet", table))
        np.testing.assert_array_equal(read_all(train)[..., 0], [SQUARE, SQUARE])
        assert train.labels.tolist() == [0, 1]

    def test_of_colored_pixels(self, tmp_path: Path) -> None:
        table = arrow.table({"image": arrow.array([WIDE.tolist()] * 2), "label": ["a", "b"]})
        (train,) = load("parquet", write_parquet(tmp_path / "a.parquet", table))
        np.testing.assert_array_equal(read_all(train), [WIDE, WIDE])

    @pytest.mark.parametrize(
        "column, classes, labels",
        [
            (arrow.array(["b", "a", "b"], arrow.string_view()), ("a", "b"), [1, 0, 1]),
            (arrow.array(["b", "a", "b"], arrow.large_string()), ("a", "b"), [1, 0, 1]),
            (arrow.array(["b", "a", "b"]).dictionary_encode(), ("a", "b"), [1, 0, 1]),
            (arrow.array([b"b", b"a", b"b"], arrow.binary()), ("a", "b"), [1, 0, 1]),
            (arrow.array([10, 9, 10], arrow.uint8()), ("9", "10"), [1, 0, 1]),
            (arrow.array([10, 9, 10]).dictionary_encode(), ("9", "10"), [1, 0, 1]),
            (arrow.array([10.0, 9.0, 10.0]), ("9", "10"), [1, 0, 1]),
            (arrow.array([Decimal(10), Decimal(9), Decimal(10)]), ("9", "10"), [1, 0, 1]),
            (arrow.array([True, False, True]), ("0", "1"), [1, 0, 1]),
        ],
        ids=lambda value: str(value.type) if isinstance(value, arrow.Array) else "",
    )
    def test_of_labels(self, tmp_path: Path, column: arrow.Array, classes: tuple, labels: list[int]) -> None:
        table = arrow.table({"image": PICTURES[:3], "label": column})
        (train,) = load("parquet", write_parquet(tmp_path / "a.parquet", table))
        assert (train.classes, train.labels.tolist()) == (classes, labels)

    @pytest.mark.parametrize(
        "column, words",
        [
            (arrow.array([1.0, 1.5]), "row 1: label 1.5, which is no integer"),
            (arrow.array([1.0, float("nan")]), "row 1: "),
            (arrow.array([1.0, float("inf")]), "row 1: "),
            (arrow.array([True, None]), "row 1: label None"),
            (arrow.array(["a", None], arrow.string_view()), "row 1: label None"),
            (arrow.array(["a", None]).dictionary_encode(), "row 1: label None"),
        ],
        ids=lambda value: str(value)[-40:],
    )
    def test_labels_that_are_none_are_refused_by_row(self, tmp_path: Path, column: arrow.Array, words: str) -> None:
        path = write_parquet(tmp_path / "a.parquet", arrow.table({"image": PICTURES[:2], "label": column}))
        assert f"{path} {words}" in refusal(lambda: load("parquet", path)).found

    @pytest.mark.parametrize("pixels", [[[1.5]], [[256]], [[-1]], [[[1, 2]]], [[[[1]]]]], ids=str)
    def test_pixels_that_are_none_are_refused_by_row(self, tmp_path: Path, pixels: list) -> None:
        table = arrow.table({"image": arrow.array([pixels] * 2), "label": ["a", "b"]})
        path = write_parquet(tmp_path / "a.parquet", table)
        assert str(path) in refusal(lambda: load("parquet", path)).found

    def test_further_columns_are_kept(self, tmp_path: Path) -> None:
        site = arrow.array(["x", None, "y"], arrow.string_view())
        table = arrow.table({"image": PICTURES[:3], "label": [0, 1, 0], "site": site, "age": [1, 2, 3]})
        (train,) = load("parquet", write_parquet(tmp_path / "a.parquet", table))
        assert {name: values.tolist() for name, values in train.columns.items()} == {
            "site": ["x", "", "y"],
            "age": ["1", "2", "3"],
        }

    def test_further_columns_of_one_name_are_left_out(self, tmp_path: Path) -> None:
        table = arrow.table([PICTURES[:2], [0, 1], ["x", "y"], [1, 2]], names=["image", "label", "note", "note"])
        (train,) = load("parquet", write_parquet(tmp_path / "a.parquet", table))
        assert (train.labels.tolist(), dict(train.columns)) == ([0, 1], {})


class TestSplitsInFileNames:
    def test_files_of_an_operating_system_are_not_read(self, tmp_path: Path) -> None:
        """AppleDouble files, which lie beside each file on a medium that macOS has written."""
        (tmp_path / "npz").mkdir()
        npz(tmp_path / "npz" / "train.npz", KERAS)
        write_parquet(tmp_path / "parquet" / "train.parquet", plain_table())
        for kind in ("npz", "parquet"):
            (tmp_path / kind / f"._train.{kind}").write_bytes(b"\0\5\x16\7")
            assert load(kind, tmp_path / kind)[0].name == "train"

    @pytest.mark.parametrize("name", ["birds-validation-00.parquet", "val.parquet", "x_dev_1.parquet", "dev/0.PARQUET"])
    def test_validation_is_not_trained_on(self, tmp_path: Path, name: str) -> None:
        write_parquet(tmp_path / "birds-train-00.parquet", plain_table())
        write_parquet(tmp_path / name, arrow.table({"image": PICTURES[:3], "label": [0, 1, 2]}))
        if "/" in name:
            (tmp_path / "train").mkdir()
            (tmp_path / "birds-train-00.parquet").rename(tmp_path / "train" / "0.parquet")
        assert [(part.name, len(part.labels)) for part in load("parquet", tmp_path)] == [("train", 12), ("val", 3)]

    @pytest.mark.parametrize("name", ["extra.parquet", "train-test.parquet"])
    def test_unclear_ones_are_refused(self, tmp_path: Path, name: str) -> None:
        for each in ("train-0.parquet", name):
            write_parquet(tmp_path / each, plain_table())
        assert f"{name}, " in refusal(lambda: load("parquet", tmp_path)).found

    def test_those_of_npz(self, tmp_path: Path) -> None:
        arrays = {"x": np.zeros((2, 4, 4), np.uint8), "y": np.arange(2)}
        for name in ("birds_train", "birds_dev"):
            np.savez(tmp_path / f"{name}.npz", **arrays)
        assert [part.name for part in load("npz", tmp_path)] == ["train", "val"]
        np.savez(tmp_path / "more.npz", **arrays)
        assert "more.npz, which is named after no split" in refusal(lambda: load("npz", tmp_path)).found

    def test_arrays_that_are_not_used_are_named(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        np.savez(tmp_path / "a.npz", x=np.zeros((2, 4, 4), np.uint8), y=np.arange(2), extra=np.arange(3))
        load("npz", tmp_path / "a.npz")
        assert "not used: the arrays extra in" in capsys.readouterr().err

    @pytest.mark.parametrize(
        "shape, hint",
        [
            ((2, 4, 5, 2), "x[..., :1]"),
            ((2, 4, 6, 4), "x[..., :3]"),
            ((2, 5, 20, 20), "x[:, :3]"),
            ((2, 784), "(-1, 28, 28)"),
        ],
        ids=str,
    )
    def test_hints_fit_the_shape(self, tmp_path: Path, shape: tuple[int, ...], hint: str) -> None:
        """The hint, applied to the array, makes it readable."""
        x = np.zeros(shape, np.uint8)
        np.savez(tmp_path / "a.npz", x=x, y=np.arange(2))
        error = refusal(lambda: load("npz", tmp_path / "a.npz"))
        assert hint in error.hint
        np.savez(tmp_path / "a.npz", x=eval(error.hint[error.hint.index("x") :].split(": ")[-1]), y=np.arange(2))
        assert len(load("npz", tmp_path / "a.npz")[0].labels) == 2


class TestHostileParquet:
    @pytest.mark.parametrize(
        "content", [b"", b"text", b"PAR1", b"PAR1" + bytes(100) + b"PAR1", b"PAR1\xff\xff\xff\x7fPAR1"]
    )
    def test_what_is_no_parquet_is_refused(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "a.parquet").write_bytes(content)
        assert f"{tmp_path}/a.parquet row 0: " in refusal(lambda: load("parquet", tmp_path / "a.parquet")).found

    @pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.99])
    def test_a_cut_file_is_refused(self, tmp_path: Path, share: float) -> None:
        path = write_parquet(tmp_path / "a.parquet", hub_table(PICTURES))
        content = path.read_bytes()
        path.write_bytes(content[: int(len(content) * share)])
        assert str(path) in refusal(lambda: load("parquet", path)).found

    @pytest.mark.parametrize("compression", ["snappy", "zstd", "none"])
    def test_changed_bytes_of_checked_pages_are_refused(self, tmp_path: Path, compression: str) -> None:
        path = write_parquet(
            tmp_path / "a.parquet", hub_table(PICTURES), compression=compression, write_page_checksum=True
        )
        content = bytearray(path.read_bytes())
        content[len(content) // 4] ^= 0x20
        path.write_bytes(content)
        assert str(path) in refusal(lambda: load("parquet", path)).found

    @given(data=st.data())
    @settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
    def test_whatever_is_changed_nothing_but_a_refusal_comes_of_it(self, tmp_path: Path, data: st.DataObject) -> None:
        path = write_parquet(tmp_path / "a.parquet", hub_table(PICTURES), row_group_size=5)
        content = bytearray(path.read_bytes())
        for _ in range(data.draw(st.integers(1, 3))):
            content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
        path.write_bytes(content)
        try:
            read_all(load("parquet", path, size=(8, 8))[0])
        except UserError as error:
            assert str(path) in error.found or str(tmp_path) in error.found
        except UnreadableImages as error:
            assert all(reason.startswith(str(path)) for reason in error.reasons.values())

    def test_one_picture_a_million_times_is_refused(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A dictionary makes it small in the file; unpacked it would fill the disk."""
        monkeypatch.setattr("pipeline.readers.archives.files._MIN_EXPANDED_BYTES", 1 << 20)
        large = picture(pixels(200, 200))
        path = write_parquet(tmp_path / "a.parquet", arrow.table({"image": [large] * 3000, "label": [0] * 3000}))
        assert path.stat().st_size < 1 << 20
        assert "it expands to more than" in refusal(lambda: load("parquet", path)).found

    def test_it_is_read_in_little_memory(self, tmp_path: Path) -> None:
        """200 MB of pictures in one row group, of many pages; a page is the least that can be read."""
        noise = np.random.default_rng(0).bytes(1 << 20)
        table = arrow.table({"image": [PICTURES[0] + noise + bytes([row]) for row in range(200)], "label": [0] * 200})
        options = {"compression": "none", "use_dictionary": False, "write_batch_size": 4}
        path = write_parquet(tmp_path / "a.parquet", table, **options)
        code = f"""
from pathlib import Path
from pipeline.datasets import find_source
from pipeline.readers.raw_split import SourceOptions
(train,) = find_source("parquet").load(SourceOptions(Path({str(path)!r}), color="gray", size=(8, 8)))
print(len(train.labels))
"""
        (count,), memory = in_a_process(code)
        assert count == "200" and memory < 280
