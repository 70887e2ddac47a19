"""Damage is found and named by `python -m shards.verify`, and a damaged pack is refused when it is opened."""

from __future__ import annotations

import re
import shutil
import tarfile
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import assert_user_error, pack_splits, run_module, synthetic_splits
from numpy.typing import NDArray
from support.version_2 import downgrade

import pipeline.packing.pack
from shards import UserError, open_split
from shards.convert import convert
from shards.manifest import ARRAYS, MANIFEST_NAME, StoreKind
from shards.stores.base import block_key
from shards.stores.tar import COMPONENTS, npy_header
from shards.stores.zarr import ShardFile
from shards.stores.zarr_arrays import GROUP
from shards.verify.check import check_split

SHAPE = (4, 5, 1)
BLOCK_SIZE = 20
LAST = "shard-00002.tar"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """95 small images in three shards: blocks 0 and 1, 2 and 3, and 4 with 15 images. Not to be changed."""
    parts = synthetic_splits(train=95, test=30, shape=SHAPE, transposed=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline.packing.pack, "SHARD_BYTES", 2 * BLOCK_SIZE * int(np.prod(SHAPE)))
        return pack_splits(parts, tmp_path_factory.mktemp("verify") / "set", block_size=BLOCK_SIZE)


@pytest.fixture
def pack(whole: Path, tmp_path: Path) -> Path:
    """A copy of the whole pack, to be damaged."""
    return Path(shutil.copytree(whole, tmp_path / "set"))


def shard_of(block: int) -> str:
    return f"shard-{block // 2:05d}.tar"


def member(pack: Path, block: int, component: str) -> tarfile.TarInfo:
    with tarfile.open(pack / "train" / shard_of(block)) as tar:
        return tar.getmember(f"{block_key(block)}.{component}")


