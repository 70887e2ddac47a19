"""A stopped pack continues with its complete shards only, and ends with the bytes of one that never stopped."""

from __future__ import annotations

import contextlib
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import psutil
import pytest
from conftest import ROOT, synthetic_splits
from numpy.typing import NDArray
from support import warm_process
from support.full_disk import full_disk
from support.image_files import png, smooth
from support.slow_packing import slow_packing

import pipeline.packing.pack
from pipeline.packing import journal
from pipeline.packing.pack import PackSettings, pack
from pipeline.readers.raw_split import RawSplit, UnreadableImages
from shards import UserError
from shards.convert import convert
from shards.manifest import RawFile
from shards.stores.base import EncodedImage

BLOCK = 16
SHARD = 3 * BLOCK
SETTINGS = PackSettings("synthetic", block_size=BLOCK)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline.packing.pack, "SHARD_BYTES", SHARD * 28 * 28)
    monkeypatch.setattr(pipeline.packing.pack, "_RECORDS_PER_SHARD", SHARD)


def content(directory: Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }


def encoded_splits() -> tuple[RawSplit, ...]:
    images = [png(image) for image in smooth(16)]

    def read(rows: NDArray[np.int64]) -> list[EncodedImage]:
        return [EncodedImage(images[row % 16], "png") for row in rows]

    files = (RawFile(name="images", bytes=1, sha256="0" * 64),)
    return tuple(
        RawSplit(name, ("a", "b"), np.arange(count) % 2, (None, None, 1), False, read, files)
        for name, count in (("train", 200), ("test", 60))
    )


@dataclass
class Reader:
    """Raw splits whose reads are recorded, and end in an exception after a number of images."""

    splits: tuple[RawSplit, ...]
    stops_after: int = sys.maxsize
    bad: set[int] = field(default_factory=set)
    read_rows: list[tuple[str, int]] = field(default_factory=list)

    def load(self) -> tuple[RawSplit, ...]:
        return tuple(replace(split, read=self._reads(split)) for split in self.splits)

    def _reads(self, split: RawSplit) -> Callable:
        def read(rows: NDArray[np.int64]) -> object:
            if len(self.read_rows) >= self.stops_after:
                raise KeyboardInterrupt
            self.read_rows += [(split.name, row) for row in rows.tolist()]
            if found := self.bad & set(rows.tolist()) if split.name == "train" else None:
                raise UnreadableImages(dict.fromkeys(found, "damaged"))
            return split.read(rows)

        return read


def stop(reader: Reader, out: Path, settings: PackSettings = SETTINGS, skip_bad: bool = False) -> Path:
    """Start to pack, stop, and return what is prepared."""
    with pytest.raises(KeyboardInterrupt):
        pack(reader.load, out, settings, workers=1, skip_bad=skip_bad)
    assert not out.exists()
    (work,) = (out.parent / f".{out.name}.packing").glob("work-*")
    return work


def continue_(reader: Reader, out: Path, settings: PackSettings = SETTINGS, skip_bad: bool = False) -> int:
    """Pack, compare with a pack that was never stopped, and return how many images were read."""
    pack(reader.load, out, settings, workers=1, skip_bad=skip_bad)
    again = Reader(reader.splits, bad=reader.bad)
    pack(again.load, out.parent / "alone", settings, workers=2, skip_bad=skip_bad)
    assert content(out) == content(out.parent / "alone")
    assert not (out.parent / f".{out.name}.packing").exists()
    return len(reader.read_rows)


@pytest.mark.parametrize("store", ["tar", "zarr", "records"])
def test_complete_shards_are_not_read_again(tmp_path: Path, store: str, capsys: pytest.CaptureFixture[str]) -> None:
    splits = encoded_splits() if store == "records" else synthetic_splits(200, 60)
    settings = replace(SETTINGS, store=store)
    stop(Reader(splits, stops_after=2 * SHARD + BLOCK), tmp_path / "out", settings)
    assert "2 complete shards kept in" in capsys.readouterr().err
    stop(Reader(splits, stops_after=SHARD), tmp_path / "out", settings)
    assert "continuing with 2 complete shards" in capsys.readouterr().err
    assert continue_(Reader(splits), tmp_path / "out", settings) == 260 - 3 * SHARD


