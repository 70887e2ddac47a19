"""Data sets larger than the cache: read through the stores, by one host and by several."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from conftest import pack_splits, synthetic_splits
from support.full_disk import full_disk
from support.http_server import without_proxies
from support.lying_server import LIES, LyingServer
from support.version_2 import downgrade

import pipeline.packing.pack
from pipeline.sampler import SequentialBatchSampler, ShuffledBatchSampler, shard_window
from shards import UserError, open_split
from shards.convert import upgrade
from shards.errors import DiskFullError, MismatchError
from shards.manifest import Manifest
from shards.remote import base, on_demand
from shards.stores.base import ShardUse, Store
from shards.verify import __main__ as verify

SHARD_SAMPLES = 32
SHARD_BYTES = SHARD_SAMPLES * 28 * 28
SAMPLES = 700
STORES = ("tar", "zarr")
FAST_LIES = ("cut", "flip", "other version", "page", "escapes", "long length")


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of 22 + 3 shards in each store, and one of 64 shards of 16 blocks."""
    root = tmp_path_factory.mktemp("web")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline.packing.pack, "SHARD_BYTES", SHARD_BYTES)
        for store in STORES:
            pack_splits(synthetic_splits(), root / store, block_size=8, store=store)
        patch.setattr(pipeline.packing.pack, "SHARD_BYTES", 16 * 4 * 4)
        small = synthetic_splits(train=64 * 16, shape=(4, 4, 1), transposed=False)
        pack_splits(small, root / "small", block_size=1)
    return root


