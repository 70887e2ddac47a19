"""Raw data sets: what is read is right, and what is wrong is refused by name."""

from __future__ import annotations

import gzip
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support.raw_files import idx, load, refusal, write_tree, write_zip

from pipeline.datasets import find_source, source_names
from pipeline.datasets.emnist import _CLASSES, parse_mapping
from pipeline.readers.formats.idx import decode, decode_pair
from pipeline.readers.raw_dir import RawContent
from pipeline.readers.raw_split import RawSplit, SourceOptions
from shards import UserError

IMAGES = np.random.default_rng(0).integers(0, 256, (12, 28, 28), dtype=np.uint8)
LABELS = np.arange(12, dtype=np.uint8) % 3
MAPPING = b"0 48\r\n1 65\r\n2 97\r\n"


def raw(content: bytes, name: str = "some-idx") -> RawContent:
    return RawContent(name, f"/there/{name}", content)


class TestIdx:
    @pytest.mark.parametrize("wrap", [gzip.compress, bytes], ids=["compressed", "plain"])
    def test_images_and_labels_are_read(self, wrap: Callable[[bytes], bytes]) -> None:
        np.testing.assert_array_equal(decode(raw(wrap(idx(IMAGES))), 3), IMAGES)
        np.testing.assert_array_equal(decode(raw(wrap(idx(LABELS))), 1), LABELS)

    def test_images_need_not_be_square(self) -> None:
        images = np.arange(2 * 3 * 5, dtype=np.uint8).reshape(2, 3, 5)
        np.testing.assert_array_equal(decode(raw(idx(images)), 3), images)

    def test_gzip_of_several_members_is_read(self) -> None:
        """As `cat` and parallel compressors make it."""
        whole = idx(IMAGES)
        np.testing.assert_array_equal(decode(raw(gzip.compress(whole[:99]) + gzip.compress(whole[99:])), 3), IMAGES)

    @pytest.mark.parametrize("kept", [2, 3, 9, 10, 11, 100, -9, -8, -1])
    def test_cut_gzip_is_refused(self, kept: int) -> None:
        error = refusal(lambda: decode(raw(gzip.compress(idx(IMAGES))[:kept]), 3))
        assert "/there/some-idx" in error.found

    @pytest.mark.parametrize("place", [0, 1, 2, 5, 50, -6, -2])
    def test_changed_gzip_is_refused(self, place: int) -> None:
        """A changed byte anywhere but in the header's date: gzip's own checksum finds it."""
        content = bytearray(gzip.compress(idx(IMAGES), mtime=0))
        content[place] ^= 0x55
        if place == 5:
            np.testing.assert_array_equal(decode(raw(bytes(content)), 3), IMAGES)
        else:
            assert "/there/some-idx" in refusal(lambda: decode(raw(bytes(content)), 3)).found

    @pytest.mark.parametrize(
        "content, dimensions, reason",
        [
            (b"", 3, "of 0 bytes"),
            (idx(IMAGES)[:15], 3, "of 15 bytes"),
            (b"<html>page not found</html>", 3, "begins with 3c 68 74 6d"),
            (b"\x1f\x8b" + b"not gzip at all", 3, "does not decompress"),
            (idx(IMAGES, kind=9), 3, "begins with 00 00 09 03"),
            (idx(IMAGES.astype(">f4"), kind=0x0D), 3, "begins with 00 00 0d 03"),
            (idx(np.tile(LABELS, 9)), 3, "with 1 dimensions, labels"),
            (idx(IMAGES), 1, "with 3 dimensions, images"),
            (idx(IMAGES[0]), 1, "with 2 dimensions, neither"),
            (idx(IMAGES) + b"\0", 3, "9,409 values where its header says 9,408"),
            (idx(IMAGES)[:-1], 3, "9,407 values where its header says 9,408"),
            (idx(IMAGES[:0]), 3, "empty"),
            (idx(LABELS[:0]), 1, "empty"),
            (idx(np.empty((5, 0, 28), np.uint8)), 3, "empty"),
        ],
    )
    @pytest.mark.parametrize("wrap", [gzip.compress, bytes], ids=["compressed", "plain"])
    def test_anything_but_a_whole_file_is_refused(
        self, content: bytes, dimensions: int, reason: str, wrap: Callable[[bytes], bytes]
    ) -> None:
        if content.startswith(b"\x1f\x8b"):
            wrap = bytes
        error = refusal(lambda: decode(raw(wrap(content)), dimensions))
        assert error.found.startswith("/there/some-idx: ")
        assert reason in error.found

    def test_counts_that_differ_name_both_files(self) -> None:
        error = refusal(lambda: decode_pair(raw(idx(IMAGES), "pixels"), raw(idx(LABELS[:-1]), "numbers"), classes=3))
        assert error.found == "12 images in /there/pixels and 11 labels in /there/numbers"

    @pytest.mark.parametrize("classes, first_label, expected", [(2, 0, "labels 0 .. 1"), (3, 1, "labels 1 .. 3")])
    def test_labels_out_of_range_name_the_file(self, classes: int, first_label: int, expected: str) -> None:
        error = refusal(lambda: decode_pair(raw(idx(IMAGES)), raw(idx(LABELS), "numbers"), classes, first_label))
        assert error.found == "labels 0 .. 2 in /there/numbers"
        assert error.expected.startswith(expected)

    def test_labels_count_from_zero_whatever_the_files_say(self) -> None:
        pixels, labels = decode_pair(raw(idx(IMAGES)), raw(idx(LABELS + 1)), classes=3, first_label=1)
        assert pixels.shape == (12, 28, 28, 1)
        assert labels.dtype == np.int64
        np.testing.assert_array_equal(labels, LABELS)


