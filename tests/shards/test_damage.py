"""Damage to any file of a pack is refused by one message, or every sample reads right; a kill leaves whole packs."""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, pack_splits, run_module, synthetic_splits
from support import warm_process
from support.synthetic_records import foreign_set, pack_pictures
from support.version_2 import downgrade

import pipeline.packing.pack
from shards import Manifest, UserError, open_split
from shards.convert import upgrade
from shards.manifest import REQUIRED_SPLITS, SPLITS, is_packed_dataset
from shards.stores.base import Store
from shards.verify.check import check_split

KINDS = ("tar", "zarr", "zarr without compression", "records", "indexed")
EVERY_MUTATION = 5000


@pytest.fixture(scope="module")
def packs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small data set of several shards in every store. Only the copies are damaged."""
    directory = tmp_path_factory.mktemp("damage")
    found = {"records": pack_pictures(directory / "records", records_per_shard=10, train=24, test=3)}
    found["indexed"] = foreign_set(directory / "indexed", train=24, test=6, shard_size=10)
    process = run_module("shards.index", found["indexed"])
    assert process.returncode == 0, process.stderr
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline.packing.pack, "SHARD_BYTES", 2 * 8 * 20)
        parts = synthetic_splits(train=44, test=9, shape=(4, 5, 1))
        for name in ("tar", "zarr", "zarr without compression"):
            compression = "none" if "without" in name else "zstd"
            out = directory / name.replace(" ", "-")
            found[name] = pack_splits(parts, out, 8, store=name.split()[0], compression=compression)
    return found


@dataclass(frozen=True)
class Content:
    """What a split holds."""

    manifest: Manifest
    images: list[bytes]
    labels: list[int]
    rows: list[int]


def content_of(store: Store) -> Content:
    images = [np.asarray(image).tobytes() for image in store.read(np.arange(len(store)))]
    return Content(store.manifest, images, store.labels.tolist(), store.rows.tolist())


def flip(data: bytes, chance: random.Random) -> bytes:
    changed = bytearray(data)
    changed[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    return bytes(changed)


def cut(data: bytes, chance: random.Random) -> bytes:
    return data[: chance.randrange(len(data))]


def insert(data: bytes, chance: random.Random) -> bytes:
    at = chance.randrange(len(data) + 1)
    return data[:at] + chance.randbytes(chance.choice([1, 16, 512])) + data[at:]


def remove(data: bytes, chance: random.Random) -> bytes:
    at = chance.randrange(len(data))
    return data[:at] + data[at + chance.choice([1, 16, 512]) :]


def overwrite(data: bytes, chance: random.Random) -> bytes:
    at, size = chance.randrange(len(data)), chance.choice([1, 8, 64, 512])
    new = chance.choice([bytes(size), b"\xff" * size, b"9" * size, chance.randbytes(size)])
    return (data[:at] + new)[: len(data)] + data[at + size :]


def swap(data: bytes, chance: random.Random) -> bytes:
    """Two pieces of the file change places; in text, two lines or words."""
    size = chance.choice([1, 8, 64, 512])
    if len(data) < 2 * size:
        return data[::-1]
    first, second = sorted(chance.sample(range(len(data) // size), 2))
    pieces = [data[start : start + size] for start in range(0, len(data), size)]
    pieces[first], pieces[second] = pieces[second], pieces[first]
    return b"".join(pieces)


def repeat(data: bytes, chance: random.Random) -> bytes:
    at = chance.randrange(len(data))
    return data[:at] + data[at : at + chance.choice([16, 512])] + data[at:]


MUTATIONS: tuple[Callable[[bytes, random.Random], bytes], ...] = (flip, cut, insert, remove, overwrite, swap, repeat)


def mutate(split: Path, chance: random.Random) -> tuple[str, dict[Path, bytes]]:
    """Damage one file, or exchange two; returns what was done, and the files as they were."""
    files = sorted(path for path in split.rglob("*") if path.is_file())
    path, other = chance.choice(files), chance.choice(files)
    before = {path: path.read_bytes(), other: other.read_bytes()}
    if chance.random() < 0.1:
        path.write_bytes(before[other])
        other.write_bytes(before[path])
        return f"{path} and {other} exchanged", before
    mutation = chance.choice(MUTATIONS)
    path.write_bytes(mutation(before[path], chance))
    return f"{mutation.__name__} {path}", before


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [25, pytest.param(EVERY_MUTATION // len(KINDS), marks=pytest.mark.slow)])
def test_damage_is_refused_or_changes_nothing(packs: dict[str, Path], kind: str, count: int, tmp_path: Path) -> None:
    pack = Path(shutil.copytree(packs[kind], tmp_path / "set"))
    split = pack / "train"
    expected = content_of(open_split(pack, "train"))
    refused = 0
    for seed in range(count):
        what, before = mutate(split, random.Random(f"{kind} {seed}"))
        try:
            manifest, faults = check_split(split)
            is_whole = not faults and manifest == expected.manifest
            assert faults or is_whole, what
        except UserError:
            is_whole = False
        try:  # a message, or what was packed: each block is compared when it is read
            found = content_of(open_split(pack, "train"))
            samples = found.images, found.labels, found.rows
            assert samples == (expected.images, expected.labels, expected.rows), what
            assert found == expected or not is_whole, what
        except UserError:
            assert not is_whole, what
        refused += not is_whole
        for path, content in before.items():
            path.write_bytes(content)
    assert content_of(open_split(pack, "train")) == expected
    assert refused > 0.8 * count


def snapshot(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def kill_after(seconds: float, *arguments: object) -> int:
    command = [sys.executable, "-m", *map(str, arguments)]
    process = warm_process.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
    return process.wait(60)


def delays(count: int, *arguments: object) -> list[float]:
    """Moments at random from the start of a command to its end."""
    start = time.monotonic()
    assert run_module(*arguments).returncode == 0  # type: ignore[arg-type]
    seconds, chance = time.monotonic() - start, random.Random(0)
    return [chance.uniform(0, seconds) for _ in range(count)]


KILLS = pytest.mark.parametrize("kills", [2, pytest.param(50, marks=pytest.mark.slow)])


@KILLS
def test_a_killed_conversion_leaves_the_old_or_the_new(packs: dict[str, Path], kills: int, tmp_path: Path) -> None:
    out = tmp_path / "set"
    arguments = ("shards.convert", packs["tar"], out, "--store", "zarr", "--force")
    for delay in delays(kills, *arguments):
        assert kill_after(delay, *arguments) in (0, -signal.SIGKILL)
        assert is_packed_dataset(out), "the first conversion, or a later one"
        assert [check_split(out / split)[1] for split in REQUIRED_SPLITS] == [[], []]
    assert run_module(*map(str, arguments)).returncode == 0
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


@KILLS
@pytest.mark.parametrize("kind", ["tar", "zarr", "records"])
def test_a_killed_upgrade_leaves_either_version(packs: dict[str, Path], kind: str, kills: int, tmp_path: Path) -> None:
    expected = snapshot(packs[kind])

    def old(name: str) -> Path:
        return downgrade(Path(shutil.copytree(packs[kind], tmp_path / name)))

    for number, delay in enumerate(delays(kills, "shards.convert", old("whole"))):
        pack = old(str(number))
        kill_after(delay, "shards.convert", pack)
        assert [check_split(pack / split)[1] for split in REQUIRED_SPLITS] == [[], []]
        upgrade(pack)
        found = {name: content for name, content in snapshot(pack).items() if not name.endswith(".partial")}
        assert found == expected


@KILLS
def test_a_killed_indexing_is_completed_by_the_next(packs: dict[str, Path], kills: int, tmp_path: Path) -> None:
    expected = snapshot(packs["indexed"])
    tars = {name: content for name, content in expected.items() if name.endswith(".tar")}

    def fresh(name: str) -> Path:
        directory = tmp_path / name / packs["indexed"].name
        for path, content in tars.items():
            (directory / path).parent.mkdir(parents=True, exist_ok=True)
            (directory / path).write_bytes(content)
        return directory

    for number, delay in enumerate(delays(kills, "shards.index", fresh("whole"))):
        directory = fresh(str(number))
        kill_after(delay, "shards.index", directory)
        for split in SPLITS:
            if (directory / split / "manifest.json").exists():
                assert check_split(directory / split)[1] == []
        process = run_module("shards.index", directory)
        assert process.returncode == 0, process.stderr
        found = {name: content for name, content in snapshot(directory).items() if not name.endswith(".partial")}
        assert found == expected


@KILLS
def test_a_killed_verification_changes_nothing(packs: dict[str, Path], kills: int) -> None:
    before = snapshot(packs["records"])
    for delay in delays(kills, "shards.verify", packs["records"]):
        kill_after(delay, "shards.verify", packs["records"])
        assert snapshot(packs["records"]) == before
