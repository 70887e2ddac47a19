"""An open store reads the files that it opened, or says that they were replaced; it keeps few of them open."""

from __future__ import annotations

import ctypes
import errno
import gc
import mmap
import os
import resource
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, assert_user_error, pack_splits, synthetic_splits
from numpy.typing import NDArray
from support import warm_process
from support.raw_files import refusal
from support.synthetic_records import pack_pictures
from support.version_2 import downgrade

import pipeline.packing.pack
from pipeline.packing.repack import packed_splits
from pipeline.readers.formats.npz import NpzFile
from shards import Manifest, open_split
from shards.atomic import replace_directory
from shards.convert import convert
from shards.errors import CorruptError, MismatchError
from shards.stores import split_files
from shards.stores.base import Store
from shards.verify.check import check_split

KINDS = ("mapped tar", "tar", "zarr", "records")
ONE_BLOCK = 20 * 4 * 5
REPLACED = "which was replaced, changed or removed while it was read"


@pytest.fixture(scope="module")
def packs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """For each store two data sets of the same sizes and classes, in several shards, with other samples."""
    directory = tmp_path_factory.mktemp("two")
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline.packing.pack, "SHARD_BYTES", 2 * ONE_BLOCK)
        for store in ("tar", "zarr"):
            found[store] = tuple(
                pack_splits(
                    synthetic_splits(train=95, test=30, shape=(4, 5, 1), seed=seed),
                    directory / store / str(seed),
                    block_size=20,
                    store=store,
                    compression="none",
                )
                for seed in (0, 1)
            )
    records = [pack_pictures(directory / "records" / "0", records_per_shard=30)]
    records.append(pack_pictures(directory / "records" / "1", records_per_shard=30, classes=3))
    return {**found, "mapped tar": found["tar"], "records": tuple(records)}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def both(packs: dict[str, tuple[Path, Path]], kind: str, tmp_path: Path) -> tuple[Path, Path]:
    """A copy of the first data set, and the second one."""
    first, second = packs[kind]
    return Path(shutil.copytree(first, tmp_path / "set")), second


