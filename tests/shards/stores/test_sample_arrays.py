"""The arrays beside the shards are what the shards hold, and damage to a block is reported when it is first read."""

from __future__ import annotations

import io
import os
import shutil
import sys
import tarfile
import tracemalloc
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from conftest import pack_splits, synthetic_splits
from support.raw_files import refusal
from support.synthetic_records import pack_pictures

import pipeline.packing.pack
from benchmarks.common.sparse_store import write_sparse_split
from shards import Manifest, open_split
from shards.errors import CorruptError, MismatchError
from shards.manifest import StoreKind
from shards.stores import sample_arrays, tar
from shards.stores.base import Store
from shards.stores.sample_arrays import array_dtypes, map_array, numbers_crc32, records_crc32
from shards.stores.split_files import read_ahead

BLOCK_SIZE, SHAPE = 16, (5, 4, 3)
KINDS: tuple[StoreKind, ...] = ("tar", "zarr", "records")


@pytest.fixture(scope="module")
def packs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """75 images in blocks of 16, two of them a shard. Not to be changed."""
    directory = tmp_path_factory.mktemp("arrays")
    found = {"records": pack_pictures(directory / "records", records_per_shard=30, train=75, test=3)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline.packing.pack, "SHARD_BYTES", 2 * BLOCK_SIZE * int(np.prod(SHAPE)))
        for store in ("tar", "zarr"):
            parts = synthetic_splits(train=75, test=20, shape=SHAPE, transposed=False)
            found[store] = pack_splits(parts, directory / store, BLOCK_SIZE, store=store)
    return found


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def train(packs: dict[str, Path], kind: str, tmp_path: Path) -> Path:
    """A copy of the training split, to be damaged."""
    return Path(shutil.copytree(packs[kind], tmp_path / "set")) / "train"