def overwrite(path: Path, offset: int, content: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        before = file.read(len(content))
        assert len(before) == len(content) and before != content
        file.seek(offset)
        file.write(content)


def flip(path: Path, offset: int, bits: int = 0x10) -> None:
    overwrite(path, offset, bytes([path.read_bytes()[offset] ^ bits]))


def faults_of(pack: Path) -> list[str]:
    return check_split(pack / "train")[1]


def assert_names_only(faults: list[str], shard: str, block: int) -> None:
    """The faults name one shard and, of all blocks, one."""
    text = "\n".join(faults)
    assert set(re.findall(r"shard-\d{5}", text)) == {shard.removesuffix(".tar")}
    assert set(re.findall(r"\b\d{8}\b", text)) == {block_key(block)}


class TestVerify:
    def test_a_whole_pack_has_no_faults(self, pack: Path) -> None:
        for part, samples in (("train", 95), ("test", 30)):
            manifest, faults = check_split(pack / part)
            assert faults == []
            assert manifest.samples == samples

    @pytest.mark.parametrize("block", range(5))
    @pytest.mark.parametrize("component", COMPONENTS)
    def test_a_flipped_byte_of_an_array_names_shard_and_block(self, pack: Path, block: int, component: str) -> None:
        flip(pack / "train" / shard_of(block), member(pack, block, component).offset_data + 128 + 8, bits=1)
        assert_names_only(faults_of(pack), shard_of(block), block)

    @pytest.mark.parametrize("block", range(5))
    def test_a_flipped_byte_of_a_tar_header_names_shard_and_block(self, pack: Path, block: int) -> None:
        flip(pack / "train" / shard_of(block), member(pack, block, "labels.npy").offset)
        assert_names_only(faults_of(pack), shard_of(block), block)

    @pytest.mark.parametrize("block", range(5))
    def test_a_flipped_byte_of_the_index_names_shard_and_block(self, pack: Path, block: int) -> None:
        index = pack / "train" / shard_of(block).replace(".tar", ".idx")
        flip(index, index.read_bytes().index(f" {block_key(block)}.rows.npy".encode()) - 1, bits=1)
        assert_names_only(faults_of(pack), shard_of(block), block)

    @pytest.mark.parametrize("block", range(5))
    def test_a_shard_cut_off_names_shard_and_block(self, pack: Path, block: int) -> None:
        path = pack / "train" / shard_of(block)
        path.write_bytes(path.read_bytes()[: member(pack, block, "images.npy").offset_data + 200])
        assert_names_only(faults_of(pack), shard_of(block), block)

    def test_a_shard_without_its_end_is_found(self, pack: Path) -> None:
        path = pack / "train" / LAST
        path.write_bytes(path.read_bytes()[:-1024])
        assert any(LAST in fault and "bytes, the manifest says" in fault for fault in faults_of(pack))

    def test_a_longer_shard_is_found(self, pack: Path) -> None:
        with open(pack / "train" / LAST, "ab") as file:
            file.write(b"\0")
        assert any(LAST in fault for fault in faults_of(pack))

    @pytest.mark.parametrize("suffix", [".tar", ".idx"])
    def test_a_missing_or_empty_file_is_named(self, pack: Path, suffix: str) -> None:
        path = (pack / "train" / LAST).with_suffix(suffix)
        path.write_bytes(b"")
        assert any(path.name in fault for fault in faults_of(pack))
        path.unlink()
        assert any(path.name in fault for fault in faults_of(pack))

    def test_damage_in_two_shards_names_both_blocks(self, pack: Path) -> None:
        for block in (1, 4):
            flip(pack / "train" / shard_of(block), member(pack, block, "images.npy").offset_data + 150)
        text = "\n".join(faults_of(pack))
        assert set(re.findall(r"\b\d{8}\b", text)) == {block_key(1), block_key(4)}
        assert set(re.findall(r"shard-\d{5}\.tar", text)) == {shard_of(1), shard_of(4)}

    def test_swapped_shards_are_found(self, pack: Path) -> None:
        first, second = pack / "train" / "shard-00000.tar", pack / "train" / "shard-00001.tar"
        contents = first.read_bytes(), second.read_bytes()
        second.write_bytes(contents[0])
        first.write_bytes(contents[1])
        text = "\n".join(faults_of(pack))
        assert first.name in text and second.name in text

    def test_a_manifest_with_other_counts_by_class_is_found(self, pack: Path) -> None:
        """Moved from one class to another, so that the sums still agree and only counting can tell."""
        path = pack / "train" / MANIFEST_NAME
        manifest, _ = check_split(pack / "train")
        counts = (manifest.counts[0] - 1, manifest.counts[1] + 1, *manifest.counts[2:])
        path.write_text(manifest.model_copy(update={"counts": counts}).to_json())
        assert any("counts by class" in fault for fault in faults_of(pack))

    @pytest.mark.parametrize("name", ["shard-00000.tar", "shard-00000.idx"])
    @pytest.mark.parametrize("bits", [0x01, 0x80])
    @pytest.mark.parametrize("stride", [29, pytest.param(7, marks=pytest.mark.slow)])
    def test_any_flipped_byte_is_found_and_named(self, pack: Path, name: str, bits: int, stride: int) -> None:
        """Every byte of the index; every `stride`-th of the shard. Never a traceback."""
        path = pack / "train" / name
        content = path.read_bytes()
        for offset in range(0, len(content), stride if name.endswith(".tar") else 1):
            flip(path, offset, bits)
            assert any(name in fault for fault in faults_of(pack)), offset
            path.write_bytes(content)

    @pytest.mark.parametrize("replacement", [b"0", b"9", b"'", b"(", b"L", b"{", b"#", b"\n", b"\\", b"f", b"U", b"O"])
    @pytest.mark.parametrize("stride", [5, pytest.param(1, marks=pytest.mark.slow)])
    def test_a_garbled_array_header_is_a_fault_not_a_traceback(
        self, pack: Path, replacement: bytes, stride: int
    ) -> None:
        path = pack / "train" / "shard-00000.tar"
        content = path.read_bytes()
        for component in COMPONENTS:
            start = member(pack, 0, component).offset_data
            for offset in range(start + ord(replacement) % stride, start + 128, stride):
                if content[offset : offset + 1] == replacement:
                    continue
                overwrite(path, offset, replacement)
                assert_names_only(faults_of(pack), path.name, 0)
                path.write_bytes(content)

    @pytest.mark.parametrize("store", ["tar", "zarr"])
    def test_a_row_that_comes_twice_is_found(self, tmp_path: Path, store: StoreKind) -> None:
        train, test = synthetic_splits(train=50, test=1, shape=SHAPE)
        rows = np.arange(50)
        rows[7] = 8
        out = pack_splits((replace(train, source_index=rows), test), tmp_path / "set", BLOCK_SIZE, store=store)
        assert check_split(out / "train")[1] == [f"{out}/train: a source row is packed twice"]

    @pytest.mark.parametrize("store", ["tar", "zarr"])
    def test_a_shard_need_not_fit_into_memory(self, tmp_path: Path, store: StoreKind) -> None:
        """One shard of 4 MB, in 80 blocks of 50 KB."""
        out = pack_splits(synthetic_splits(train=1280, test=1, shape=(32, 32, 3)), tmp_path / "set", 16, store=store)
        check_split(out / "test")  # imports, caches
        tracemalloc.start()
        try:
            assert check_split(out / "train")[1] == []
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak < 1_000_000


ZARR_FILES = ("zarr.json", *(f"{name}/zarr.json" for name in ("images", "labels", "rows")))


class TestVerifyZarr:
    @pytest.fixture
    def zarr_pack(self, whole: Path, tmp_path: Path) -> Path:
        """The same samples in zarr arrays, to be damaged."""
        convert(whole, tmp_path / "zarr", "zarr")
        return tmp_path / "zarr"

    def test_a_whole_pack_has_no_faults(self, zarr_pack: Path) -> None:
        for part in ("train", "test"):
            assert check_split(zarr_pack / part)[1] == []

    @pytest.mark.parametrize("block", range(5))
    @pytest.mark.parametrize("array, dimensions", [("images", 4), ("labels", 1), ("rows", 1)])
    def test_a_flipped_byte_names_file_and_block(
        self, zarr_pack: Path, array: str, dimensions: int, block: int
    ) -> None:
        path = zarr_pack / "train" / GROUP / array / "c" / str(block // 2) / "/".join("0" * (dimensions - 1))
        blocks = 1 if block == 4 else 2
        index = np.frombuffer(path.read_bytes()[-4 - 16 * 2 : -4], "<u8").reshape(2, 2)
        offset, length = index[block % blocks].tolist()
        flip(path, offset + length - 1)  # of the checksum
        flip(path, offset + length // 2)
        [of_hash, of_block] = faults_of(zarr_pack)
        assert of_hash.startswith(f"{path}: SHA-256")
        assert of_block.startswith(f"{path}: block {block_key(block)}: ")

    @pytest.mark.parametrize("place", [-1, -5, -30])
    def test_a_flipped_byte_of_an_index_names_the_file(self, zarr_pack: Path, place: int) -> None:
        path = zarr_pack / "train" / GROUP / "images" / "c" / "1" / "0" / "0" / "0"
        flip(path, path.stat().st_size + place)
        assert [fault.partition(": ")[0] for fault in faults_of(zarr_pack)] == [str(path)] * 2

    @pytest.mark.parametrize("name", ZARR_FILES)
    def test_changed_metadata_are_named(self, zarr_pack: Path, name: str) -> None:
        path = zarr_pack / "train" / GROUP / name
        path.write_text(path.read_text() + " ")
        [fault] = faults_of(zarr_pack)
        assert fault.startswith(f"{path}: ")
        path.write_text(path.read_text().replace("3", "2", 1))
        assert all(fault.startswith(f"{path}: ") for fault in faults_of(zarr_pack))

    def test_every_missing_or_shortened_file_is_named(self, zarr_pack: Path) -> None:
        manifest, _ = check_split(zarr_pack / "train")
        assert len(manifest.everything) == 4 + 3 * 3 + len(ARRAYS)
        for file in manifest.everything:
            path = zarr_pack / "train" / file.name
            content = path.read_bytes()
            path.unlink()
            assert f"{path}: missing" in faults_of(zarr_pack)
            path.write_bytes(content[:-1])
            assert f"{path}: {len(content) - 1:,} bytes, the manifest says {len(content):,}" in faults_of(zarr_pack)
            path.write_bytes(content)
        assert faults_of(zarr_pack) == []

    def test_swapped_shards_name_their_blocks(self, zarr_pack: Path, tmp_path: Path) -> None:
        """Without compression shards are equally long, so that only what is in them can tell."""
        convert(zarr_pack, tmp_path / "none", "zarr", "none")
        first, second = (tmp_path / "none" / "train" / GROUP / "images" / "c" / f"{n}/0/0/0" for n in (0, 1))
        contents = first.read_bytes(), second.read_bytes()
        first.write_bytes(contents[1])
        second.write_bytes(contents[0])
        faults = faults_of(tmp_path / "none")
        assert {fault.partition(": SHA")[0] for fault in faults if "SHA" in fault} == {str(first), str(second)}
        for path, block in ((first, 0), (first, 1), (second, 2), (second, 3)):
            assert f"{path}: block {block_key(block)} was changed (CRC-32 differs)" in faults

    def test_zarr_python_itself_decodes(self, zarr_pack: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """If our own reader were wrong, and all hashes right, this would tell."""
        read = ShardFile.read
        monkeypatch.setattr(ShardFile, "read", lambda self, block: read(self, block) ^ (block == 3))
        text = "\n".join(faults_of(zarr_pack))
        assert text.count("block 00000003: zarr-python decodes it otherwise") == 3

    def test_the_command_checks_all_parts(self, zarr_pack: Path) -> None:
        process = run_module("shards.verify", zarr_pack)
        assert process.returncode == 0, process.stderr
        assert re.search(r"complete .*train: 95 samples of 5 classes in 3 shards", process.stdout)
        shutil.copytree(zarr_pack / "test", zarr_pack / "val")
        path = zarr_pack / "val" / GROUP / "rows" / "c" / "0"
        flip(path, 20)
        process = run_module("shards.verify", zarr_pack)
        assert_user_error(process, f"{path}: block 00000000: ")
        assert process.stdout.count("complete ") == 2


class TestVerifyCommand:
    """By real processes, each of which looks at several things."""

    def test_whole_pack(self, whole: Path) -> None:
        process = run_module("shards.verify", whole)
        assert process.returncode == 0, process.stderr
        assert process.stderr == ""
        assert re.search(r"complete .*train: 95 samples of 5 classes in 3 shards", process.stdout)
        assert re.search(r"complete .*test: 30 samples of 5 classes in 1 shard,", process.stdout)

    def test_damage_in_both_parts(self, pack: Path) -> None:
        flip(pack / "train" / "shard-00001.tar", member(pack, 3, "images.npy").offset_data + 140)
        (pack / "test" / "shard-00000.tar").unlink()
        process = run_module("shards.verify", pack)
        assert_user_error(
            process,
            f"{pack}/train/shard-00001.tar: block 00000003 was changed",
            f"{pack}/test/shard-00000.tar: missing",
            "python -m pipeline.shard",
        )
        assert process.stdout.count("damaged") == 2

    def test_one_part_alone(self, whole: Path) -> None:
        process = run_module("shards.verify", whole / "test")
        assert process.returncode == 0, process.stderr
        assert process.stdout.count("complete ") == 1

    @pytest.mark.parametrize("name", ["/dev/zero", "train/manifest.json"])
    def test_a_file_in_place_of_a_data_set(self, pack: Path, name: str) -> None:
        process = run_module("shards.verify", pack / name)
        assert_user_error(process, f"{pack / name}, which is no directory", "not a file in it")

    def test_missing_manifest(self, pack: Path) -> None:
        (pack / "train" / MANIFEST_NAME).unlink()
        assert_user_error(run_module("shards.verify", pack / "train"), str(pack / "train"), MANIFEST_NAME)

    def test_a_set_of_which_one_part_has_no_manifest(self, pack: Path) -> None:
        (pack / "test" / MANIFEST_NAME).unlink()
        assert_user_error(run_module("shards.verify", pack), str(pack), MANIFEST_NAME)


def cut_shard(part: Path) -> None:
    path = part / LAST
    path.write_bytes(path.read_bytes()[:-512])


def remove_shard(part: Path) -> None:
    (part / LAST).unlink()


def remove_index(part: Path) -> None:
    (part / LAST).with_suffix(".idx").unlink()


def shorten_index(part: Path) -> None:
    """A line fewer, and the first line says so: a whole index, but of another shard."""
    path = part / "shard-00001.idx"
    path.write_text("v1.2 1\n" + path.read_text().splitlines()[1] + "\n")


def exchange_lines_of_index(part: Path) -> None:
    """The index of another shard: its last block is shorter than what the manifest tells."""
    shutil.copy(part / "shard-00000.idx", part / "shard-00002.idx")


def change_array_header(part: Path) -> None:
    path = part / "shard-00001.tar"
    header = npy_header("|u1", (BLOCK_SIZE, *SHAPE))
    overwrite(path, path.read_bytes().index(header), npy_header("|i1", (BLOCK_SIZE, *SHAPE)))


def put_label_out_of_range(part: Path) -> None:
    path = part / "shard-00000.tar"
    header = npy_header("<i8", (BLOCK_SIZE,))
    overwrite(path, path.read_bytes().index(header) + len(header) + 3 * 8, (5).to_bytes(8, "little"))


def put_label_below_zero(part: Path) -> None:
    path = part / "shard-00000.tar"
    header = npy_header("<i8", (BLOCK_SIZE,))
    overwrite(path, path.read_bytes().index(header) + len(header), (-1).to_bytes(8, "little", signed=True))


def remove_manifest(part: Path) -> None:
    (part / MANIFEST_NAME).unlink()


def cut_manifest(part: Path) -> None:
    path = part / MANIFEST_NAME
    path.write_text(path.read_text()[:-30])


def future_manifest(part: Path) -> None:
    path = part / MANIFEST_NAME
    path.write_text(path.read_text().replace('"version": 2', '"version": 4'))


class TestOpening:
    @pytest.mark.parametrize(
        "damage, named",
        [
            (cut_shard, LAST),
            (remove_shard, LAST),
            (remove_index, "shard-00002.idx"),
            (shorten_index, "shard-00001.idx"),
            (exchange_lines_of_index, "shard-00002"),
            (change_array_header, "shard-00001.tar: block 00000002"),
            (put_label_out_of_range, "shard-00000.tar: block 00000000"),
            (put_label_below_zero, "shard-00000.tar: block 00000000"),
            (remove_manifest, MANIFEST_NAME),
            (cut_manifest, MANIFEST_NAME),
            (future_manifest, "format version 4"),
        ],
    )
    def test_a_damaged_pack_of_version_2_is_refused_by_name(self, pack: Path, damage, named: str) -> None:
        damage(downgrade(pack / "train"))
        with pytest.raises(UserError) as caught:
            open_split(pack, "train")
        assert named in caught.value.found

    @pytest.mark.parametrize("name", ["shard-00001.idx", MANIFEST_NAME, *ARRAYS])
    def test_one_wrong_byte_of_index_or_manifest_is_refused_or_changes_no_sample(
        self, pack: Path, whole: Path, name: str
    ) -> None:
        """Some bytes do not matter for reading (a class name, a hash); no other may give other samples."""
        expected = everything(whole)
        if name.endswith(".idx"):  # read in version 2 only
            downgrade(pack / "train")
        path = pack / "train" / name
        content = path.read_bytes()
        refused = 0
        for changed in one_byte_wrong(content):
            path.write_bytes(changed)
            try:
                found = everything(pack)
            except UserError:
                refused += 1
                continue
            for one, other in zip(found, expected, strict=True):
                np.testing.assert_array_equal(one, other)
        assert refused > len(content)


def everything(pack: Path) -> tuple[NDArray, NDArray, NDArray]:
    store = open_split(pack, "train")
    images = np.empty((len(store), *store.manifest.image_shape), np.uint8)
    store.gather(np.arange(len(store)), images)
    return images, store.labels, store.rows


def one_byte_wrong(content: bytes) -> Iterator[bytes]:
    for offset in range(len(content)):
        for replacement in b"1-\xff":
            if content[offset] != replacement:
                yield content[:offset] + bytes([replacement]) + content[offset + 1 :]