@pytest.fixture(autouse=True)
def surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("INKSTREAM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("INKSTREAM_CACHE_SIZE", "350K")
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    without_proxies(monkeypatch)
    monkeypatch.setattr(base, "FIRST_PAUSE", 0.001)
    monkeypatch.setattr(base, "STALL_SECONDS", 0.3)
    monkeypatch.setattr(base, "ATTEMPTS", 3)
    monkeypatch.setattr(on_demand, "_ROOM_SECONDS", 0.5)
    yield
    on_demand._open.clear()


@pytest.fixture
def server(sets: Path) -> Iterator[LyingServer]:
    server = LyingServer(sets, lambda: None)
    yield server
    server.close()


def address(server: LyingServer, store: str = "tar") -> str:
    return f"http://127.0.0.1:{server.port}/{store}"


def cached_bytes(cache: Path) -> int:
    return sum(path.stat().st_size for path in cache.rglob("*") if path.is_file())


def check_all(store: Store, sets: Path, kind: str = "tar") -> None:
    """Every image, label and row is that of the local data set."""
    local = open_split(sets / kind, "train")
    samples = np.random.default_rng(0).permutation(SAMPLES)
    for part in np.array_split(samples, 10):
        np.testing.assert_array_equal(store.read(part), local.read(part))
        assert store.labels[part].tolist() == local.labels[part].tolist()
        assert store.rows[part].tolist() == local.rows[part].tolist()


@pytest.mark.parametrize("kind", STORES)
def test_a_set_larger_than_the_cache(server: LyingServer, sets: Path, tmp_path: Path, kind: str) -> None:
    store = open_split(address(server, kind), "train", 4 * SHARD_BYTES)
    assert not list((tmp_path / "cache").rglob("shard*")), "opening fetches no shard"
    check_all(store, sets, kind)
    assert cached_bytes(tmp_path / "cache") < 400_000
    assert store.files is not None and store.files.on_demand is not None
    assert store.files.on_demand.fetched_bytes > SAMPLES * 28 * 28


def test_a_set_that_fits_is_fetched_whole(server: LyingServer, sets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INKSTREAM_CACHE_SIZE", "5M")
    store = open_split(address(server), "train")
    assert store.files is not None and store.files.on_demand is None
    server.close()
    check_all(store, sets)


def test_a_larger_cache_later_completes_the_set(
    server: LyingServer, sets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_all(open_split(address(server), "train", 4 * SHARD_BYTES), sets)
    on_demand._open.clear()  # as in a later process
    monkeypatch.setenv("INKSTREAM_CACHE_SIZE", "5M")
    store = open_split(address(server), "train")
    assert store.files is not None and store.files.on_demand is None
    check_all(store, sets)
    monkeypatch.setenv("INKSTREAM_CACHE_SIZE", "350K")
    on_demand._open.clear()
    store = open_split(address(server), "train")
    assert store.files is not None and store.files.on_demand is None, "what is there is used"


def test_without_a_limit_on_memory_little_is_held(server: LyingServer, sets: Path) -> None:
    store = open_split(address(server), "train")
    assert store.locate(np.arange(4)) is None
    check_all(store, sets)


def test_a_sequential_reader_fetches_each_shard_once(server: LyingServer, sets: Path) -> None:
    store, local = (open_split(place, "train", 2 * SHARD_BYTES) for place in (address(server), sets / "tar"))
    sampler = SequentialBatchSampler(np.arange(SAMPLES), 10)
    for epoch in range(2):
        with store.prefetch(partial(sampler.shard_uses, epoch, 0, 1, 0)) as advance:
            for step in sampler.steps(epoch, 0, 1):
                advance(step.step)
                np.testing.assert_array_equal(store.read(step.samples), local.read(step.samples))
        fetched = store.files.on_demand.fetched_bytes
        assert fetched <= (epoch + 1) * sum(shard.bytes for shard in store.manifest.shards)


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("first", [0, 7])
def test_the_uses_of_sequential_batches(world_size: int, first: int) -> None:
    """Compared with the shards of the samples of every step."""
    samples = np.flatnonzero(np.random.default_rng(0).random(500) < 0.6)
    starts = np.array([0, 40, 90, 200, 210, 480, 500])
    sampler = SequentialBatchSampler(samples, 16)
    for rank in range(world_size):
        expected: dict[int, list[int]] = {}
        for step in sampler.steps(0, rank, world_size, first):
            for shard in {int(np.flatnonzero(starts <= sample)[-1]) for sample in step.samples}:
                expected.setdefault(shard, []).append(step.step)
        uses = list(sampler.shard_uses(0, rank, world_size, first, starts))
        assert sorted(uses) == [ShardUse(shard, steps[0], steps[-1]) for shard, steps in sorted(expected.items())]
        assert [use.first for use in uses] == sorted(use.first for use in uses)


@pytest.mark.parametrize(
    "lie", [lie if lie in FAST_LIES else pytest.param(lie, marks=pytest.mark.slow) for lie in LIES]
)
def test_a_lie_about_a_shard(lie: str, server: LyingServer, sets: Path) -> None:
    """The third and the fourth answer are lies: the right images arrive, or there is one message."""
    store = open_split(address(server), "train", 4 * SHARD_BYTES)
    answers = iter([None, None, lie, lie])
    server.choose = lambda: next(answers, None)
    try:
        check_all(store, sets)
    except UserError as error:
        assert all(line.isprintable() for line in str(error).split("\n"))
    server.choose = lambda: None
    check_all(store, sets)


def test_a_shard_that_was_replaced_at_the_server(server: LyingServer, sets: Path, tmp_path: Path) -> None:
    store = open_split(address(server), "train", 4 * SHARD_BYTES)
    server.choose = lambda: "flip"
    with pytest.raises(UserError, match=r"train/shard-00002\.tar, whose content has SHA-256"):
        store.read(np.arange(70, 74))
    server.choose = lambda: None
    check_all(store, sets)


def test_a_shard_that_was_truncated_at_the_server(server: LyingServer, sets: Path, tmp_path: Path) -> None:
    store = open_split(address(server), "train", 4 * SHARD_BYTES)
    answers = iter(["truncated"] * 50)
    server.choose = lambda: next(answers, "escapes")
    with pytest.raises(MismatchError, match=r"train/shard-00002\.tar, which has [\d,]+ bytes"):
        store.read(np.arange(70, 74))
    server.choose = lambda: None
    check_all(store, sets)


@pytest.mark.parametrize("first", [0, 1, 3, 5])
def test_a_full_disk(server: LyingServer, sets: Path, tmp_path: Path, first: int) -> None:
    store = open_split(address(server), "train", 4 * SHARD_BYTES)
    with full_disk(tmp_path / "cache", first, errno.ENOSPC), pytest.raises(DiskFullError):
        check_all(store, sets)
    check_all(store, sets)


def test_a_cache_that_is_too_small(server: LyingServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INKSTREAM_CACHE_SIZE", "90K")
    with pytest.raises(UserError, match=r"and a cache of at most 90\.00KB") as caught:
        open_split(address(server), "train")
    monkeypatch.setenv("INKSTREAM_CACHE_SIZE", caught.value.hint.split("=")[1].split()[0])
    assert len(open_split(address(server), "train")) == SAMPLES


def test_a_set_of_version_2_is_fetched_whole(sets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the message about a cache that is too small says how to upgrade."""
    old = downgrade(Path(shutil.copytree(sets / "tar", tmp_path / "web" / "tar")))
    server = LyingServer(tmp_path / "web", lambda: None)
    with pytest.raises(UserError, match="and a cache of at most") as caught:
        open_split(address(server), "train")
    assert "upgrade a local copy (python -m shards.convert DIR)" in caught.value.hint
    upgrade(old)
    check_all(open_split(address(server), "train"), sets)
    server.close()


def test_the_full_check_needs_the_whole_set(server: LyingServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["verify", address(server)])
    with pytest.raises(UserError, match="and a cache of at most"):
        verify.main()
    monkeypatch.setenv("INKSTREAM_CACHE_SIZE", "5M")
    assert verify.main() == 0


def test_the_full_check_of_a_set_that_is_read_on_demand_is_refused(
    server: LyingServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_split(address(server), "train", 4 * SHARD_BYTES)
    assert store.files is not None and store.files.on_demand is not None
    monkeypatch.setenv("INKSTREAM_CACHE_SIZE", "5M")
    monkeypatch.setattr("sys.argv", ["verify", address(server)])
    with pytest.raises(UserError, match="another process reads on demand"):
        verify.main()


def open_small(server: LyingServer, host: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Store, ShuffledBatchSampler]:
    """The training split and its windowed order, on a host with an empty cache for three quarters of it."""
    on_demand._open.clear()
    monkeypatch.setenv("INKSTREAM_CACHE", str(host))
    total = sum(shard.bytes for shard in Manifest.read(server.root / "small" / "train").shards)
    monkeypatch.setenv("INKSTREAM_CACHE_SIZE", str(total * 3 // 4))
    store = open_split(address(server, "small"), "train", 1 << 20)
    assert store.cache_bytes is not None
    window = shard_window(store.manifest, 1 << 20, store.cache_bytes, 16)
    sampler = ShuffledBatchSampler(np.arange(len(store)), 16, 0, 1, window, unit_bounds=store.shard_bounds)
    return store, sampler


def read_epoch(store: Store, sampler: ShuffledBatchSampler, epoch: int, rank: int, hosts: int) -> list[np.ndarray]:
    """The rows of the steps of a rank, after its images were compared with their rows."""
    rows = []
    with store.prefetch(partial(sampler.shard_uses, epoch, rank, hosts, 0)) as advance:
        for step in sampler.steps(epoch, rank, hosts):
            advance(step.step)
            images = store.read(step.samples)
            labels = store.labels[step.samples].astype(int)
            assert all((image[lines(label)] == 255).all() for image, label in zip(images, labels, strict=True))
            rows.append(store.rows[step.samples])
    return rows


def lines(label: int) -> slice:
    """The bright lines of a synthetic image."""
    return slice(label * 4 // 5, (label + 1) * 4 // 5)


def test_each_of_two_hosts_fetches_half(server: LyingServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And both get the global batches of a single host."""
    store, sampler = open_small(server, tmp_path / "single", monkeypatch)
    total = sum(shard.bytes for shard in store.manifest.shards)
    assert sampler.lanes % 2 == 0
    single = [read_epoch(store, sampler, epoch, 0, 1) for epoch in range(2)]
    assert total <= fetched(store) < 2 * total, "the second epoch uses what the cache has kept"
    halves = []
    for rank in range(2):
        store, sampler = open_small(server, tmp_path / f"host{rank}", monkeypatch)
        halves.append([read_epoch(store, sampler, 0, rank, 2)])
        # Half of the samples are a whole number of shards here.
        assert fetched(store) == total // 2
        halves[-1].append(read_epoch(store, sampler, 1, rank, 2))
        assert fetched(store) == total // 2, "a host reads the same share in every epoch, and its cache holds it"
    for epoch in range(2):
        for whole, *parts in zip(single[epoch], halves[0][epoch], halves[1][epoch], strict=True):
            assert whole.tolist() == np.concatenate(parts).tolist()


def fetched(store: Store) -> int:
    assert store.files is not None and store.files.on_demand is not None
    return store.files.on_demand.fetched_bytes


@pytest.mark.parametrize("hosts", [1, 2])
def test_the_uses_of_a_windowed_order_cover_its_steps(
    server: LyingServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hosts: int
) -> None:
    store, sampler = open_small(server, tmp_path, monkeypatch)
    for rank in range(hosts):
        uses = {use.shard: use for use in sampler.shard_uses(1, rank, hosts, 5, store.shard_bounds)}
        for step in sampler.steps(1, rank, hosts, 5):
            for shard in set((step.samples // 16).tolist()):
                assert uses[shard].first <= step.step <= uses[shard].last


def test_a_windowed_epoch_continues_on_another_host(
    server: LyingServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With its cache, or an empty one."""
    store, sampler = open_small(server, tmp_path / "one", monkeypatch)
    expected = read_epoch(store, sampler, 0, 0, 1)
    for host in ("one", "two"):
        store, sampler = open_small(server, tmp_path / host, monkeypatch)
        with store.prefetch(partial(sampler.shard_uses, 0, 0, 1, 20)) as advance:
            for step in sampler.steps(0, 0, 1, 20):
                advance(step.step)
                assert store.rows[step.samples].tolist() == expected[step.step].tolist()
                store.read(step.samples)
        assert fetched(store) < sum(shard.bytes for shard in store.manifest.shards)