@pytest.fixture
def no_check_on_opening(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a split of many samples."""
    monkeypatch.setattr(sample_arrays, "_CHECKED_LABELS", 0)


def opened(train: Path, memory: int | None = None, verify: bool = True) -> Store:
    return open_split(train.parent, "train", memory, verify)


def numbers_in_shards(train: Path, kind: str) -> tuple[list[int], list[int]]:
    """Labels and rows as others read them."""
    if kind == "zarr":
        group = zarr.open_group(train / "samples.zarr", mode="r")
        return group["labels"][...].tolist(), group["rows"][...].tolist()
    found: dict[str, list[int]] = {"labels": [], "rows": []}
    for path in sorted(train.glob("*.tar")):
        with tarfile.open(path) as archive:
            for member in archive:
                file = archive.extractfile(member)
                assert file is not None
                for name, record in (("labels", "cls"), ("rows", "row")):
                    if member.name.endswith(f"{name}.npy"):
                        found[name] += np.load(io.BytesIO(file.read())).tolist()
                    if member.name.endswith(f".{record}"):
                        found[name].append(int(file.read()))
    return found["labels"], found["rows"]


def test_labels_and_rows_are_those_in_the_shards(packs: dict[str, Path], kind: str) -> None:
    train = packs[kind] / "train"
    labels, rows = numbers_in_shards(train, kind)
    assert np.load(train / "labels.npy").tolist() == labels
    assert np.load(train / "rows.npy").tolist() == rows


def test_blocks_give_place_and_checksums(packs: dict[str, Path], kind: str) -> None:
    """As a reader would use them that has only the page on the format; zarr blocks are compressed."""
    train, store = packs[kind] / "train", open_split(packs[kind], "train")
    labels, rows = numbers_in_shards(train, kind)
    images = [np.asarray(image).tobytes() for image in store.read(np.arange(75))]
    size = store.manifest.block_size
    starts, ends = [], []
    for shard in store.manifest.shards:
        first = ends[-1] if ends else 0
        starts += [(shard.name, start) for start in range(first, first + shard.samples, size)]
        ends += [min(start + size, first + shard.samples) for start in range(first, first + shard.samples, size)]
    blocks = np.load(train / "blocks.npy")
    assert len(blocks) == len(starts)
    for (name, start), end, (offset, length, crc, numbers) in zip(starts, ends, blocks.tolist(), strict=True):
        content = b"".join(images[start:end])
        assert crc == zlib.crc32(content)
        assert numbers == zlib.crc32(np.array([*labels[start:end], *rows[start:end]], "<i8").tobytes())
        stored = (train / name).read_bytes()[offset : offset + length]
        assert len(stored) == length
        assert stored == content or (kind == "zarr" and stored.startswith(bytes.fromhex("28b52ffd")))


@pytest.mark.parametrize(
    ("classes", "row", "label_type", "row_type"),
    [
        (256, 2**32 - 1, "u1", "u4"),
        (257, 2**32, "u2", "i8"),
    ],
)
def test_arrays_have_the_smallest_type_that_holds_them(
    tmp_path: Path, classes: int, row: int, label_type: str, row_type: str
) -> None:
    train, test = synthetic_splits(train=10, test=5, shape=(2, 2, 1))
    changes: dict[str, Any] = {"labels": np.arange(10) % 2, "classes": tuple(map(str, range(classes)))}
    changes["read"] = lambda rows: np.zeros((len(rows), 2, 2, 1), np.uint8)
    train = replace(train, **changes, source_index=np.r_[0:9, row])
    test = replace(test, labels=np.full(5, classes - 1), classes=changes["classes"])
    pack_splits((train, test), tmp_path / "set")
    store = open_split(tmp_path / "set", "train")
    assert (store.labels.dtype, store.rows.dtype) == (np.dtype(label_type), np.dtype(row_type))
    assert sorted(store.rows.tolist()) == [*range(9), row]
    assert open_split(tmp_path / "set", "test").labels.tolist() == [classes - 1] * 5


@pytest.mark.skipif(sys.platform != "linux", reason="needs sparse files and Linux's limit on writable maps")
def test_an_array_larger_than_the_memory_is_mapped(tmp_path: Path) -> None:
    """The system may refuse a private writable map of this size."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    path, header = tmp_path / "rows.npy", sample_arrays.npy_header(np.dtype("<i8"), (memory // 4,))
    path.write_bytes(header)
    os.truncate(path, len(header) + memory // 4 * 8)
    array = map_array(path)
    assert (array.shape, array.dtype, int(array[-1])) == ((memory // 4,), np.dtype("<i8"), 0)


def test_types_of_more_classes() -> None:
    assert [array_dtypes(classes, 0)[0] for classes in (1, 65_536, 65_537)] == ["u1", "u2", "u4"]


def test_checksums_of_numbers_do_not_depend_on_their_type() -> None:
    labels, rows = np.array([3, 1, 2]), np.array([5, 2**31, 7])
    expected = zlib.crc32(np.array([3, 1, 2, 5, 2**31, 7], "<i8").tobytes())
    assert numbers_crc32(labels.astype("u1"), rows.astype("u4")) == numbers_crc32(labels, rows) == expected
    each = [numbers_crc32(labels[[number]], rows[[number]]) for number in range(3)]
    assert records_crc32(labels, rows) == each


def flip(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 4
    path.write_bytes(content)


def flip_image(train: Path, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Change a pixel (of zarr: a compressed block) of the fourth block. Returns its samples, and the others."""
    blocks = np.load(train / "blocks.npy")
    store = Manifest.read(train)
    of_block = np.arange(3 * store.block_size, 4 * store.block_size)
    shard = store.shards[1 if kind != "records" else 0].name
    flip(train / shard, int(blocks["offset"][3] + blocks["bytes"][3] // 2))
    return of_block, np.setdiff1d(np.arange(75), of_block)


@pytest.mark.parametrize("memory", [None, BLOCK_SIZE * 60], ids=["mapped", "cached"])
def test_a_damaged_block_is_refused_when_it_is_read(train: Path, kind: str, memory: int | None) -> None:
    expected = [np.asarray(image).tobytes() for image in opened(train).read(np.arange(75))]
    damaged, others = flip_image(train, kind)
    store = opened(train, memory)
    for _ in range(2):
        found = store.read(others)
        assert [np.asarray(image).tobytes() for image in found] == [expected[sample] for sample in others]
        for sample in (damaged[0], damaged[-1]):
            error = refusal(lambda sample=sample: store.read(np.array([sample])))
            assert isinstance(error, CorruptError)
            shard = Manifest.read(train).shards[0 if kind == "records" else 1].name
            block = "00000003.jpg" if kind == "records" else "block 00000003"
            assert error.found.startswith(f"{train / shard}: {block}: ")
            assert "python -m shards.verify" in error.hint


@pytest.mark.parametrize("memory", [None, BLOCK_SIZE * 60], ids=["mapped", "cached"])
@pytest.mark.parametrize("name", ["labels.npy", "rows.npy"])
@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.usefixtures("no_check_on_opening")
def test_a_damaged_label_or_row_is_refused_when_its_image_is_read(
    train: Path, kind: str, name: str, verify: bool, memory: int | None
) -> None:
    """Whether images are verified or not."""
    sample = 70
    flip(train / name, 128 + sample * (1 if name == "labels.npy" else 4))
    store = opened(train, memory, verify)
    store.read(np.arange(48))
    assert name in refusal(lambda: store.read(np.array([3, sample]))).found


def test_unverified_images_are_read_as_they_are(train: Path, kind: str) -> None:
    if kind == "zarr":
        pytest.skip("the blocks have a checksum of their own")
    damaged, _ = flip_image(train, kind)
    before = opened(train, verify=False).read(damaged)
    assert np.asarray(before[0]).size


def test_a_damaged_label_of_a_small_split_is_refused_on_opening(train: Path) -> None:
    flip(train / "labels.npy", 130)
    assert str(train / "labels.npy") in refusal(lambda: opened(train)).found


@pytest.mark.parametrize("memory", [None, BLOCK_SIZE * 60], ids=["mapped", "cached"])
@pytest.mark.parametrize("kind", ["tar", "zarr"])
def test_each_block_is_compared_once(train: Path, memory: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []
    crc32 = sample_arrays.isal_zlib.crc32

    class Counting:
        @staticmethod
        def crc32(content: object, start: int = 0) -> int:
            compared.append(memoryview(content).nbytes)
            return crc32(content, start)

    monkeypatch.setattr(sample_arrays, "isal_zlib", Counting)
    store = opened(train, memory)
    for seed in range(3):
        store.read(np.random.default_rng(seed).permutation(75))
    of_numbers = [8 * BLOCK_SIZE] * 8 + [8 * 11] * 2
    assert sorted(compared) == sorted([60 * BLOCK_SIZE] * 4 + [60 * 11] + of_numbers)


def test_an_array_that_is_changed_while_it_is_used_is_refused(train: Path) -> None:
    store = opened(train)
    with open(train / "labels.npy", "r+b") as file:
        file.seek(128)
        file.write(bytes(75))
    error = refusal(lambda: [store.read(np.array([sample])) for sample in range(75)])
    assert isinstance(error, MismatchError)
    assert error.found.startswith(f"{train / 'labels.npy'}, which was replaced, changed or removed")


@pytest.mark.parametrize("kind", ["tar", "zarr"])  # records are compared at each read
@pytest.mark.parametrize("memory", [None, 74 * int(np.prod(SHAPE))])
def test_an_array_that_is_changed_after_all_images_were_read_is_refused(train: Path, memory: int | None) -> None:
    """The images may come from memory then. The labels come from the file."""
    store = opened(train, memory)
    store.read(np.arange(64))
    with open(train / "labels.npy", "r+b") as file:
        file.seek(128)
        file.write(bytes(75))
    error = refusal(lambda: [store.read(np.arange(64)) for _ in range(75)])
    assert isinstance(error, MismatchError)
    assert error.found.startswith(f"{train / 'labels.npy'}, which was replaced, changed or removed")


def test_an_array_that_is_replaced_while_it_is_used_is_read_as_it_was(train: Path) -> None:
    store = opened(train)
    expected = store.labels.tolist()
    (train / "new").write_bytes(bytes(300))
    os.replace(train / "new", train / "labels.npy")
    store.read(np.arange(75))
    assert store.labels.tolist() == expected


@pytest.mark.parametrize("kind", ["tar"])
def test_more_shards_than_may_be_mapped_are_read(train: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def maps() -> int:
        return Path("/proc/self/maps").read_text().count(str(train))

    expected = opened(train).read(np.arange(75))
    monkeypatch.setattr(tar, "MAX_MAPPED_FILES", 2)
    store = opened(train)
    np.testing.assert_array_equal(store.read(np.arange(75)[::-1]), expected[::-1])
    assert maps() == len(("labels", "rows"))


def test_ten_million_images_open_in_the_memory_of_their_shards(tmp_path: Path) -> None:
    """236 shards, sparse files; 20,000 blocks of 20 bytes are read, labels and rows are not."""
    samples = 10_000_384
    write_sparse_split(tmp_path, samples)
    open_split(tmp_path, "train")  # imports
    tracemalloc.start()
    try:
        store = open_split(tmp_path, "train")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < samples / 2, "bytes"
    assert len(store) == samples and store.labels[[0, 255, 256, samples - 1]].tolist() == [1, 1, 0, 0]
    assert not store.read(np.array([0, 12_345, samples - 1])).any()


@pytest.mark.parametrize("verify", [True, False])
def test_a_mapped_block_is_read_ahead_once_before_it_is_compared(
    packs: dict[str, Path], verify: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranges: list[tuple[int, int]] = []

    def record(memory: Any, start: int, size: int) -> None:
        ranges.append((start, size))
        read_ahead(memory, start, size)

    store = open_split(packs["tar"], "train", verify=verify)
    assert isinstance(store, tar.TarStore)
    monkeypatch.setattr(tar, "read_ahead", record)
    expected = store.read(np.arange(75))
    found = ranges.copy()
    np.testing.assert_array_equal(store.read(np.arange(75)), expected)
    assert ranges == found
    if not verify:
        assert found == []
        return
    memory = np.frombuffer(store._map, np.uint8)
    content = [memory[start : start + size].tobytes() for start, size in found]
    assert content == [expected[first : first + BLOCK_SIZE].tobytes() for first in range(0, 75, BLOCK_SIZE)]
