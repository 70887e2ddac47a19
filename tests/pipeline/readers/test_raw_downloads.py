"""Published data sets, from synthetic copies in their official layouts, and their first download."""

from __future__ import annotations

import gzip
import hashlib
import urllib.parse
import zlib
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.http_server import serving, without_proxies
from support.official_layouts import TEN, cifar10_files, cifar_records, numtadb_table, write_emnist, write_mnist
from support.raw_files import (
    idx,
    in_a_process,
    load,
    picture,
    pixels,
    read_all,
    refusal,
    unreadable,
    write_tar,
    write_tree,
    write_zip,
)

from pipeline.datasets import emnist, find_source, medmnist, quickdraw, source_names
from pipeline.datasets.cifar import read_records
from pipeline.readers import download
from pipeline.readers.formats.idx import decode, decode_table
from pipeline.readers.raw_dir import RawContent
from pipeline.readers.raw_split import SourceOptions
from shards import UserError

FINE = tuple(f"fine_{number}" for number in range(100))
COARSE = tuple(f"coarse_{number}" for number in range(20))


def cifar100_files() -> dict[str, bytes]:
    return {
        "train.bin": cifar_records(9, 2, 0)[0],
        "test.bin": cifar_records(5, 2, 1)[0],
        "fine_label_names.txt": "\n".join(FINE).encode() + b"\n",
        "coarse_label_names.txt": "\n".join(COARSE).encode() + b"\n",
    }


def place_cifar(directory: Path, name: str, files: dict[str, bytes], how: str) -> Path:
    """The files as the archive, as the directory it unpacks to, or loose."""
    inner = {"cifar10": "cifar-10-batches-bin", "cifar100": "cifar-100-binary"}[name]
    if how == "loose":
        return write_tree(directory, files)
    if how == "unpacked":
        return write_tree(directory, {f"{inner}/{file}": content for file, content in files.items()})
    archive = {"cifar10": "cifar-10-binary.tar.gz", "cifar100": "cifar-100-binary.tar.gz"}[name]
    write_tar(directory / archive, {f"{inner}/{file}": content for file, content in files.items()}, "w:gz")
    return directory