class TestMapping:
    def test_class_names_in_label_order(self) -> None:
        assert parse_mapping(raw(MAPPING)) == (("0", "A", "a"), 0)

    def test_letters_count_from_one_and_stand_for_both_cases(self) -> None:
        assert parse_mapping(raw(b"1 65 97\n2 66 98\n\n")) == (("Aa", "Bb"), 1)

    @pytest.mark.parametrize(
        "content",
        [
            b"",
            b"\n\n",
            b"0 48\n2 50\n",
            b"1 48\n0 49\n",
            b"0 48\n1\n",
            b"a b\n",
            b"0 48 x\n",
            b"\xff\xfe0 48",
            b"0 -1",
            b"0 9999999999",
        ],
    )
    def test_anything_else_is_refused(self, content: bytes) -> None:
        assert "/there/some-idx: not a mapping file" in refusal(lambda: parse_mapping(raw(content))).found


def emnist_files(split: str = "byclass", first_label: int = 0, mapping: bytes = MAPPING) -> dict[str, bytes]:
    """The five official files of a split, by name: 12 training and 5 test images of three classes."""
    files = {f"emnist-{split}-mapping.txt": mapping}
    for part, count in (("train", 12), ("test", 5)):
        files[f"emnist-{split}-{part}-images-idx3-ubyte.gz"] = gzip.compress(idx(IMAGES[:count]), mtime=0)
        files[f"emnist-{split}-{part}-labels-idx1-ubyte.gz"] = gzip.compress(idx(LABELS[:count] + first_label), mtime=0)
    return files


