"""The contract of `Store`, and that what was packed is what is read."""

from __future__ import annotations

import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from conftest import pack_splits, synthetic_splits
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import pipeline.packing.pack
from pipeline.readers.raw_split import RawSplit
from shards import Manifest, UserError, open_split
from shards.manifest import MANIFEST_NAME, REQUIRED_SPLITS, StoreKind
from shards.open import open_store
from shards.stores.base import Block, Layout, Store
from shards.stores.create import make_writer
from shards.stores.tar import TarStore
from shards.stores.zarr import ZarrStore


@dataclass(frozen=True)
class Packed:
    """A store and the raw part that it was made from."""

    store: Store
    raw: RawSplit


def gathered(store: Store, samples: NDArray[np.int64]) -> NDArray[np.uint8]:
    """What `gather` gives, into a buffer whose old content differs from every right answer somewhere."""
    out = np.full((len(samples), *store.manifest.image_shape), 0xA5, np.uint8)
    store.gather(samples, out)
    return out


def assert_traces_back(packed: Packed, samples: NDArray[np.int64]) -> None:
    rows = packed.store.rows[samples]
    np.testing.assert_array_equal(gathered(packed.store, samples), packed.raw.read(rows))
    np.testing.assert_array_equal(packed.store.labels[samples], packed.raw.labels[rows])


class StoreContract:
    """What every `Store` promises. A store's test class inherits this and gives a `packed` fixture."""

    @pytest.fixture
    def packed(self) -> Packed:
        raise NotImplementedError

    def test_length_is_that_of_the_raw_part(self, packed: Packed) -> None:
        assert len(packed.store) == len(packed.raw.labels) == packed.store.manifest.samples

    def test_manifest_tells_of_the_raw_part(self, packed: Packed) -> None:
        manifest = packed.store.manifest
        assert isinstance(manifest, Manifest)
        assert manifest.split == packed.raw.name
        assert manifest.classes == packed.raw.classes
        assert manifest.image_shape == packed.raw.image_shape
        assert manifest.transposed == packed.raw.transposed
        assert manifest.raw == packed.raw.files
        assert manifest.counts == tuple(np.bincount(packed.raw.labels, minlength=len(packed.raw.classes)))

    def test_every_row_is_packed_once(self, packed: Packed) -> None:
        assert packed.store.rows.dtype == np.uint32
        np.testing.assert_array_equal(np.sort(packed.store.rows), np.arange(len(packed.raw.labels)))

    def test_labels_are_those_of_the_rows(self, packed: Packed) -> None:
        assert packed.store.labels.dtype == np.uint8
        np.testing.assert_array_equal(packed.store.labels, packed.raw.labels[packed.store.rows])

    def test_order_at_rest_is_shuffled(self, packed: Packed) -> None:
        """The raw part is sorted by class, so a prefix has all classes only if the rows were permuted."""
        assert set(packed.store.labels[: len(packed.store) // 4]) == set(range(len(packed.raw.classes)))

    def test_gather_of_all_traces_back(self, packed: Packed) -> None:
        assert_traces_back(packed, np.arange(len(packed.store)))

    def test_gather_backwards_traces_back(self, packed: Packed) -> None:
        assert_traces_back(packed, np.arange(len(packed.store))[::-1])

    def test_gather_at_random_with_repeats_traces_back(self, packed: Packed) -> None:
        samples = np.random.default_rng(0).integers(0, len(packed.store), 3 * len(packed.store))
        assert_traces_back(packed, samples)

    def test_gather_of_each_alone_equals_gather_of_all(self, packed: Packed) -> None:
        everything = gathered(packed.store, np.arange(len(packed.store)))
        for sample in range(len(packed.store)):
            np.testing.assert_array_equal(gathered(packed.store, np.array([sample]))[0], everything[sample])

    def test_gather_of_nothing_is_no_mistake(self, packed: Packed) -> None:
        packed.store.gather(np.array([], np.int64), np.empty((0, *packed.store.manifest.image_shape), np.uint8))

    def test_read_gives_what_gather_gives(self, packed: Packed) -> None:
        samples = np.random.default_rng(1).integers(0, len(packed.store), 50)
        images = packed.store.read(samples)
        assert images.dtype == np.uint8
        np.testing.assert_array_equal(images, gathered(packed.store, samples))

    def test_read_of_nothing_is_no_mistake(self, packed: Packed) -> None:
        assert packed.store.read(np.array([], np.int64)).shape == (0, *packed.store.manifest.image_shape)

    def test_read_outside_raises_index_error(self, packed: Packed) -> None:
        with pytest.raises(IndexError, match=str(len(packed.store))):
            packed.store.read(np.array([len(packed.store)]))

    def test_located_images_are_those_gathered(self, packed: Packed, blocks_in_memory: int | None) -> None:
        samples = np.random.default_rng(2).integers(0, len(packed.store), 50)
        located = packed.store.locate(samples)
        if blocks_in_memory and blocks_in_memory * packed.store.manifest.block_size < len(packed.store):
            assert located is None
            return
        assert located is not None
        images = located.table[located.rows].reshape(50, *packed.store.manifest.image_shape)
        np.testing.assert_array_equal(images, gathered(packed.store, samples))
        with pytest.raises(IndexError, match=str(len(packed.store))):
            packed.store.locate(np.array([len(packed.store)]))

    def test_several_threads_may_gather(self, packed: Packed) -> None:
        orders = [np.random.default_rng(seed).permutation(len(packed.store)) for seed in range(4)]
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda order: assert_traces_back(packed, order), orders))

    @pytest.mark.parametrize("beyond", [-1, 0, 1_000_000_000])
    def test_gather_outside_raises_index_error(self, packed: Packed, beyond: int) -> None:
        """-1 must not mean the last image, as it would in NumPy; 0 is the first position past the end."""
        outside = len(packed.store) + beyond if beyond >= 0 else beyond
        with pytest.raises(IndexError, match=rf"{outside}.* outside 0 \.\. {len(packed.store) - 1}$"):
            gathered(packed.store, np.array([0, outside, 1]))

    def test_gather_leaves_the_store_as_it_was(self, packed: Packed) -> None:
        samples = np.arange(10)
        first = gathered(packed.store, samples)
        first[...] = 0
        assert_traces_back(packed, samples)