class TestCifar:
    @pytest.mark.parametrize("how", ["archive", "unpacked", "loose"])
    def test_ten(self, tmp_path: Path, how: str) -> None:
        train, test = load("cifar10", place_cifar(tmp_path, "cifar10", cifar10_files(), how))
        assert train.classes == test.classes == TEN
        batches = [cifar_records(6, 1, number) for number in range(1, 6)]
        np.testing.assert_array_equal(read_all(train), np.concatenate([images for _, images, _ in batches]))
        assert train.labels.tolist() == [int(label) for _, _, labels in batches for label in labels[:, 0]]
        np.testing.assert_array_equal(read_all(test), cifar_records(4, 1, 9)[1])
        assert [file.name for file in test.files] == ["batches.meta.txt", "test_batch.bin"]

    @pytest.mark.parametrize("how", ["archive", "unpacked", "loose"])
    def test_hundred(self, tmp_path: Path, how: str) -> None:
        place_cifar(tmp_path, "cifar100", cifar100_files(), how)
        _, images, labels = cifar_records(9, 2, 0)
        for split, classes, column in (("fine", FINE, 1), ("coarse", COARSE, 0)):
            train, test = load("cifar100", tmp_path, split)
            assert train.classes == test.classes == classes
            assert train.labels.tolist() == labels[:, column].tolist()
            np.testing.assert_array_equal(read_all(train), images)
            (other,) = train.columns
            names = {"fine": FINE, "coarse": COARSE}[other]
            assert train.columns[other].tolist() == [names[label] for label in labels[:, 1 - column]]

    @given(st.integers(1, 5), st.integers(1, 2), st.integers(0, 9))
    def test_records_survive(self, count: int, kinds: int, seed: int) -> None:
        content, images, labels = cifar_records(count, kinds, seed)
        found = read_records(RawContent("x", "/there/x", content), [10] if kinds == 1 else [20, 100])
        np.testing.assert_array_equal(found[0], images)
        np.testing.assert_array_equal(found[1], labels)

    @pytest.mark.parametrize(
        "name, content, words",
        [
            ("data_batch_3.bin", b"", "data_batch_3.bin of 0 bytes"),
            ("data_batch_3.bin", bytes(3072), "data_batch_3.bin of 3,072 bytes"),
            ("data_batch_3.bin", bytes(3073 * 2 - 1), "of 6,145 bytes"),
            ("test_batch.bin", bytes(3073) + b"\x0a" + bytes(3072), "test_batch.bin with label 10 in record 1"),
            ("test_batch.bin", b"\x80\x04\x95cos\nsystem\n", "test_batch.bin of"),
            ("batches.meta.txt", b"cat\ndog\n", "batches.meta.txt with 2 of 10 class names"),
            ("batches.meta.txt", b"\xff\0" * 30, "batches.meta.txt with 1 of 10 class names"),
        ],
    )
    @pytest.mark.parametrize("how", ["archive", "loose"])
    def test_damaged_files_are_named(self, tmp_path: Path, name: str, content: bytes, words: str, how: str) -> None:
        place_cifar(tmp_path, "cifar10", {**cifar10_files(), name: content}, how)
        assert words in refusal(lambda: load("cifar10", tmp_path)).found

    def test_a_damaged_archive_is_named(self, tmp_path: Path) -> None:
        archive = place_cifar(tmp_path, "cifar10", cifar10_files(), "archive") / "cifar-10-binary.tar.gz"
        content = archive.read_bytes()
        archive.write_bytes(content[: len(content) // 2])
        error = refusal(lambda: load("cifar10", tmp_path))
        assert f"{archive}, a damaged archive" in error.found and f"rm {archive}" in error.hint

    @pytest.mark.parametrize("missing", ["test_batch.bin", "batches.meta.txt"])
    def test_a_missing_file_is_named(self, tmp_path: Path, missing: str) -> None:
        files = cifar10_files()
        del files[missing]
        place_cifar(tmp_path, "cifar10", files, "archive")
        assert f"no {missing} in" in refusal(lambda: load("cifar10", tmp_path)).found

    def test_the_pickled_files_are_not_looked_at(self, tmp_path: Path) -> None:
        """They would be next to the others in the directory of someone who has both."""
        bomb = b"cos\nsystem\n(S'touch " + str(tmp_path / "ran").encode() + b"'\ntR."
        place_cifar(tmp_path, "cifar10", {**cifar10_files(), "data_batch_1": bomb, "batches.meta": bomb}, "archive")
        load("cifar10", tmp_path)
        assert not (tmp_path / "ran").exists()


def idx_files(images: str, labels: str, count: int, seed: int = 0) -> dict[str, bytes]:
    content = np.random.default_rng(seed).integers(0, 256, (count, 28, 28), np.uint8)
    return {
        f"{images}.gz": gzip.compress(idx(content)),
        f"{labels}.gz": gzip.compress(idx(np.arange(count, dtype=np.uint8) % 10)),
    }


class TestIdxFamily:
    @pytest.mark.parametrize(
        "name, first, last", [("mnist", "0", "9"), ("fashionmnist", "T-shirt/top", "Ankle boot"), ("kmnist", "o", "wo")]
    )
    def test_four_files(self, tmp_path: Path, name: str, first: str, last: str) -> None:
        write_tree(tmp_path, idx_files("train-images-idx3-ubyte", "train-labels-idx1-ubyte", 20))
        write_tree(tmp_path, idx_files("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte", 11, seed=1))
        train, test = load(name, tmp_path)
        assert (train.name, len(train.labels), test.name, len(test.labels)) == ("train", 20, "test", 11)
        assert (len(set(train.classes)), train.classes[0], train.classes[-1]) == (10, first, last)
        assert train.image_shape == (28, 28, 1) and not train.transposed
        assert test.labels.tolist() == [*range(10), 0]
        expected = np.random.default_rng(1).integers(0, 256, (11, 28, 28), np.uint8)
        np.testing.assert_array_equal(read_all(test)[..., 0], expected)
        assert find_source(name).plan(SourceOptions(tmp_path)) == f"read the 4 files in {tmp_path}"

    def test_plan_names_what_is_absent(self, tmp_path: Path) -> None:
        write_tree(tmp_path, idx_files("train-images-idx3-ubyte", "train-labels-idx1-ubyte", 20))
        plan = find_source("kmnist").plan(SourceOptions(tmp_path))
        assert plan.startswith("download t10k-images-idx3-ubyte.gz, t10k-labels-idx1-ubyte.gz (3.0 MB)")


def qmnist_files(**tables: np.ndarray) -> dict[str, bytes]:
    files = {}
    for part, count in (("train", 7), ("test", 12)):
        images = np.random.default_rng(count).integers(0, 256, (count, 28, 28), np.uint8)
        table = tables.get(part, qmnist_table(count))
        files[f"qmnist-{part}-images-idx3-ubyte.gz"] = gzip.compress(idx(images))
        files[f"qmnist-{part}-labels-idx2-int.gz"] = gzip.compress(idx(table.astype(">i4"), kind=12))
    return files


def qmnist_table(count: int) -> np.ndarray:
    table = np.zeros((count, 8), int)
    table[:, 0] = np.arange(count) % 10
    table[:, 1] = 4
    table[:, 2] = 2100 + np.arange(count)
    return table


class TestQmnist:
    def test_labels_and_writers(self, tmp_path: Path) -> None:
        train, test = load("qmnist", write_tree(tmp_path, qmnist_files()), "test60k")
        assert (len(train.labels), test.labels.tolist()) == (7, [*range(10), 0, 1])
        assert test.columns["writer"].tolist() == [str(2100 + number) for number in range(12)]
        assert test.columns["series"].tolist() == ["4"] * 12

    def test_the_test_part_of_mnist_comes_first(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("pipeline.datasets.qmnist._MNIST_TEST_SIZE", 5)
        write_tree(tmp_path, qmnist_files())
        assert load("qmnist", tmp_path, "test10k")[1].source_index.tolist() == [0, 1, 2, 3, 4]
        assert len(load("qmnist", tmp_path, "test60k")[1].labels) == 12

    @pytest.mark.parametrize(
        "table, words",
        [
            (qmnist_table(11), "12 images in"),
            (qmnist_table(12) + 5, "labels 5 .. 14 in"),
            (qmnist_table(12) - 1, "labels -1 .. 8 in"),
            (qmnist_table(12)[:, :7], "with 7 columns"),
        ],
    )
    def test_a_wrong_table_is_refused(self, tmp_path: Path, table: np.ndarray, words: str) -> None:
        error = refusal(lambda: load("qmnist", write_tree(tmp_path, qmnist_files(test=table)), "test60k"))
        assert words in error.found and "qmnist-test-labels-idx2-int.gz" in error.found


class TestIdxAttacks:
    def raw(self, content: bytes) -> RawContent:
        return RawContent("x", "/there/x", content)

    @given(st.integers(1, 5), st.integers(1, 6))
    def test_tables_survive(self, rows: int, columns: int) -> None:
        table = np.random.default_rng(rows).integers(-(2**31), 2**31, (rows, columns))
        found = decode_table(self.raw(idx(table.astype(">i4"), kind=12)), columns)
        np.testing.assert_array_equal(found, table)

    def test_a_header_that_claims_terabytes_is_refused(self) -> None:
        content = b"\0\0\x08\x03" + b"\xff" * 12 + bytes(100)
        found = refusal(lambda: decode(self.raw(content), 3)).found
        assert found.startswith("/there/x: with 100 values where its header says 79,228,162,")

    def test_compressed_zeros_without_end_are_refused_in_little_memory(self, tmp_path: Path) -> None:
        """Half a gigabyte of zeros in half a megabyte."""
        compressor = zlib.compressobj(1, zlib.DEFLATED, 31)
        content = b"".join(compressor.compress(bytes(1 << 20)) for _ in range(500)) + compressor.flush()
        path = write_tree(tmp_path, {"bomb": content}) / "bomb"
        code = f"""
from pipeline.readers.formats.idx import decode
from pipeline.readers.raw_dir import RawContent
from shards import UserError
try:
    decode(RawContent("x", "/there/x", open({str(path)!r}, "rb").read()), 3)
except UserError as error:
    print(error.found)
"""
        (found,), memory = in_a_process(code)
        assert "/there/x: expands to more than" in found
        assert memory < 800

    @given(st.binary(max_size=40))
    def test_noise_is_refused(self, content: bytes) -> None:
        for head in (b"", b"\0\0\x08\x03", b"\0\0\x0c\x02", b"\x1f\x8b\x08\0", b"BZh9", b"\xfd7zXZ\0"):
            for dimensions, kind in ((1, 8), (3, 8), (2, 12)):
                try:
                    decode(self.raw(head + content), dimensions, kind)
                except UserError as error:
                    assert error.found.startswith("/there/x: ")


SETS = "abcde"


def numtadb_files(folder: str = "training-{0}") -> dict[str, bytes]:
    files: dict[str, bytes] = {}
    for seed, letter in enumerate(SETS):
        files[f"training-{letter}.csv"] = numtadb_table(letter, 10)
        for row in range(10):
            channels = 3 if letter == "c" else 1
            image = pixels(20 + row, 20 + 2 * seed, channels, seed)
            files[f"{folder.format(letter)}/{letter}{row:05}.png"] = picture(image)
        files[f"testing-{letter}/x.png"] = b"not looked at"
    return files


class TestNumtadb:
    @pytest.mark.parametrize("folder", ["training-{0}", "training-{0}/training-{0}"])
    def test_sets_a_b_c_train_and_d_tests(self, tmp_path: Path, folder: str) -> None:
        train, test = load("numtadb", write_tree(tmp_path, numtadb_files(folder)), "abc-d")
        assert train.classes == tuple("0123456789")
        assert train.image_shape == (48, 48, 3)
        assert train.labels.tolist() == [(row * 3) % 10 for row in range(10)] * 3
        assert train.columns["set"].tolist() == [letter for letter in "abc" for _ in range(10)]
        assert train.columns["database"].tolist() == ["DB0", "DB1"] * 15
        assert train.columns["path"].tolist()[::10] == [f"{folder.format(x)}/{x}00000.png" for x in "abc"]
        assert set(test.columns["set"].tolist()) == {"d"}
        assert read_all(test).shape == (10, 48, 48, 3)
        assert [file.name for file in test.files] == ["training-d.csv", f"pictures of {tmp_path.name}"]

    def test_other_sets_and_sizes(self, tmp_path: Path) -> None:
        place = write_zip(tmp_path / "numta.zip", numtadb_files())
        train, _ = load("numtadb", place, "abce-d", size=(20, 30), color="gray")
        assert (len(train.labels), train.image_shape) == (40, (20, 30, 1))
        assert set(load("numtadb", place, "abc-e")[1].columns["set"].tolist()) == {"e"}
        assert load("numtadb", place, "abc-d", encoded=True)[0].encoded

    @pytest.mark.parametrize("missing", ["training-b.csv", "training-d.csv"])
    def test_a_missing_table_is_named(self, tmp_path: Path, missing: str) -> None:
        files = numtadb_files()
        del files[missing]
        error = refusal(lambda: load("numtadb", write_tree(tmp_path, files), "abc-d"))
        assert f"no {missing}" in error.found and "kaggle.com" in error.hint

    def test_no_directory_names_where_to_get_it(self, tmp_path: Path) -> None:
        assert "kaggle.com" in refusal(lambda: load("numtadb", tmp_path / "none", "abc-d")).hint

    def test_a_missing_picture_is_named(self, tmp_path: Path) -> None:
        files = numtadb_files()
        del files["training-b/b00004.png"]
        error = refusal(lambda: load("numtadb", write_tree(tmp_path, files), "abc-d"))
        assert "training-b.csv line 6: the path 'b00004.png', where no image is" in error.found
        assert error.hint == "fix these lines", "--skip-bad has no effect here"

    def test_a_digit_that_is_none_is_named(self, tmp_path: Path) -> None:
        files = {**numtadb_files(), "training-a.csv": numtadb_table("a", 3, ["1", "x", "2"])}
        error = refusal(lambda: load("numtadb", write_tree(tmp_path, files), "abc-d"))
        assert "training-a.csv line 3: digit 'x'" in error.found

    def test_damaged_pictures_are_named(self, tmp_path: Path) -> None:
        files = {**numtadb_files(), "training-d/d00001.png": b"text", "training-d/d00003.png": b""}
        _, test = load("numtadb", write_tree(tmp_path, files), "abc-d")
        assert list(unreadable(test)) == [1, 3]


class TestTorchvision:
    """Datasets that torchvision has downloaded, from its root and from their own directory."""

    @pytest.mark.parametrize(
        "name, folder", [("mnist", "MNIST"), ("fashionmnist", "FashionMNIST"), ("kmnist", "KMNIST")]
    )
    def test_the_idx_family(self, tmp_path: Path, name: str, folder: str) -> None:
        folders = ("MNIST", "FashionMNIST", "KMNIST")
        for seed, other in enumerate(folders):
            for split in ("train", "t10k"):
                files = idx_files(f"{split}-images-idx3-ubyte", f"{split}-labels-idx1-ubyte", 20, seed)
                plain = {file.removesuffix(".gz"): gzip.decompress(content) for file, content in files.items()}
                write_tree(tmp_path / other / "raw", files | plain)
        expected = np.random.default_rng(folders.index(folder)).integers(0, 256, (20, 28, 28), np.uint8)
        for raw in (tmp_path, tmp_path / folder):
            np.testing.assert_array_equal(read_all(load(name, raw)[0])[..., 0], expected)

    def test_qmnist(self, tmp_path: Path) -> None:
        write_tree(tmp_path / "QMNIST" / "raw", qmnist_files())
        assert len(load("qmnist", tmp_path, "test60k")[1].labels) == 12


class TestMedmnist:
    def write(self, directory: Path, name: str, size: int, channels: int, classes: int) -> dict[str, np.ndarray]:
        """A file in the official layout: six arrays, labels [N, 1]."""
        random, arrays = np.random.default_rng(size), {}
        for split, count in (("train", 20), ("val", 5), ("test", 9)):
            shape = (count, size, size, 3) if channels == 3 else (count, size, size)
            arrays[f"{split}_images"] = random.integers(0, 256, shape, np.uint8)
            arrays[f"{split}_labels"] = (np.arange(count, dtype=np.uint8) % classes)[:, None]
        np.savez_compressed(directory / f"{name}.npz", **arrays)
        return arrays

    @pytest.mark.parametrize("variant, size", [("bloodmnist", 28), ("bloodmnist_64", 64)])
    def test_official_splits_and_class_names(self, tmp_path: Path, variant: str, size: int) -> None:
        arrays = self.write(tmp_path, variant, size, 3, 8)
        splits = load("medmnist", tmp_path, variant)
        assert [split.name for split in splits] == ["train", "test", "val"]
        for split in splits:
            assert split.image_shape == (size, size, 3)
            assert (split.classes[0], split.classes[-1], len(split.classes)) == ("basophil", "platelet", 8)
            assert split.labels.tolist() == arrays[f"{split.name}_labels"][:, 0].tolist()
            np.testing.assert_array_equal(read_all(split), arrays[f"{split.name}_images"])

    def test_gray_images(self, tmp_path: Path) -> None:
        self.write(tmp_path, "breastmnist_128", 128, 1, 2)
        train, *_ = load("medmnist", tmp_path, "breastmnist_128")
        assert train.image_shape == (128, 128, 1) and train.classes == ("malignant", "normal, benign")

    def test_a_label_beyond_the_classes_is_named(self, tmp_path: Path) -> None:
        self.write(tmp_path, "pneumoniamnist", 28, 1, 3)
        assert "pneumoniamnist.npz:test_labels" in refusal(lambda: load("medmnist", tmp_path, "pneumoniamnist")).found

    def test_variants_are_the_published_files(self, tmp_path: Path) -> None:
        variants = find_source("medmnist").variants
        assert len(variants) == 44 and variants[:4] == ("pathmnist", "pathmnist_64", "pathmnist_128", "pathmnist_224")
        for variant in variants:
            (download,) = medmnist._published(variant).downloads
            assert download.url == f"https://zenodo.org/records/10519652/files/{variant}.npz?download=1"
            assert len(bytes.fromhex(download.md5)) == 16
        assert medmnist._published("octmnist").downloads[0].md5 == "c68d92d5b585d8d81f7112f81e2d0842"
        plan = find_source("medmnist").plan(SourceOptions(tmp_path, "octmnist"))
        assert plan == f"download https://zenodo.org/records/10519652/files/octmnist.npz?download=1 to {tmp_path}"


class TestQuickdraw:
    COUNTS: ClassVar = {"airplane": 7, "alarm clock": 4, "zigzag": 5}

    def write(self, directory: Path) -> dict[str, np.ndarray]:
        arrays = {}
        for seed, (name, count) in enumerate(self.COUNTS.items()):
            arrays[name] = np.random.default_rng(seed).integers(0, 256, (count, 784), np.uint8)
            np.save(directory / f"{name}.npy", arrays[name])
        return arrays

    def test_classes_whose_files_are_present(self, tmp_path: Path) -> None:
        arrays = self.write(tmp_path)
        np.save(tmp_path / "another.npy", np.zeros(3))
        (train,) = load("quickdraw", tmp_path, "present")
        assert train.classes == tuple(self.COUNTS) and train.image_shape == (28, 28, 1)
        assert np.bincount(train.labels).tolist() == list(self.COUNTS.values())
        everything = np.concatenate(list(arrays.values())).reshape(-1, 28, 28, 1)
        np.testing.assert_array_equal(read_all(train), everything)
        order = np.random.default_rng(0).permutation(16)[:9]
        np.testing.assert_array_equal(train.read(order), everything[order])
        assert [file.name for file in train.files] == [f"{name}.npy" for name in self.COUNTS]

    def test_all_classes_are_required_by_default(self, tmp_path: Path) -> None:
        self.write(tmp_path)
        assert find_source("quickdraw").variants[0] == "all"
        plan = find_source("quickdraw").plan(SourceOptions(tmp_path, "all"))
        assert plan.startswith("download The Eiffel Tower.npy, ") and "and 337 more (" in plan
        files = quickdraw._published(SourceOptions(tmp_path, "all"))
        assert len(files.names) == 345 and sum((each.bytes - 80) // 784 for each in files.downloads) == 50_426_266
        assert all(len(bytes.fromhex(each.sha256)) == 32 for each in files.downloads)
        assert files.downloads[5].url.endswith("/quickdraw_dataset/full/numpy_bitmap/alarm%20clock.npy")

    def test_nothing_present(self, tmp_path: Path) -> None:
        assert str(tmp_path) in refusal(lambda: load("quickdraw", tmp_path, "present")).found

    @pytest.mark.parametrize(
        "content, words",
        [
            (b"", "no array of numpy"),
            (b"<html>", "no array of numpy"),
            (np.zeros((3, 28, 28), np.uint8), "uint8 [3, 28, 28], not uint8 [N, 784]"),
            (np.zeros((3, 784), np.float32), "float32 [3, 784], not"),
            (np.zeros((0, 784), np.uint8), "uint8 [0, 784], not"),
            (np.zeros((3, 784), np.uint8, order="F"), "uint8 [3, 784], not"),
        ],
    )
    def test_damaged_files_are_named(self, tmp_path: Path, content: bytes | np.ndarray, words: str) -> None:
        self.write(tmp_path)
        path = tmp_path / "zigzag.npy"
        path.write_bytes(content) if isinstance(content, bytes) else np.save(path, content)
        error = refusal(lambda: load("quickdraw", tmp_path, "present"))
        assert error.found.startswith(f"{path}: ") and words in error.found

    def test_a_cut_file_is_named(self, tmp_path: Path) -> None:
        self.write(tmp_path)
        path = tmp_path / "zigzag.npy"
        (train,) = load("quickdraw", tmp_path, "present")
        path.write_bytes(path.read_bytes()[:-1])
        assert "header says 5 drawings" in refusal(lambda: load("quickdraw", tmp_path, "present")).found
        assert "it ends at 4,047, before byte 4,048" in refusal(lambda: read_all(train)).found


def write_emnist_archive(directory: Path) -> None:
    files = write_emnist(directory / "unpacked", "byclass", 62, 62)
    write_zip(directory / "gzip.zip", {f"gzip/{path.name}": path.read_bytes() for path in files.iterdir()})


def write_quickdraw(directory: Path) -> None:
    TestQuickdraw().write(directory)


def write_medmnist(directory: Path) -> None:
    TestMedmnist().write(directory, "bloodmnist", 28, 3, 8)


class TestFirstDownload:
    """Packing with an empty directory of raw files, which a server fills."""

    WRITERS: ClassVar[dict[str, Callable[[Path], object]]] = {
        "emnist": write_emnist_archive,
        "mnist": lambda directory: write_mnist(directory, 20, 10),
        "fashionmnist": lambda directory: write_mnist(directory, 20, 10),
        "kmnist": lambda directory: write_mnist(directory, 20, 10),
        "qmnist": lambda directory: write_tree(directory, qmnist_files()),
        "cifar10": lambda directory: place_cifar(directory, "cifar10", cifar10_files(), "archive"),
        "cifar100": lambda directory: place_cifar(directory, "cifar100", cifar100_files(), "archive"),
        "medmnist": write_medmnist,
        "quickdraw": write_quickdraw,
    }

    @pytest.mark.parametrize("name", WRITERS)
    def test_the_downloaded_files_are_read(self, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        source, published, raw = find_source(name), tmp_path / "published", tmp_path / "raw"
        variant = {"qmnist": "test60k", "medmnist": "bloodmnist"}.get(name, next(iter(source.variants), ""))
        published.mkdir()
        self.WRITERS[name](published)
        monkeypatch.setattr(quickdraw, "published", lambda _: dict.fromkeys(TestQuickdraw.COUNTS, (0, "")))
        without_proxies(monkeypatch)
        with serving(ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(published)))) as server:
            monkeypatch.setattr("pipeline.readers.raw_dir.fetch", partial(fetch_from, server, published))
            assert source.plan(SourceOptions(raw, variant)).startswith("download ")
            first = load(name, raw, variant)
        again = load(name, raw, variant)
        assert sum(len(split.labels) for split in first) > 0
        for one, other in zip(first, again, strict=True):
            np.testing.assert_array_equal(read_all(one), read_all(other))
        assert source.plan(SourceOptions(raw, variant)).startswith("read ")

    def test_every_published_data_set_is_here(self, tmp_path: Path) -> None:
        """Other sources read what the user has, or NumtaDB, which only Kaggle hands out, and data sets of the Hub."""
        plans = {}
        for name in source_names():
            variants = find_source(name).variants
            plans[name] = find_source(name).plan(SourceOptions(tmp_path / "none", variants[0] if variants else ""))
        assert {name for name, plan in plans.items() if plan.startswith("download ")} == set(self.WRITERS)


# SHA-256 of the archives of EMNIST, as others published them; that of Western Sydney is torchvision's.
EMNIST_ARCHIVES = {
    "biometrics.nist.gov": "fb9bb67e33772a9cc0b895e4ecf36d2cf35be8b709693c3564cea2a019fcda8e",
    "www.itl.nist.gov": "fb9bb67e33772a9cc0b895e4ecf36d2cf35be8b709693c3564cea2a019fcda8e",
    "rds.westernsydney.edu.au": "909a2a39c5e86bdd7662425e9b9c4a49bb582bf8d0edad427f3c3a9d0c6f7259",
}


def test_every_server_of_emnist_has_the_archive_that_is_accepted() -> None:
    servers = [urllib.parse.urlsplit(url).hostname for url in (emnist.ARCHIVE.url, *emnist.ARCHIVE.mirrors)]
    assert {server: EMNIST_ARCHIVES[str(server)] for server in servers} == dict.fromkeys(servers, emnist.ARCHIVE.sha256)


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


def fetch_from(
    server: ThreadingHTTPServer, published: Path, wanted: download.Download, directory: Path, or_else: str
) -> Path:
    """Download a file from a server that has synthetic content in place of the published one."""
    content = (published / wanted.name).read_bytes()
    url = f"http://127.0.0.1:{server.server_port}/{wanted.name.replace(' ', '%20')}"
    sha256 = hashlib.sha256(content).hexdigest()
    synthetic = replace(wanted, url=url, mirrors=(), bytes=len(content), sha256=sha256, md5="")
    return download.fetch(synthetic, directory, or_else)


class TestContract:
    @pytest.mark.parametrize("name", source_names())
    def test_plan_reads_nothing_and_says_something(self, name: str, tmp_path: Path) -> None:
        source = find_source(name)
        plan = source.plan(SourceOptions(tmp_path / "none", source.variants[0] if source.variants else ""))
        assert plan and list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("name", source_names())
    def test_options_are_of_a_request(self, name: str) -> None:
        source = find_source(name)
        assert set(source.options) <= set(SourceOptions.__dataclass_fields__) - {"raw", "split"}
        assert source.raw_files or not (source.generic or source.raw_file)

    @pytest.mark.parametrize("name", [name for name in source_names() if find_source(name).generic])
    def test_what_is_not_there_is_named(self, name: str, tmp_path: Path) -> None:
        assert str(tmp_path / "none") in refusal(lambda: load(name, tmp_path / "none")).found

    def test_listing_them_loads_nothing_heavy(self) -> None:
        code = """
import sys
from pipeline.datasets import find_source, source_names
names = [find_source(name).name for name in source_names()]
print(*sorted({name.partition(".")[0] for name in sys.modules}))
"""
        (loaded,), _ = in_a_process(code)
        assert "pipeline" in loaded.split()
        assert not {"torch", "nvidia", "pyarrow", "sklearn", "pandas", "scipy"} & set(loaded.split())
