"""The zarr arrays are what any zarr v3 reader reads, and our own reader gives what zarr-python gives."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numcodecs
import numpy as np
import pytest
import zarr
from conftest import pack_splits, synthetic_splits
from numpy.typing import NDArray
from support.version_2 import downgrade

import pipeline.packing.pack
from pipeline.datasets import find_source
from pipeline.packing.pack import PackSettings, pack
from pipeline.readers.raw_split import SourceOptions
from shards import Manifest, UserError, open_split
from shards.open import open_store
from shards.stores.base import Block, Layout, Store
from shards.stores.create import make_writer
from shards.stores.zarr_arrays import GROUP

SHAPE = (12, 10, 3)
STORED = (10, 12, 3)  # transposed
BLOCK_SIZE = 32
INDEX_ENTRY, CHECKSUM = 16, 4


def pack_small(out: Path, compression: str = "zstd", **settings: object) -> Path:
    """300 colour images in shards of two blocks of 32: five shards, the last block of 12."""
    parts = synthetic_splits(train=300, test=40, shape=SHAPE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline.packing.pack, "SHARD_BYTES", 2 * BLOCK_SIZE * int(np.prod(SHAPE)))
        return pack_splits(parts, out, BLOCK_SIZE, **{"store": "zarr", "compression": compression, **settings})


@pytest.fixture(scope="module", params=["zstd", "none"])
def packed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack_small(tmp_path_factory.mktemp("zarr") / "set", request.param)


def arrays_of(store: Store) -> dict[str, NDArray]:
    return {"images": store.read(np.arange(len(store))), "labels": store.labels, "rows": store.rows}


def content(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


class TestOthersReadIt:
    def test_zarr_python_as_a_stranger_uses_it(self, packed: Path) -> None:
        group = zarr.open_group(packed / "train" / GROUP, mode="r")
        expected = arrays_of(open_split(packed, "train"))
        assert set(group.array_keys()) == set(expected)
        for name, values in expected.items():
            np.testing.assert_array_equal(group[name][...], values)

    def test_zarr_python_slices_across_blocks_and_shards(self, packed: Path) -> None:
        images = zarr.open_array(packed / "train" / GROUP / "images", mode="r")
        expected = open_split(packed, "train").read(np.arange(300))
        for start, stop in ((0, 1), (31, 33), (50, 140), (299, 300)):
            np.testing.assert_array_equal(images[start:stop, 2:5], expected[start:stop, 2:5])

    def test_tensorstore(self, packed: Path) -> None:
        tensorstore = pytest.importorskip("tensorstore")
        for name, values in arrays_of(open_split(packed, "train")).items():
            files = {"driver": "file", "path": f"{packed}/train/{GROUP}/{name}/"}
            array = tensorstore.open({"driver": "zarr3", "kvstore": files}, open=True, read=True).result()
            np.testing.assert_array_equal(array.read().result(), values)

    def test_zarrs(self, packed: Path) -> None:
        pytest.importorskip("zarrs")
        expected = arrays_of(open_split(packed, "train"))
        with zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"}):
            group = zarr.open_group(packed / "train" / GROUP, mode="r")
            for name, values in expected.items():
                np.testing.assert_array_equal(group[name][...], values)


class TestFormat:
    def test_a_block_is_an_inner_chunk_and_a_shard_a_file(self, packed: Path) -> None:
        for name, sample in (("images", STORED), ("labels", ()), ("rows", ())):
            array = zarr.open_array(packed / "train" / GROUP / name, mode="r")
            assert array.metadata.zarr_format == 3
            assert array.shape == (300, *sample)
            assert array.chunks == (BLOCK_SIZE, *sample)
            assert array.shards == (2 * BLOCK_SIZE, *sample)
            files = {path for path in (packed / "train" / GROUP / name).rglob("*") if path.is_file()}
            assert len(files) == 1 + 5

    def test_shards_hold_the_samples_of_the_tar_shards(self, packed: Path, tmp_path: Path) -> None:
        tar = Manifest.read(pack_small(tmp_path / "tar", store="tar") / "train")
        manifest = Manifest.read(packed / "train")
        assert [shard.samples for shard in manifest.shards] == [shard.samples for shard in tar.shards]
        assert [shard.name for shard in manifest.shards] == [f"{GROUP}/images/c/{n}/0/0/0" for n in range(5)]
        one, other = open_split(packed, "train"), open_split(tmp_path / "tar", "train")
        np.testing.assert_array_equal(one.rows, other.rows)

    def test_the_index_at_the_end_is_as_the_page_says(self, packed: Path) -> None:
        """Read as a stranger would who has only FORMAT.md: without compression the blocks are the pixels."""
        manifest = Manifest.read(packed / "train")
        images = open_split(packed, "train").read(np.arange(300))
        for number, shard in enumerate(manifest.shards):
            file = (packed / "train" / shard.name).read_bytes()
            index = np.frombuffer(file[-2 * INDEX_ENTRY - CHECKSUM : -CHECKSUM], "<u8").reshape(2, 2)
            for block, (offset, length) in enumerate(index.tolist()):
                if manifest.options["compression"] == "none":
                    pixels = images[(2 * number + block) * BLOCK_SIZE :][:BLOCK_SIZE].tobytes()
                    assert file[offset : offset + length - CHECKSUM].startswith(pixels)
                else:
                    assert file[offset : offset + 4] == bytes.fromhex("28b52ffd")  # the magic number of zstd

    def test_of_a_part_that_is_smaller_than_a_block_the_block_is_no_longer(self, tmp_path: Path) -> None:
        out = pack_splits(synthetic_splits(train=30, test=1, shape=(4, 4, 1)), tmp_path / "set", 1 << 20, store="zarr")
        assert zarr.open_array(out / "train" / GROUP / "images", mode="r").shards == (30, 4, 4, 1)
        assert len(open_split(out, "test").read(np.array([0]))) == 1

    def test_blocks_of_zeros_are_stored_too(self, tmp_path: Path) -> None:
        images = np.zeros((5 * BLOCK_SIZE, 4, 4, 1), np.uint8)
        part = replace(synthetic_splits(train=len(images), shape=(4, 4, 1))[0], read=lambda rows: images[rows])
        part = replace(part, labels=np.zeros(len(images), np.int64))
        pack(
            lambda: (part, replace(part, name="test")),
            tmp_path / "set",
            PackSettings("zeros", block_size=BLOCK_SIZE, store="zarr"),
        )
        for name in ("images/c/0/0/0/0", "labels/c/0"):
            file = (tmp_path / "set" / "train" / GROUP / name).read_bytes()
            index = np.frombuffer(file[-5 * INDEX_ENTRY - CHECKSUM : -CHECKSUM], "<i8").reshape(5, 2)
            assert (index[:, 1] > 0).all()
        assert not open_split(tmp_path / "set", "train").read(np.arange(len(images))).any()


class TestBytes:
    """The same input and seed give the same bytes, whoever writes which shard and whatever it did before."""

    def test_metadata_tell_no_time_or_place(self, packed: Path) -> None:
        for path in (packed / "train" / GROUP).rglob("zarr.json"):
            metadata = json.loads(path.read_text())
            assert metadata["attributes"] == {}
            assert str(packed.name) not in path.read_text()

    def test_packed_again(self, packed: Path, tmp_path: Path) -> None:
        compression = Manifest.read(packed / "train").options["compression"]
        assert content(pack_small(tmp_path / "again", str(compression))) == content(packed)

    @pytest.mark.parametrize("workers", [1, 2, 3])
    def test_by_forked_processes_while_stores_are_open(self, packed: Path, tmp_path: Path, workers: int) -> None:
        """zarr-python has a thread by now, which a forked process has not."""
        open_split(packed, "train").read(np.arange(300))
        parts = synthetic_splits(train=300, test=40, shape=SHAPE)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pipeline.packing.pack, "SHARD_BYTES", 2 * BLOCK_SIZE * int(np.prod(SHAPE)))
            settings = {"compression": str(Manifest.read(packed / "train").options["compression"])}
            pack(
                lambda: parts,
                tmp_path / "set",
                PackSettings("synthetic", block_size=BLOCK_SIZE, store="zarr", **settings),
                workers=workers,
            )
        assert content(tmp_path / "set") == content(packed)

    def test_over_an_earlier_attempt(self, tmp_path: Path) -> None:
        """A first attempt with more images leaves shards, which a second one with fewer overwrites."""
        first, again, fresh = (tmp_path / name for name in ("first", "again", "fresh"))
        write(first, 100)
        shutil.copytree(first, again)
        for directory in (again, fresh):
            write(directory, 90)
        named = content(fresh)
        assert {name: content(again)[name] for name in named} == named


def write(directory: Path, samples: int) -> None:
    """Write numbered images in shards of two blocks of 16."""
    directory.mkdir(exist_ok=True)
    layout = Layout(samples, (2, 2, 1), 16, 32)
    writer = make_writer("zarr", directory, layout)
    writer.start()
    for number in range(layout.shards):
        blocks = []
        for first in range(0, len(layout.samples_of(number)), 16):
            rows = np.array(layout.samples_of(number)[first : first + 16])
            images = np.repeat(rows, 4).reshape(-1, 2, 2, 1).astype(np.uint8)
            blocks.append(Block(int(rows[0]), images, rows % 3, rows))
        writer.write_shard(number, blocks)


class TestReading:
    def test_memory_stays_within_the_bound(self, tmp_path: Path) -> None:
        """2,000 images of 3 KB, of which a tenth may be held."""
        out = pack_splits(synthetic_splits(train=2000, test=1, shape=(32, 32, 3)), tmp_path / "set", 16, store="zarr")
        raw, block = 2000 * 3072, 16 * 3072
        open_store(out / "test", raw).read(np.arange(1))  # the first read of a process imports modules
        tracemalloc.start()
        try:
            store = open_store(out / "train", raw // 10)
            buffer = np.empty((64, 32, 32, 3), np.uint8)
            order = np.random.default_rng(0).permutation(2000)
            for start in range(0, 1984, 64):
                store.gather(order[start : start + 64], buffer)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        assert peak < raw // 10 + buffer.nbytes * 3 + 2 * min(threads, 16) * block + 500_000

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
    def test_a_store_that_was_opened_before_a_fork_reads_after_it(self, packed: Path) -> None:
        store = open_store(packed / "train", 4 * BLOCK_SIZE * int(np.prod(SHAPE)))
        expected = store.read(np.arange(300))
        found = in_forked_process(lambda: store.read(np.arange(300)))
        np.testing.assert_array_equal(found, expected)

    def test_opening_decodes_no_images(self, packed: Path, tmp_path: Path) -> None:
        """A damaged block is reported when it is read, and others can be read."""
        out = Path(shutil.copytree(packed, tmp_path / "set"))
        path = out / "train" / GROUP / "images" / "c" / "1" / "0" / "0" / "0"
        changed = bytearray(path.read_bytes())
        changed[100] ^= 1
        path.write_bytes(changed)
        store = open_split(out, "train")
        whole = open_split(packed, "train")
        others = np.r_[0:64, 96:300]
        np.testing.assert_array_equal(store.read(others), whole.read(others))
        with pytest.raises(UserError, match=f"{path}: block 00000002"):
            store.read(np.array([64]))

    @pytest.mark.parametrize(("column", "value"), [(0, 2**64 - 1), (1, 2**64 - 1), (0, 1 << 30), (1, 1 << 30)], ids=str)
    @pytest.mark.parametrize("place", [0, 1])
    def test_a_block_of_version_2_whose_bytes_are_nowhere_is_named(
        self, packed: Path, tmp_path: Path, place: int, column: int, value: int
    ) -> None:
        """In the second shard, of blocks 2 and 3; its index is whole in itself."""
        out = downgrade(Path(shutil.copytree(packed, tmp_path / "set")))
        path = out / "train" / GROUP / "images" / "c" / "1" / "0" / "0" / "0"
        content = path.read_bytes()
        index = np.frombuffer(content[-36:-4], "<u8").reshape(2, 2).copy()
        index[place, column] = value
        path.write_bytes(content[:-36] + bytes(numcodecs.CRC32C().encode(index.tobytes())))
        with pytest.raises(UserError, match=f"{path}: block 0000000{2 + place}: its byte range"):
            open_split(out, "train").read(np.array([64]))

    @pytest.mark.parametrize("array", ["labels", "rows"])
    def test_exchanged_labels_and_rows_of_version_2_are_refused(self, tmp_path: Path, array: str) -> None:
        """Equally long without compression, and each whole in itself: only the hash in the manifest can tell."""
        out = downgrade(pack_small(tmp_path / "set", "none"))
        directory = out / "train" / GROUP / array / "c"
        for one, other in (("0", "away"), ("1", "0"), ("away", "1")):
            (directory / one).rename(directory / other)
        with pytest.raises(UserError, match=f"{directory}/0: it was changed"):
            open_split(out, "train")


def in_forked_process(work: Callable[[], NDArray]) -> NDArray:
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=lambda: sender.send(work()), daemon=True)
    process.start()
    assert receiver.poll(60), "the forked process hangs"
    result = receiver.recv()
    process.join()
    return result


def test_emnist_takes_less_than_half_of_its_pixels(shared_data: Path, tmp_path: Path) -> None:
    source = find_source("emnist")
    request = SourceOptions(shared_data / "emnist", "byclass")
    test = next(part for part in source.load(request) if part.name == "test")
    pack(lambda: (replace(test, name="train"), test), tmp_path / "set", PackSettings("emnist", store="zarr"))
    for part in ("train", "test"):
        manifest = Manifest.read(tmp_path / "set" / part)
        assert manifest.packed_bytes < 0.45 * manifest.samples * manifest.image_bytes