@pytest.mark.parametrize(
    "name", ["new/train/shard-0000{}.tar", "new/train/shard-0000{}.idx", "journal/train-200/0000{}.json"]
)
def test_shards_that_differ_from_their_checksums_are_packed_again(tmp_path: Path, name: str) -> None:
    work = stop(Reader(synthetic_splits(200, 60), stops_after=200), tmp_path / "out")
    paths = [work / name.format(number) for number in range(4)]
    content = paths[0].read_bytes()
    paths[0].write_bytes(content[:100] + bytes([content[100] ^ 1]) + content[101:])
    paths[1].write_bytes(paths[1].read_bytes()[:-1])
    paths[2].write_bytes(b"")
    paths[3].unlink()
    assert continue_(Reader(synthetic_splits(200, 60)), tmp_path / "out") == 260 - (200 - 4 * SHARD)


def test_the_entry_of_another_shard_is_not_taken(tmp_path: Path) -> None:
    work = stop(Reader(synthetic_splits(200, 60), stops_after=2 * SHARD), tmp_path / "out")
    entry = json.loads((work / "journal/train-200/00001.json").read_text())
    entry["shard"]["samples"] -= 1  # without the checksum of the entry
    (work / "journal/train-200/00001.json").write_text(json.dumps(entry))
    os.replace(work / "journal/train-200/00000.json", work / "journal/train-200/00002.json")
    assert continue_(Reader(synthetic_splits(200, 60)), tmp_path / "out") == 260


def of_other_file(split: RawSplit) -> RawSplit:
    return replace(split, files=(split.files[0].model_copy(update={"sha256": "1" * 64}),))


def relabelled(split: RawSplit) -> RawSplit:
    return replace(split, labels=4 - split.labels)