def write_archive(directory: Path, files: dict[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> Path:
    """The official `gzip.zip`: every file in a folder `gzip`."""
    write_zip(directory / "gzip.zip", {f"gzip/{name}": content for name, content in files.items()}, compression)
    return directory


def assert_is_synthetic_emnist(parts: tuple[RawSplit, ...], classes: tuple[str, ...] = ("0", "A", "a")) -> None:
    assert [part.name for part in parts] == ["train", "test"]
    for part, count in zip(parts, (12, 5), strict=True):
        assert part.classes == classes
        assert part.transposed
        assert part.image_shape == (28, 28, 1)
        assert part.labels.tolist() == LABELS[:count].tolist()
        rows = np.array([3, 0, 3])
        np.testing.assert_array_equal(part.read(rows), IMAGES[rows][..., None])


class TestEmnist:
    def test_from_loose_files(self, tmp_path: Path) -> None:
        assert_is_synthetic_emnist(load("emnist", write_tree(tmp_path, emnist_files()), "byclass"))

    def test_from_loose_files_that_were_decompressed(self, tmp_path: Path) -> None:
        files = {
            name.removesuffix(".gz"): gzip.decompress(content) if name.endswith(".gz") else content
            for name, content in emnist_files().items()
        }
        assert_is_synthetic_emnist(load("emnist", write_tree(tmp_path, files), "byclass"))

    def test_from_the_official_archive(self, tmp_path: Path) -> None:
        write_archive(tmp_path, emnist_files("balanced") | emnist_files("byclass"))
        for split in ("balanced", "byclass"):
            assert_is_synthetic_emnist(load("emnist", tmp_path, split))

    def test_from_archive_and_loose_files_together(self, tmp_path: Path) -> None:
        """A loose file wins over the archive's."""
        files = emnist_files()
        name = "emnist-byclass-mapping.txt"
        write_archive(tmp_path, {**files, name: b"0 1\n1 2\n2 3\n"})
        write_tree(tmp_path, {name: MAPPING})
        assert_is_synthetic_emnist(load("emnist", tmp_path, "byclass"))

    def test_letters_are_numbered_from_one(self, tmp_path: Path) -> None:
        write_tree(tmp_path, emnist_files("letters", first_label=1, mapping=b"1 65 97\n2 66 98\n3 67 99\n"))
        assert_is_synthetic_emnist(load("emnist", tmp_path, "letters"), classes=("Aa", "Bb", "Cc"))

    def test_raw_files_are_recorded_with_their_hashes(self, tmp_path: Path) -> None:
        loose, archived = tmp_path / "loose", tmp_path / "archived"
        loose.mkdir(), archived.mkdir()
        parts = load("emnist", write_tree(loose, emnist_files()), "byclass")
        assert {file.name: file.bytes for file in parts[1].files} == {
            name: len(content) for name, content in emnist_files().items() if "train" not in name
        }
        assert load("emnist", write_archive(archived, emnist_files()), "byclass")[0].files == parts[0].files

    @pytest.mark.parametrize("missing", list(emnist_files())[1:])
    @pytest.mark.parametrize("write", [write_tree, write_archive])
    def test_a_missing_file_is_named(
        self, tmp_path: Path, missing: str, write: Callable[[Path, dict[str, bytes]], Path]
    ) -> None:
        write(tmp_path, {name: content for name, content in emnist_files().items() if name != missing})
        error = refusal(lambda: load("emnist", tmp_path, "byclass"))
        assert error.found == f"no {missing.removesuffix('.gz')} in {tmp_path}"

    @pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
    @pytest.mark.parametrize("share", [0.1, 0.3, 0.5])
    def test_a_changed_archive_is_refused_by_name(self, tmp_path: Path, compression: int, share: float) -> None:
        path = write_archive(tmp_path, emnist_files(), compression) / "gzip.zip"
        content = bytearray(path.read_bytes())
        start = int(len(content) * share)
        content[start : start + 400] = bytes(value ^ 0x5A for value in content[start : start + 400])
        path.write_bytes(content)
        assert str(path) in refusal(lambda: load("emnist", tmp_path, "byclass")).found

    def test_an_archive_with_a_broken_compressed_stream_is_refused_by_name(self, tmp_path: Path) -> None:
        """Three set bits at the beginning of a deflated member are no block type: zlib's error, not zipfile's."""
        path = write_archive(tmp_path, emnist_files()) / "gzip.zip"
        content = path.read_bytes()
        first_name = b"gzip/emnist-byclass-mapping.txt"
        start = content.index(first_name) + len(first_name)
        path.write_bytes(content[:start] + b"\xff" + content[start + 1 :])
        assert f"{path}, a damaged archive" in refusal(lambda: load("emnist", tmp_path, "byclass")).found

    def test_an_archive_with_a_password_is_refused_by_name(self, tmp_path: Path) -> None:
        """The first flag bit of a member says that it is encrypted."""
        path = write_archive(tmp_path, emnist_files()) / "gzip.zip"
        content = bytearray(path.read_bytes())
        for signature, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
            content[content.index(signature) + flags] |= 1
        path.write_bytes(content)
        assert f"{path}, a damaged archive" in refusal(lambda: load("emnist", tmp_path, "byclass")).found

    @pytest.mark.parametrize("kept", [0, 100, -30])
    def test_a_cut_archive_is_refused_by_name(self, tmp_path: Path, kept: int) -> None:
        path = write_archive(tmp_path, emnist_files()) / "gzip.zip"
        path.write_bytes(path.read_bytes()[:kept])
        error = refusal(lambda: load("emnist", tmp_path, "byclass"))
        assert f"{path}, a damaged archive" in error.found
        assert f"rm {path}" in error.hint

    @pytest.mark.parametrize("part", ["train", "test"])
    @pytest.mark.parametrize("what", ["images-idx3", "labels-idx1"])
    def test_a_damaged_file_is_named(self, tmp_path: Path, part: str, what: str) -> None:
        name = f"emnist-byclass-{part}-{what}-ubyte.gz"
        files = emnist_files()
        write_tree(tmp_path, {**files, name: files[name][:-5]})
        assert refusal(lambda: load("emnist", tmp_path, "byclass")).found.startswith(f"{tmp_path / name}: ")

    def test_plan_says_what_would_be_done(self, tmp_path: Path) -> None:
        plan = find_source("emnist").plan
        assert "download https://biometrics.nist.gov" in plan(SourceOptions(tmp_path / "none", "byclass"))
        write_tree(tmp_path, emnist_files())
        assert plan(SourceOptions(tmp_path, "byclass")) == f"read the byclass files in {tmp_path}"
        (tmp_path / "emnist-byclass-test-labels-idx1-ubyte.gz").unlink()
        missing = "emnist-byclass-test-labels-idx1-ubyte"
        assert plan(SourceOptions(tmp_path, "byclass")) == f"fail: {missing} not in {tmp_path}"

    @pytest.mark.parametrize("folder", ["", "EMNIST/raw", "raw", "emnist_source_files"])
    def test_from_the_directories_of_torchvision_and_kaggle(self, tmp_path: Path, folder: str) -> None:
        """Decompressed, as both leave them; found before anything would be downloaded."""
        files = {name.removesuffix(".gz"): content for name, content in emnist_files().items()}
        files = {name: gzip.decompress(content) if "idx" in name else content for name, content in files.items()}
        write_tree(tmp_path / folder, files)
        assert find_source("emnist").plan(SourceOptions(tmp_path, "byclass")).startswith("read the byclass files")
        assert_is_synthetic_emnist(load("emnist", tmp_path, "byclass"))

    @pytest.mark.parametrize("archive", ["EMNIST/raw/gzip.zip", "archive.zip", "emnist.zip", "emnist-gzip.zip"])
    def test_from_archives_of_other_names(self, tmp_path: Path, archive: str) -> None:
        (tmp_path / archive).parent.mkdir(parents=True, exist_ok=True)
        write_zip(tmp_path / archive, {f"emnist_source_files/{name}": file for name, file in emnist_files().items()})
        assert_is_synthetic_emnist(load("emnist", tmp_path, "byclass"))

    @pytest.mark.parametrize("split, first_label", [("byclass", 0), ("letters", 1)])
    @pytest.mark.parametrize("newline", ["\n", "\r\n"])
    def test_from_the_tables_of_kaggle(
        self, tmp_path: Path, split: str, first_label: int, newline: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("pipeline.datasets.emnist._CHUNK", 5000)  # two rows
        files = {f"emnist-{split}-mapping.txt": MAPPING if split == "byclass" else b"1 48\n2 65\n3 97\n"}
        for part, count in (("train", 12), ("test", 5)):
            rows = zip(LABELS[:count] + first_label, IMAGES[:count].reshape(count, -1), strict=True)
            lines = (",".join(map(str, (label, *row.tolist()))) for label, row in rows)
            files[f"emnist-{split}-{part}.csv"] = newline.join((*lines, "")).encode()
        write_tree(tmp_path, files)
        parts = load("emnist", tmp_path, split)
        assert_is_synthetic_emnist(parts)
        assert [file.name for file in parts[1].files] == [f"emnist-{split}-test.csv", f"emnist-{split}-mapping.txt"]
        write_tree(tmp_path, emnist_files(split, first_label, files[f"emnist-{split}-mapping.txt"]))
        assert "idx3" in load("emnist", tmp_path, split)[1].files[0].name

    @pytest.mark.parametrize(
        "rows, words",
        [
            (b"\n", "empty"),
            (b"1,2,3\n", "not a table of pixels"),
            (b"0," + b"0," * 783 + b"256\n", "values 0 .. 256"),
            (b"0," + b"0," * 783 + b"-1\n", "values -1 .. 0"),
            (b"0," + b"0," * 783 + b"x\n", "not a table of pixels"),
            (b"62," + b"0," * 783 + b"0\n", "labels 62 .. 62"),
            (b"label" + b",pixel" * 784 + b"\n", "not a table of pixels"),
            (b"0" + b",0" * 784 + b"\nlabel" + b",pixel" * 784 + b"\n", "not a table of pixels"),
            (b"0" + b",0" * 783 + b"\n0" + b",0" * 785 + b"\n", "a line without 785 values"),
            (b"0" + b",0" * 784 + b"\n\n0" + b",0" * 784 + b"\n", "a line without 785 values"),
        ],
    )
    def test_damaged_tables_are_named(self, tmp_path: Path, rows: bytes, words: str) -> None:
        good = b"0," + b"0," * 783 + b"0\n"
        write_tree(tmp_path, {"emnist-byclass-train.csv": good, "emnist-byclass-test.csv": rows})
        error = refusal(lambda: load("emnist", tmp_path, "byclass"))
        assert "emnist-byclass-test.csv" in error.found and words in error.found

    @pytest.mark.parametrize(
        "split, classes, first",
        [("byclass", 62, "0"), ("bymerge", 47, "0"), ("letters", 26, "Aa"), ("digits", 10, "0")],
    )
    def test_without_the_mapping_the_classes_are_the_published_ones(
        self, tmp_path: Path, split: str, classes: int, first: str
    ) -> None:
        files = emnist_files(split, int(split == "letters"))
        train, _ = load("emnist", write_tree(tmp_path, dict(list(files.items())[1:])), split)
        assert (len(train.classes), train.classes[0]) == (classes, first)
        assert train.labels.tolist() == LABELS.tolist()
        assert [file.name for file in train.files] == list(files)[1:3]


class TestDigits:
    def test_parts_are_disjoint_and_stratified(self) -> None:
        from sklearn.datasets import load_digits

        digits = load_digits()
        train, test = load("digits", Path("nowhere"))
        assert (len(train.labels), len(test.labels)) == (1438, 359)
        everything = [part.read(np.arange(len(part.labels))) for part in (train, test)]
        # Together they are the whole set, image by image: the digits are all different.
        packed = {image.tobytes() for images in everything for image in images}
        whole = {np.rint(image * (255 / 16)).astype(np.uint8).tobytes() for image in digits.images}
        assert len(whole) == 1797
        assert packed == whole
        shares = np.bincount(test.labels) - np.bincount(digits.target) * 0.2
        assert np.abs(shares).max() < 1

    def test_pixels_use_the_whole_range(self) -> None:
        train, _ = load("digits", Path("nowhere"))
        images = train.read(np.arange(len(train.labels)))
        assert images.shape == (1438, 8, 8, 1) and images.dtype == np.uint8
        assert (images.min(), images.max()) == (0, 255)
        assert not train.transposed
        assert train.classes == tuple("0123456789")


class TestGenuine:
    def test_emnist_byclass(self, shared_data: Path) -> None:
        train, test = load("emnist", shared_data / "emnist", "byclass")
        assert (len(train.labels), len(test.labels)) == (96_323, 10_000)
        assert train.classes == _CLASSES["byclass"]
        assert load("emnist", shared_data / "emnist", "bymerge")[0].classes == _CLASSES["bymerge"]
        assert "".join(train.classes) == "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
        assert np.bincount(test.labels, minlength=62).min() > 0
        assert train.transposed and train.image_shape == (28, 28, 1)

    def test_emnist_is_stored_transposed(self, shared_data: Path) -> None:
        """The mean of class `1` is a vertical bar only once rows and columns are exchanged."""
        _, test = load("emnist", shared_data / "emnist", "byclass")
        mean = test.read(np.flatnonzero(test.labels == 1)).astype(float).mean(axis=0)[..., 0]
        along_rows, along_columns = mean.sum(axis=1).max(), mean.sum(axis=0).max()
        assert along_rows > 1.5 * along_columns

    def test_mnist(self, shared_data: Path) -> None:
        train, test = load("mnist", shared_data / "mnist")
        assert (len(train.labels), len(test.labels)) == (60_000, 10_000)
        assert np.bincount(test.labels).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
        assert train.labels[:5].tolist() == [5, 0, 4, 1, 9]
        assert not train.transposed
        mean = test.read(np.flatnonzero(test.labels == 1)).astype(float).mean(axis=0)[..., 0]
        assert mean.sum(axis=0).max() > 1.5 * mean.sum(axis=1).max()


def test_every_source_keeps_its_contract() -> None:
    assert set(source_names()) >= {"digits", "emnist", "mnist"}
    for name in source_names():
        source = find_source(name)
        assert source.name == name
        assert source.description
        assert len(set(source.variants)) == len(source.variants)


@pytest.mark.parametrize(
    ("images", "labels", "word"),
    [
        (np.zeros((4, 8, 8, 1), np.float32), np.zeros(4, int), "float32"),
        (np.zeros((4, 8, 8), np.uint8), np.zeros(4, int), "[4, 8, 8]"),
        (np.zeros((4, 8, 8, 2), np.uint8), np.zeros(4, int), "2 channels"),
        (np.zeros((4, 8, 8, 1), np.uint8), np.zeros(3, int), "4 images and 3 labels"),
        (np.zeros((4, 8, 8, 1), np.uint8), np.array([0, 1, 2, 0]), "labels 0 .. 2"),
        (np.zeros((4, 8, 8, 1), np.uint8), np.zeros(4), "labels of float64"),
        (np.zeros((0, 8, 8, 1), np.uint8), np.zeros(0, int), "not empty"),
    ],
)
def test_arrays_that_could_not_be_loaded_are_not_packed(images: np.ndarray, labels: np.ndarray, word: str) -> None:
    with pytest.raises(UserError) as caught:
        RawSplit.from_arrays("train", images, labels, ("a", "b"))
    assert word in str(caught.value)