@pytest.fixture(params=[1, 64], ids=["one open file", "all open"])
def few_open(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(split_files, "max_open_files", lambda: request.param)
    return request.param


def opened(directory: Path, kind: str) -> Store:
    return open_split(directory, "train", None if kind == "mapped tar" else ONE_BLOCK)


def everything(store: Store) -> list[bytes]:
    """The images, one after the other, from the last to the first so that those read last are not in a cache."""
    return [np.asarray(store.read(np.array([sample]))[0]).tobytes() for sample in range(len(store))[::-1]]


def replace(target: Path, other: Path) -> None:
    with replace_directory(target) as replacement:
        shutil.copytree(other, replacement.path, dirs_exist_ok=True)
        replacement.commit()


def shards_of(directory: Path) -> list[Path]:
    train = directory / "train"
    return [train / shard.name for shard in Manifest.read(train).shards]


def test_a_replaced_data_set_is_read_as_it_was_or_refused(both: tuple[Path, Path], kind: str, few_open: int) -> None:
    directory, other = both
    expected, replacing = everything(opened(directory, kind)), everything(opened(other, kind))
    assert expected != replacing
    store = opened(directory, kind)
    everything(store)
    replace(directory, other)
    if few_open == 1 and kind != "mapped tar":
        error = refusal(lambda: everything(store))
        assert isinstance(error, MismatchError)
        assert REPLACED in error.found and str(directory) in error.found
    else:
        assert everything(store) == expected
    assert everything(opened(directory, kind)) == replacing


def rewrite(path: Path) -> None:
    """Other content of the same length, in place."""
    content = path.read_bytes()
    with open(path, "r+b") as file:
        file.write(bytes(byte ^ 1 for byte in content))


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def append(path: Path) -> None:
    with open(path, "ab") as file:
        file.write(b"more")


def copy_over(path: Path) -> None:
    """A file of the same content by another name."""
    shutil.copyfile(path, path.with_name("copy"))
    os.replace(path.with_name("copy"), path)


@pytest.mark.parametrize("change", [rewrite, append, cut])
def test_a_shard_that_is_changed_in_place_is_refused(
    both: tuple[Path, Path], kind: str, few_open: int, change: Callable[[Path], None]
) -> None:
    directory, _ = both
    store = opened(directory, kind)
    changed = shards_of(directory)[1]
    if kind == "mapped tar" and change is cut:
        pytest.skip("ends the process, see below")
    change(changed)
    error = refusal(lambda: everything(store))
    assert isinstance(error, MismatchError)
    assert error.found == f"{changed}, {REPLACED}"


@pytest.mark.parametrize("change", [Path.unlink, copy_over], ids=["removed", "copied over"])
def test_a_shard_that_is_removed_is_read_while_it_is_open(
    both: tuple[Path, Path], kind: str, few_open: int, change: Callable[[Path], None]
) -> None:
    directory, _ = both
    store = opened(directory, kind)
    expected = everything(store)
    changed = shards_of(directory)[1]
    change(changed)
    if few_open == 1 and kind != "mapped tar":
        assert refusal(lambda: everything(store)).found == f"{changed}, {REPLACED}"
    else:
        assert everything(store) == expected


TRUNCATED = """
import os, sys
import numpy as np
import torch
from shards import open_split
from shards.cli import run_command

def main():
    store = open_split(sys.argv[1], "train")
    os.truncate(sys.argv[2], 512)
    samples = np.arange(len(store))
    if sys.argv[3] == "rows":
        print(store.rows[-1])
    elif sys.argv[3] == "gather":
        store.read(samples)
    else:  # as the loader does: threads of torch read without Python's lock
        table, rows = store.locate(samples)
        torch.index_select(torch.from_numpy(table), 0, torch.from_numpy(rows))
    print("read")

run_command(main)
"""


@pytest.mark.parametrize("way", ["gather", "locate", "rows"])
def test_a_mapped_file_that_is_truncated_ends_the_process_with_a_message(tmp_path: Path, way: str) -> None:
    """The pages after its new end cannot be read: without a handler the process would die of SIGBUS."""
    directory = pack_splits(synthetic_splits(train=2000, test=5), tmp_path / "set")
    shard = directory / "train" / ("rows.npy" if way == "rows" else "shard-00000.tar")
    command = [sys.executable, "-c", TRUNCATED, str(directory), str(shard), way]
    process = warm_process.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert_user_error(process, f"{shard}, {REPLACED}")
    assert process.stdout == ""


MANY = """
import resource, sys
import numpy as np
from shards import open_split

resource.setrlimit(resource.RLIMIT_NOFILE, (48, 48))
stores = [open_split(sys.argv[1], split, int(sys.argv[2]) or None) for split in ("train", "test")]
for store in stores * 2:
    print(sum(map(len, store.read(np.arange(len(store))))))
"""


def test_many_shards_need_few_open_files(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """70 shards, of 48 files that the process may open."""
    if kind == "records":
        directory = pack_pictures(tmp_path / "set", records_per_shard=1, train=70, test=3)
    else:
        monkeypatch.setattr(pipeline.packing.pack, "SHARD_BYTES", 8 * 20)
        parts = synthetic_splits(train=560, test=20, shape=(4, 5, 1))
        store = "zarr" if kind == "zarr" else "tar"
        directory = pack_splits(parts, tmp_path / "set", block_size=8, store=store)
    assert len(Manifest.read(directory / "train").shards) == 70
    command = [sys.executable, "-c", MANY, str(directory), "0" if kind == "mapped tar" else "1000"]
    process = warm_process.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert process.returncode == 0, process.stderr
    stores = [open_split(directory, split) for split in ("train", "test")] * 2
    assert process.stdout.split() == [str(sum(map(len, store.read(np.arange(len(store)))))) for store in stores]


@pytest.mark.parametrize("limit, files", [(16, 1), (256, 16), (1024, 64), (10**6, 64), (resource.RLIM_INFINITY, 64)])
def test_open_files_are_a_small_part_of_what_is_allowed(
    limit: int, files: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (limit, limit))
    assert split_files.max_open_files() == files


class TestReplacedWhileItIsOpened:
    """The manifest is of one data set, and the files are of the next."""

    @pytest.fixture
    def replaced_after_the_manifest(self, both: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> Path:
        directory, other = both
        read = Manifest.read

        def read_and_replace(split: Path) -> Manifest:
            manifest = read(split)
            monkeypatch.setattr(Manifest, "read", read)
            replace(directory, other)
            return manifest

        monkeypatch.setattr(Manifest, "read", read_and_replace)
        return directory

    def test_a_split_is_refused(self, replaced_after_the_manifest: Path, kind: str) -> None:
        error = refusal(lambda: opened(replaced_after_the_manifest, kind))
        assert error.found == f"{replaced_after_the_manifest}/train/manifest.json, {REPLACED}"
        opened(replaced_after_the_manifest, kind)

    def test_verification_does_not_call_it_damaged(self, replaced_after_the_manifest: Path) -> None:
        assert REPLACED in refusal(lambda: check_split(replaced_after_the_manifest / "train")).found

    def test_conversion_writes_nothing(self, replaced_after_the_manifest: Path, kind: str, tmp_path: Path) -> None:
        if kind == "records":
            pytest.skip("records are not converted")
        error = refusal(lambda: convert(replaced_after_the_manifest, tmp_path / "new", "zarr"))
        assert REPLACED in error.found
        assert not (tmp_path / "new").exists()


def test_splits_of_two_data_sets_are_not_mixed(
    packs: dict[str, tuple[Path, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = Path(shutil.copytree(packs["tar"][0], tmp_path / "set"))

    def open_and_replace(place: Path, split: str) -> Store:
        store = open_split(place, split)
        if split == "train":
            replace(directory, packs["tar"][1])
        return store

    monkeypatch.setattr("pipeline.packing.repack.open_split", open_and_replace)
    assert REPLACED in refusal(lambda: packed_splits(directory)).found


def test_a_damaged_index_of_version_2_is_refused_even_if_it_fits(
    packs: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    """Two records have exchanged their labels: only the hash of the index can tell."""
    directory = downgrade(Path(shutil.copytree(packs["records"][0], tmp_path / "set")))
    labels = open_split(directory, "train").labels
    path = shards_of(directory)[0].with_suffix(".idx")
    lines = [line.split(" ") for line in path.read_text().split("\n")]
    second = 2 + int(np.argmax(labels[1:30] != labels[0]))
    for word in range(4, 7):
        lines[1][word], lines[second][word] = lines[second][word], lines[1][word]
    path.write_text("\n".join(map(" ".join, lines)))
    error = refusal(lambda: open_split(directory, "train"))
    assert isinstance(error, CorruptError)
    assert str(path) in error.found


def test_a_forked_process_reads_on_its_own(both: tuple[Path, Path], kind: str) -> None:
    """Both use the same descriptors, but each its own place in the file."""
    store = opened(both[0], kind)
    expected = everything(store)

    def read_often() -> bool:
        return all(everything(store) == expected for _ in range(5))

    child = os.fork()
    if not child:
        status = 1
        try:
            status = 0 if read_often() else 1
        finally:
            os._exit(status)
    assert read_often()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize("memory", [None, ONE_BLOCK])
def test_maps_are_given_back_without_a_garbage_collection(
    packs: dict[str, tuple[Path, Path]], kind: str, memory: int | None
) -> None:
    def mapped() -> int:
        return Path("/proc/self/maps").read_text().count(str(packs[kind][0]))

    gc.collect()
    gc.disable()
    try:
        before = mapped()
        store = open_split(packs[kind][0], "train", memory)
        store.read(np.arange(len(store)))
        assert mapped() > before
        del store
        assert mapped() == before
    finally:
        gc.enable()


def test_memory_of_all_shards_is_given_back(packs: dict[str, tuple[Path, Path]]) -> None:
    def mapped() -> int:
        return sum(str(packs["tar"][0]) in line for line in Path("/proc/self/maps").read_text().splitlines())

    before = mapped()
    store = open_split(packs["tar"][0], "train")
    assert mapped() == before + len(store.manifest.shards) + len(("labels", "rows"))
    images: NDArray[np.uint8] = np.asarray(store.read(np.arange(3)))
    del store
    assert mapped() == before
    assert images.any()


def test_a_pipe_in_place_of_a_shard_is_refused_at_once(both: tuple[Path, Path], kind: str) -> None:
    """Opening a pipe waits for its writer otherwise."""
    path = shards_of(both[0])[1]
    path.unlink()
    os.mkfifo(path)
    assert str(path) in refusal(lambda: opened(both[0], kind)).found


def map_or_refuse(monkeypatch: pytest.MonkeyPatch, refused: int, number: int = errno.ENODEV) -> None:
    """A file system that refuses maps of files with one of some flags, to `SplitFiles`, NumPy and others."""
    make, python_mmap = split_files._mmap, mmap.mmap

    def system_mmap(libc: ctypes.CDLL) -> Callable[..., int]:
        def call(address: int, size: int, protection: int, flags: int, *rest: int) -> int:
            if flags & refused:
                ctypes.set_errno(number)
                return -1
            return make(libc)(address, size, protection, flags, *rest)

        return call

    class Map(mmap.mmap):
        def __new__(cls, descriptor: int, *arguments: int, access: int = 0, **named: int) -> mmap.mmap:
            is_private = access == mmap.ACCESS_COPY or mmap.MAP_PRIVATE in arguments
            flags = mmap.MAP_PRIVATE if is_private else mmap.MAP_SHARED
            if descriptor >= 0 and flags & refused:
                raise OSError(number, os.strerror(number))
            return python_mmap.__new__(cls, descriptor, *arguments, access=access, **named)

    monkeypatch.setattr(split_files, "_mmap", system_mmap)
    monkeypatch.setattr(mmap, "mmap", Map)


def test_a_file_system_without_shared_maps(
    packs: dict[str, tuple[Path, Path]], kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as FUSE with direct_io."""
    directory = packs[kind][0]
    expected = everything(opened(directory, kind))
    map_or_refuse(monkeypatch, mmap.MAP_SHARED)
    assert everything(opened(directory, kind)) == expected
    assert check_split(directory / "train")[1] == []
    np.savez(tmp_path / "arrays.npz", images=np.arange(1000))
    assert NpzFile(tmp_path / "arrays.npz").array("images").tolist() == list(range(1000))


@pytest.mark.parametrize("store", ["tar", "zarr"])
def test_packing_on_a_file_system_without_shared_maps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, store: str
) -> None:
    map_or_refuse(monkeypatch, mmap.MAP_SHARED)
    pack_splits(synthetic_splits(train=20, test=5), tmp_path / "set", store=store)
    assert check_split(tmp_path / "set" / "train")[1] == []


@pytest.mark.parametrize("number", [errno.ENODEV, errno.ENOMEM])
def test_a_file_system_without_maps_is_no_damage(
    packs: dict[str, tuple[Path, Path]], kind: str, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    map_or_refuse(monkeypatch, mmap.MAP_SHARED | mmap.MAP_PRIVATE, number)
    error = refusal(lambda: opened(packs[kind][0], kind))
    assert not isinstance(error, CorruptError)
    assert str(packs[kind][0]) in error.found and os.strerror(number) in error.found
    assert (number == errno.ENODEV) == ("does not map files into memory" in error.found)


RAW = """
import os, sys
from pathlib import Path
from pipeline.readers.archives.files import open_file
from shards.cli import run_command

def main():
    content = open_file(Path(sys.argv[1])).mapped()
    os.truncate(sys.argv[1], 512)
    print(bytes(content[-1:]))

run_command(main)
"""


def test_a_mapped_raw_file_that_is_truncated_ends_the_process_with_a_message(tmp_path: Path) -> None:
    path = tmp_path / "images.npy"
    path.write_bytes(bytes(1 << 20))
    command = [sys.executable, "-c", RAW, str(path)]
    process = warm_process.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert_user_error(process, f"{path}, {REPLACED}")