@pytest.mark.parametrize(
    ("change", "settings", "read"),
    [
        (lambda val, test, train: (val, test, train), replace(SETTINGS, seed=1), 310),
        (lambda val, test, train: (val, test, train), replace(SETTINGS, block_size=BLOCK // 2), 310),
        (lambda val, test, train: (val, test, train), replace(SETTINGS, options={"size": "28x28"}), 310),
        (lambda val, test, train: (val, test, train), replace(SETTINGS, store="zarr"), 310),
        (lambda val, test, train: (val, test, of_other_file(train)), SETTINGS, 310),
        (lambda val, test, train: (test, train), SETTINGS, 260),
        (lambda val, test, train: (val, test, relabelled(train)), SETTINGS, 200),
    ],
)
def test_what_belongs_to_another_pack_is_packed_anew(
    tmp_path: Path, change: Callable, settings: PackSettings, read: int
) -> None:
    train, test = synthetic_splits(200, 60)
    splits = (train.select(np.arange(50), "val"), test, train)
    stop(Reader(splits, stops_after=110 + SHARD), tmp_path / "out")
    assert continue_(Reader(change(*splits)), tmp_path / "out", settings) == read


def test_other_code_starts_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = journal.code_digest()
    stop(Reader(synthetic_splits(200, 60), stops_after=2 * SHARD), tmp_path / "out")
    monkeypatch.setattr(pipeline.packing.pack, "code_digest", lambda: digest[::-1])
    assert continue_(Reader(synthetic_splits(200, 60)), tmp_path / "out") == 260


def test_without_known_raw_files_nothing_is_kept(tmp_path: Path) -> None:
    splits = tuple(replace(split, files=()) for split in synthetic_splits(200, 60))
    with pytest.raises(KeyboardInterrupt):
        pack(Reader(splits, stops_after=2 * SHARD).load, tmp_path / "out", SETTINGS, workers=1)
    assert list(tmp_path.iterdir()) == []


def test_images_that_were_found_unreadable_are_not_read_again(tmp_path: Path) -> None:
    splits, bad = synthetic_splits(200, 60), {3, 77}
    stop(Reader(splits, stops_after=260 + SHARD, bad=bad), tmp_path / "out", skip_bad=True)
    read = continue_(Reader(splits, bad=bad), tmp_path / "out", skip_bad=True)
    assert read == 200 - len(bad) - SHARD
    assert (tmp_path / "out/unreadable.csv").read_text().count("damaged") == 2


def test_a_target_is_replaced_only_as_a_whole(tmp_path: Path) -> None:
    """A stopped --force leaves the old pack. The next call without --force finds it, and removes what was kept."""
    out, splits = tmp_path / "out", synthetic_splits(200, 60)
    pack(lambda: splits, out, SETTINGS)
    before = content(out)
    for force in (True, False):
        with pytest.raises(KeyboardInterrupt):
            pack(Reader(splits, stops_after=2 * SHARD).load, out, SETTINGS, workers=1, force=True)
        assert content(out) == before
        reader = Reader(splits)
        assert pack(reader.load, out, SETTINGS, workers=1, force=force).is_new == force
        assert len(reader.read_rows) == (260 - 2 * SHARD if force else 0)
        assert [path.name for path in tmp_path.iterdir()] == ["out"] and content(out) == before


def test_another_command_with_the_same_target_removes_what_was_kept(tmp_path: Path) -> None:
    pack(lambda: synthetic_splits(200, 60), tmp_path / "set", SETTINGS)
    stop(Reader(synthetic_splits(200, 60), stops_after=2 * SHARD), tmp_path / "out")
    convert(tmp_path / "set", tmp_path / "out", "zarr")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "set"]
    assert not list((tmp_path / "out").rglob("*.tar"))


def test_a_full_disk_keeps_what_is_complete(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    splits, out = synthetic_splits(200, 60), tmp_path / "out"
    with full_disk(tmp_path, sys.maxsize) as disk:
        pack(Reader(splits).load, tmp_path / "counted", SETTINGS, workers=1)
    with full_disk(tmp_path, disk.count // 2), pytest.raises((OSError, UserError)):
        pack(Reader(splits).load, out, SETTINGS, workers=1)
    assert "the same command continues with them" in capsys.readouterr().err
    assert 0 < continue_(Reader(splits), out) < 260


def kill_at_random(tmp_path: Path, ranks: int, kills: int, seed: int) -> int:
    """Kill packing at random moments, then let one process end it; return how often it had complete shards then."""
    out, program = tmp_path / "out", tmp_path / "program.py"
    program.write_text(slow_packing(out, shard_images=48, seconds=0.01, workers=2))
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    command = [sys.executable, *launch, str(program)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    moments, continued = random.Random(seed), 0
    for _ in range(kills):
        process = warm_process.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        assert process.stdout is not None
        for _ in range(moments.randrange(40)):
            process.stdout.readline()  # of a block that is read
        time.sleep(moments.uniform(0, 0.02))
        started: list[psutil.Process] = []
        with contextlib.suppress(psutil.NoSuchProcess):
            started = psutil.Process(process.pid).children(recursive=True)
        # The launcher, one of the others, or all; then the others may be at work for a while.
        for one in moments.choice([[], moments.sample(started, min(1, len(started))), started]):
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        process.kill()
        process.wait()
        process.stdout.close()
        if moments.random() < 0.5:
            psutil.wait_procs(started, timeout=30)
        if out.exists():
            break
        continued += any(tmp_path.glob(".out.packing/work-*/journal/*/*.json"))
    for _ in range(100):
        ended = warm_process.run([sys.executable, str(program)], env=environment, capture_output=True, timeout=120)
        if ended.returncode == 0 or b"another process that is writing" not in ended.stderr:
            break
        time.sleep(0.3)  # rank 0 outlives its launcher
    assert ended.returncode == 0, ended.stderr
    pack(synthetic_splits, tmp_path / "alone", SETTINGS)
    assert content(out) == content(tmp_path / "alone")
    program.unlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone", "out"]
    return continued


def test_packing_killed_at_random_moments_ends_with_the_same_bytes(tmp_path: Path) -> None:
    assert kill_at_random(tmp_path, 1, kills=3, seed=1) > 0


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_packing_killed_at_many_random_moments_ends_with_the_same_bytes(tmp_path: Path, ranks: int, seed: int) -> None:
    kill_at_random(tmp_path, ranks, kills=8, seed=seed)
