"""Blocks held in memory: the right images whatever is asked for in whatever order, and no block loaded in vain."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from shards import Manifest, UserError
from shards.manifest import Shard
from shards.stores.block_cache import BlockCache

SHAPE = (2, 3, 1)
IMAGE_BYTES = 6


def manifest_of(samples: int, block_size: int) -> Manifest:
    blocks = -(-samples // block_size)
    shard = Shard(name="a", samples=samples, bytes=samples * 100, sha256="", blocks_crc32=(0,) * blocks)
    return Manifest(
        version=2,
        dataset="synthetic",
        variant="",
        split="train",
        classes=("a",),
        counts=(samples,),
        image_shape=SHAPE,
        transposed=False,
        samples=samples,
        block_size=block_size,
        seed=0,
        shards=(shard,),
        raw=(),
        versions={},
    )


def images_of(samples: int) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (samples, *SHAPE), dtype=np.uint8)


class Loader:
    """Loads blocks from an array, and remembers which."""

    def __init__(self, images: NDArray[np.uint8], block_size: int) -> None:
        self.loaded: list[list[int]] = []
        self._images = images.reshape(len(images), -1)
        self._block_size = block_size
        self.failing: set[int] = set()

    def __call__(self, blocks: NDArray[np.int64], buffers: list[NDArray[np.uint8]]) -> None:
        self.loaded.append(blocks.tolist())
        for block, buffer in zip(blocks.tolist(), buffers, strict=True):
            buffer[...] = 0xA5  # half written, if it fails now
            if block in self.failing:
                raise UserError(found=f"block {block}", expected="", hint="")
            buffer[...] = self._images[block * self._block_size : (block + 1) * self._block_size]


def gathered(cache: BlockCache, samples: NDArray[np.int64]) -> NDArray[np.uint8]:
    out = np.full((len(samples), *SHAPE), 0x5A, np.uint8)
    cache.gather(samples, out)
    return out


@settings(max_examples=200)
@given(
    samples=st.integers(1, 60),
    block_size=st.integers(1, 9),
    slots=st.one_of(st.none(), st.integers(1, 8)),
    batches=st.lists(st.tuples(st.lists(st.integers(0, 59), max_size=30), st.integers(0, 99)), max_size=12),
)
def test_images_are_right_and_no_block_is_loaded_in_vain(
    samples: int, block_size: int, slots: int | None, batches: list[tuple[list[int], int]]
) -> None:
    """Also after a block could not be loaded: for each batch, the samples and perhaps a block that fails."""
    images = images_of(samples)
    load = Loader(images, block_size)
    block = min(block_size, samples)
    cache = BlockCache(manifest_of(samples, block_size), load, slots and slots * block * IMAGE_BYTES)
    blocks = -(-samples // block_size)
    assert cache.slots == min(blocks, slots or blocks)
    came_in: dict[int, int] = {}  # for each block that is held, which load brought it
    for batch, failing in batches:
        wanted = np.array(batch, np.int64) % samples
        before = len(load.loaded)
        load.failing = {failing}
        if failing in wanted // block_size and failing not in came_in:
            with pytest.raises(UserError, match=f"block {failing}"):
                gathered(cache, wanted)
            came_in |= {block: number for number, some in enumerate(load.loaded) if number >= before for block in some}
            came_in = {block: came_in[block] for block in held_by(cache)}
            continue
        np.testing.assert_array_equal(gathered(cache, wanted), images[wanted])
        needed = set((wanted // block_size).tolist())
        came = {block: number for number, some in enumerate(load.loaded) if number >= before for block in some}
        assert came.keys() == needed - came_in.keys()
        assert sum(map(len, load.loaded[before:])) == len(came)
        held = held_by(cache)
        left = came_in.keys() - held
        if len(needed) <= cache.slots:
            assert needed <= held
            assert len(left) == max(0, len(came_in) + len(came) - cache.slots)
            stayed = (came_in.keys() & held) - needed
            assert all(came_in[gone] <= came_in[kept] for gone in left for kept in stayed)
        came_in = {block: number for block, number in {**came_in, **came}.items() if block in held}
        assert came_in.keys() == held


def held_by(cache: BlockCache) -> set[int]:
    return set(np.flatnonzero(cache._slot_of_block >= 0).tolist())


def test_a_sweep_through_more_blocks_than_fit_begins_with_those_that_are_there() -> None:
    images = images_of(60)
    load = Loader(images, 10)
    cache = BlockCache(manifest_of(60, 10), load, 3 * 10 * IMAGE_BYTES)
    gathered(cache, np.array([35, 45, 55]))
    load.loaded.clear()
    everything = np.arange(60)
    np.testing.assert_array_equal(gathered(cache, everything), images)
    assert sorted(block for blocks in load.loaded for block in blocks) == [0, 1, 2]


def test_a_window_that_slides_loads_each_block_once() -> None:
    """The order of sets that are larger than memory: samples from a window of blocks, which moves on."""
    images = images_of(200)
    load = Loader(images, 10)
    cache = BlockCache(manifest_of(200, 10), load, 5 * 10 * IMAGE_BYTES)
    random = np.random.default_rng(0)
    for last in range(5, 21):
        samples = random.integers((last - 5) * 10, last * 10, 30)
        np.testing.assert_array_equal(gathered(cache, samples), images[samples])
        gathered(cache, np.arange((last - 5) * 10, last * 10))
    loaded = [block for blocks in load.loaded for block in blocks]
    assert sorted(loaded) == list(range(20))


def test_memory_for_less_than_a_block_is_refused() -> None:
    with pytest.raises(UserError) as caught:
        BlockCache(manifest_of(60, 10), Loader(images_of(60), 10), 10 * IMAGE_BYTES - 1)
    assert "59 bytes of memory" in caught.value.found
    assert "loader.cache_gb" in caught.value.hint


def test_memory_that_the_machine_does_not_have_is_refused() -> None:
    manifest = manifest_of(60, 10).model_copy(update={"samples": 10**17, "block_size": 10**16})
    with pytest.raises(UserError) as caught:
        BlockCache(manifest, Loader(images_of(60), 10), None)
    assert "600,000,000,000,000,000 bytes of images" in caught.value.found


def test_a_block_that_could_not_be_loaded_is_not_held() -> None:
    """Neither is what it would have replaced given in its stead; the others are given as before."""
    images = images_of(60)
    load = Loader(images, 10)
    cache = BlockCache(manifest_of(60, 10), load, 2 * 10 * IMAGE_BYTES)
    gathered(cache, np.arange(20))
    load.failing = {3}
    for _ in range(2):
        with pytest.raises(UserError, match="block 3"):
            gathered(cache, np.array([35, 45]))
    for samples in (np.arange(10, 20), np.arange(10)):
        np.testing.assert_array_equal(gathered(cache, samples), images[samples])
    load.loaded.clear()
    np.testing.assert_array_equal(gathered(cache, np.arange(20)), images[:20])
    assert load.loaded == []
    load.failing = set()
    np.testing.assert_array_equal(gathered(cache, np.arange(60)), images)


def test_a_slot_whose_load_failed_is_filled_before_a_block_is_let_go() -> None:
    images = images_of(40)
    load = Loader(images, 10)
    cache = BlockCache(manifest_of(40, 10), load, 2 * 10 * IMAGE_BYTES)
    gathered(cache, np.arange(10))
    load.failing = {1}
    with pytest.raises(UserError, match="block 1"):
        gathered(cache, np.arange(10, 20))
    gathered(cache, np.arange(20, 30))
    assert held_by(cache) == {0, 2}
    gathered(cache, np.arange(30, 40))
    assert held_by(cache) == {2, 3}, "block 0 came in first"


def test_images_are_located_wherever_their_blocks_are() -> None:
    """Blocks that come in from the last to the first do not lie in order."""
    images = images_of(57)
    load = Loader(images, 10)
    cache = BlockCache(manifest_of(57, 10), load, None)
    for first in range(50, -10, -10):
        samples = np.array([first, min(first + 7, 56), first])
        located = cache.locate(samples)
        np.testing.assert_array_equal(located.table[located.rows].reshape(3, *SHAPE), images[samples])
    everything = np.random.default_rng(1).permutation(57)
    located = cache.locate(everything)
    np.testing.assert_array_equal(located.table[located.rows].reshape(57, *SHAPE), images[everything])
    assert [block for blocks in load.loaded for block in blocks] == [5, 4, 3, 2, 1, 0]
    assert BlockCache(manifest_of(57, 10), load, 5 * 10 * IMAGE_BYTES).locate(samples) is None


@pytest.mark.parametrize("outside", [-1, 60])
def test_outside_loads_nothing(outside: int) -> None:
    load = Loader(images_of(60), 10)
    cache = BlockCache(manifest_of(60, 10), load, None)
    with pytest.raises(IndexError, match=str(outside)):
        gathered(cache, np.array([0, outside]))
    assert load.loaded == []


def test_threads_that_drive_out_each_others_blocks_get_the_right_images() -> None:
    images = images_of(60)
    cache = BlockCache(manifest_of(60, 10), Loader(images, 10), 2 * 10 * IMAGE_BYTES)
    start = threading.Barrier(4)

    def work(seed: int) -> None:
        random = np.random.default_rng(seed)
        start.wait()
        for _ in range(200):
            samples = random.integers(0, 60, 7)
            np.testing.assert_array_equal(gathered(cache, samples), images[samples])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