KINDS: dict[str, dict[str, str]] = {
    "tar": {"store": "tar"},
    "zarr": {"store": "zarr"},
    "zarr not compressed": {"store": "zarr", "compression": "none"},
}
STORES: dict[StoreKind, type[Store]] = {"tar": TarStore, "zarr": ZarrStore}
# Blocks of images that may be in memory; of some, so few that those of a batch come and go.
BOUNDS = (None, 3, 1)


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> dict[str, str]:
    return KINDS[request.param]


@pytest.fixture(params=BOUNDS, ids=lambda blocks: f"{blocks or 'all'} blocks in memory")
def blocks_in_memory(request: pytest.FixtureRequest) -> int | None:
    return request.param


def open_bounded(directory: Path, part: str, blocks: int | None) -> Store:
    manifest = Manifest.read(directory / part)
    return open_split(directory, part, blocks and blocks * manifest.block_size * manifest.image_bytes)


@pytest.fixture(scope="module")
def one_shard(kind: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack_splits(synthetic_splits(), tmp_path_factory.mktemp("one") / "set", **kind)


@pytest.fixture(scope="module")
def many_shards(kind: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """701 images in blocks of 16, three blocks a shard: the last shard and its last block are short."""
    out = tmp_path_factory.mktemp("many") / "set"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline.packing.pack, "SHARD_BYTES", 3 * 16 * 9 * 14 * 3)
        return pack_splits(synthetic_splits(train=701, shape=(9, 14, 3)), out, block_size=16, **kind)


class TestStoreOfOneShard(StoreContract):
    @pytest.fixture(params=REQUIRED_SPLITS)
    def packed(self, request: pytest.FixtureRequest, one_shard: Path, blocks_in_memory: int | None) -> Packed:
        raw = synthetic_splits()[REQUIRED_SPLITS.index(request.param)]
        return Packed(open_bounded(one_shard, request.param, blocks_in_memory), raw)

    def test_is_a_store_of_one_shard(self, packed: Packed, kind: dict[str, str]) -> None:
        assert isinstance(packed.store, STORES[kind["store"]])
        assert [shard.samples for shard in packed.store.manifest.shards] == [len(packed.store)]


class TestStoreOfManyShards(StoreContract):
    @pytest.fixture
    def packed(self, many_shards: Path, blocks_in_memory: int | None) -> Packed:
        raw = synthetic_splits(train=701, shape=(9, 14, 3))[0]
        return Packed(open_bounded(many_shards, "train", blocks_in_memory), raw)

    def test_the_last_shard_and_its_last_block_are_short(self, packed: Packed) -> None:
        assert [shard.samples for shard in packed.store.manifest.shards] == [48] * 14 + [29]

    def test_every_file_is_in_the_manifest(self, packed: Packed, many_shards: Path) -> None:
        part = many_shards / "train"
        there = {path.relative_to(part).as_posix() for path in part.rglob("*") if path.is_file()}
        assert there == {*(file.name for file in packed.store.manifest.everything), MANIFEST_NAME}


shapes = st.tuples(st.integers(1, 9), st.integers(1, 9), st.sampled_from([1, 3]))


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(
    shape=shapes,
    samples=st.integers(1, 60),
    block_size=st.integers(1, 70),
    blocks_per_shard=st.integers(1, 5),
    seed=st.integers(0, 2**63 - 1),
    wanted=st.lists(st.integers(0, 59), max_size=80),
    classes=st.integers(1, 7),
    kind=st.sampled_from(list(KINDS.values())),
    blocks_in_memory=st.one_of(st.none(), st.integers(1, 5)),
)
def test_what_is_packed_is_read(
    monkeypatch: pytest.MonkeyPatch,
    shape: tuple[int, int, int],
    samples: int,
    block_size: int,
    blocks_per_shard: int,
    seed: int,
    wanted: list[int],
    classes: int,
    kind: dict[str, str],
    blocks_in_memory: int | None,
) -> None:
    monkeypatch.setattr(pipeline.packing.pack, "SHARD_BYTES", blocks_per_shard * block_size * int(np.prod(shape)))
    parts = synthetic_splits(train=samples, test=1, classes=classes, shape=shape, seed=seed)
    with tempfile.TemporaryDirectory() as directory:
        out = pack_splits(parts, Path(directory) / "set", block_size=block_size, seed=seed, **kind)
        for raw in parts:
            packed = Packed(open_bounded(out, raw.name, blocks_in_memory), raw)
            blocks = -(-len(raw.labels) // block_size)
            assert len(packed.store.manifest.shards) == -(-blocks // blocks_per_shard)
            np.testing.assert_array_equal(np.sort(packed.store.rows), np.arange(len(raw.labels)))
            assert_traces_back(packed, np.array(wanted, np.int64) % len(raw.labels))
            assert_traces_back(packed, np.arange(len(raw.labels)))


def test_a_store_opens_by_its_own_directory_too(synthetic_set: Path) -> None:
    alone, as_part = open_store(synthetic_set / "test"), open_split(synthetic_set, "test")
    assert alone.manifest == as_part.manifest
    np.testing.assert_array_equal(alone.rows, as_part.rows)


def test_opening_a_part_of_a_single_part_names_the_set(synthetic_set: Path) -> None:
    with pytest.raises(UserError) as caught:
        open_split(synthetic_set / "train", "train")
    assert caught.value.hint == f"name {synthetic_set}"


def test_opening_what_is_not_there_says_how_to_pack(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        open_split(tmp_path / "nothing", "train")
    assert str(tmp_path / "nothing") in caught.value.found
    assert "python -m pipeline.shard" in caught.value.hint


def test_opening_the_directory_above_a_set_names_the_set(synthetic_set: Path) -> None:
    with pytest.raises(UserError) as caught:
        open_split(synthetic_set.parent, "train")
    assert str(synthetic_set) in caught.value.hint


def test_blocks_larger_than_any_reader_takes_are_not_written(tmp_path: Path) -> None:
    parts = synthetic_splits(train=30, test=1, shape=(4, 4, 1))
    huge = replace(parts[0], image_shape=(40_000, 40_000, 1))
    with pytest.raises(UserError) as caught:
        pack_splits((huge, parts[1]), tmp_path / "set")
    assert "40000x40000x1" in caught.value.found
    assert "--block-size" in caught.value.hint
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("store", STORES)
def test_who_still_writes_to_an_old_shard_does_not_change_the_new_one(tmp_path: Path, store: StoreKind) -> None:
    """On another host, processes of a killed packing may live on while the next call continues in its directory."""
    writer = make_writer(store, tmp_path, Layout(20, (2, 3, 1), 20, 20))
    block = Block(0, np.full((20, 2, 3, 1), 7, np.uint8), np.arange(20) % 3, np.arange(20))

    def write() -> dict[Path, bytes]:
        shard, files, *_ = writer.write_shard(0, [block])
        return {path: path.read_bytes() for path in (tmp_path / file.name for file in (shard, *files))}

    expected = write()
    with ExitStack() as stack:
        old = [stack.enter_context(open(path, "r+b")) for path in expected if path.suffix != ".idx"]
        assert write() == expected
        for file in old:
            file.write(b"old")
    assert {path: path.read_bytes() for path in expected} == expected
