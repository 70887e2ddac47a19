"""Packing by many processes: the same bytes as by one, all unreadable pictures named, and nobody left behind."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
from conftest import ROOT, assert_user_error, run_module, synthetic_splits
from numpy.typing import NDArray
from support import warm_process
from support.slow_packing import slow_packing

import pipeline.packing.pack
from pipeline.common import rng, stratified
from pipeline.common.process_group import ProcessGroup
from pipeline.common.process_pool import map_in_processes
from pipeline.packing.journal import Journal
from pipeline.packing.pack import PackSettings, _Packing, pack
from pipeline.packing.repack import packed_splits
from pipeline.packing.splits import make_splits
from pipeline.readers import raw_split
from pipeline.readers.raw_split import RawSplit, UnreadableImages, computed_array
from shards import UserError, open_split
from shards.manifest import RawFile
from shards.verify.check import check_split

BLOCK = 16


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline.packing.pack, "SHARD_BYTES", 3 * BLOCK * 28 * 28)
    monkeypatch.setattr(pipeline.packing.pack, "_LINES", 7)


def content(directory: Path) -> dict[str, bytes]:
    """Every file of a directory, by its path in it."""
    return {
        path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }


def packed(
    parts: tuple[RawSplit, ...], out: Path, workers: int | None = None, skip_bad: bool = False, **settings: object
) -> dict[str, bytes]:
    settings = {"dataset": "synthetic", "block_size": BLOCK, **settings}
    pack(lambda: parts, out, PackSettings(**settings), workers=workers, skip_bad=skip_bad)
    return content(out)


def with_bad(part: RawSplit, bad: set[int]) -> RawSplit:
    """A part in which some rows cannot be read."""

    def read(rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        found = {int(row): f"{part.name}/{row}.png: cut short" for row in rows if int(row) in bad}
        if found:
            raise UnreadableImages(found)
        return part.read(rows)

    return replace(part, read=read)


class Tick:
    """A bar that only counts."""

    n = 0

    def update(self, count: int) -> None:
        self.n += count


@pytest.mark.parametrize("store", ["tar", "zarr"])
@pytest.mark.parametrize("workers", [2, 5])
def test_any_number_of_workers_writes_the_same_bytes(tmp_path: Path, workers: int, store: str) -> None:
    parts = synthetic_splits()
    alone = packed(parts, tmp_path / "alone", workers=1, store=store)
    assert len(alone) > 30
    assert packed(parts, tmp_path / "many", workers=workers, store=store) == alone


def test_a_large_split_is_in_the_order_of_an_index_permutation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rng, "_MAX_SORTED", 699)
    parts = synthetic_splits()
    packed(parts, tmp_path / "out")
    train, test = (open_split(tmp_path / "out", name) for name in ("train", "test"))
    np.testing.assert_array_equal(train.rows, rng.IndexPermutation(700, 0, rng.PACKING_STREAM)[np.arange(700)])
    np.testing.assert_array_equal(test.rows, rng.permutation(90, 0, rng.PACKING_STREAM + 1))
    for store, part in zip((train, test), parts, strict=True):
        np.testing.assert_array_equal(store.read(np.arange(len(store))), part.read(store.rows))
        np.testing.assert_array_equal(store.labels, part.labels[store.rows])


@pytest.mark.parametrize("count", [BLOCK + 1, 2 * BLOCK, 1000])
def test_blocks_that_are_read_together_have_the_same_bytes(tmp_path: Path, count: int) -> None:
    parts = synthetic_splits()
    together = tuple(replace(part, images_per_read=count) for part in parts)
    assert packed(together, tmp_path / "together") == packed(parts, tmp_path / "alone")


def test_dividing_and_ordering_a_data_set_take_no_array_of_its_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = (RawFile(name="images", bytes=1, sha256="0" * 64),)
    for module in (rng, stratified, raw_split):
        monkeypatch.setattr(module, "_PIECE", 1 << 12)
    monkeypatch.setattr(rng, "_SORTED_AT_ONCE", 1 << 13)
    packing = _Packing(PackSettings("large"), tmp_path, 1, ProcessGroup(), Journal(None), True)

    def peak(count: int) -> int:
        labels = computed_array(count, lambda rows: rows * 3 // count)
        raw = RawSplit("train", ("a", "b", "c"), labels, (28, 28, 1), False, lambda rows: rows, files)
        tracemalloc.start()
        for split in make_splits((raw,), test_fraction=0.1, val_fraction=None, subset=1, stratify="", seed=0):
            packing._write_numbers(split, tmp_path)
        highest = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        rows, labels_of_test = np.load(tmp_path / "rows.npy"), np.load(tmp_path / "labels.npy")
        assert len(np.unique(rows)) == len(rows) == round(count / 10)
        np.testing.assert_array_equal(labels_of_test, rows.astype(np.int64) * 3 // count)
        assert np.abs(np.bincount(labels_of_test) - len(rows) / 3).max() < 2
        return highest

    few, many = 1 << 15, 1 << 17
    peak(few)  # imports
    assert peak(many) - peak(few) < 2 * (many - few)  # bytes; an array of rows takes four or eight times the number


@pytest.mark.parametrize(
    ("ranks", "start"), [(2, "warm"), (3, "warm"), pytest.param(2, "fresh", marks=pytest.mark.slow)]
)
def test_torchrun_writes_the_same_bytes(tmp_path: Path, ranks: int, start: str) -> None:
    """The digits in many small shards, packed by the command on several ranks and by one process."""
    program = "import pipeline.packing.pack as p; p.SHARD_BYTES = 2000; from pipeline.shard import *; run_command(main)"
    (tmp_path / "shard.py").write_text(program)
    options = [str(tmp_path / "shard.py"), "digits", "--block-size", "16"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    alone = warm_process.run(
        [sys.executable, *options, "--out", str(tmp_path / "alone")], env=environment, capture_output=True, timeout=120
    )
    assert alone.returncode == 0, alone.stderr
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    run_ranks = subprocess.run if start == "fresh" else warm_process.run
    many = run_ranks(
        [*torchrun, *options, "--out", str(tmp_path / "many")], env=environment, capture_output=True, timeout=180
    )
    assert many.returncode == 0, many.stderr
    assert many.stdout.decode().count("packed 1,797 images") == 1
    assert content(tmp_path / "many") == content(tmp_path / "alone")
    assert len(content(tmp_path / "alone")) > 30


def test_ranks_meet_a_mistake_with_one_message(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("mine")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*torchrun, "-m", "pipeline.shard", "digits", "--out", str(tmp_path / "out")]
    process = warm_process.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert process.stderr.count("\nexpected: ") == 1
    assert "not a complete pack" in process.stderr
    assert content(tmp_path) == {"out/precious": b"mine"}


@pytest.mark.parametrize("workers", [1, 3])
class TestUnreadable:
    BAD = frozenset({0, 5, 333, 699})

    def test_all_of_them_are_named_and_nothing_is_written(self, tmp_path: Path, workers: int) -> None:
        train, test = synthetic_splits()
        parts = (with_bad(train, self.BAD), with_bad(test, {7}))
        with pytest.raises(UserError) as caught:
            packed(parts, tmp_path / "out", workers=workers)
        assert caught.value.found.startswith("5 unreadable images")
        for name in ("train/0.png", "train/5.png", "train/333.png", "train/699.png", "test/7.png: cut short"):
            assert name in caught.value.found
        assert "--skip-bad" in caught.value.hint
        assert list(tmp_path.iterdir()) == []

    def test_many_are_named_in_a_report(self, tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        train, test = synthetic_splits()
        with pytest.raises(UserError) as caught:
            packed((with_bad(train, set(range(100, 150))), test), tmp_path / "out", workers=workers)
        report = tmp_path / "out.unreadable.csv"
        assert str(report) in caught.value.found
        lines = list(csv.reader(report.open()))
        assert lines[0] == ["part", "row", "reason"]
        assert [int(row) for _, row, _ in lines[1:]] == list(range(100, 150))
        assert [path.name for path in tmp_path.iterdir()] == [report.name]

    def test_skipped_when_asked_and_listed(self, tmp_path: Path, workers: int) -> None:
        train, test = synthetic_splits()
        out = tmp_path / "out"
        done = pack(
            lambda: (with_bad(train, self.BAD), test),
            out,
            PackSettings("synthetic", block_size=BLOCK),
            skip_bad=True,
            workers=workers,
        )
        assert done.skipped == 4
        assert check_split(out / "train")[1] == []
        store = open_split(out, "train")
        assert set(store.rows.tolist()) == set(range(700)) - self.BAD
        assert np.array_equal(store.read(np.arange(len(store))), train.read(store.rows))
        assert np.array_equal(store.labels, train.labels[store.rows])
        assert [line.split(",")[1] for line in (out / "unreadable.csv").read_text().splitlines()[1:]] == [
            "0",
            "5",
            "333",
            "699",
        ]
        named = {out / "train" / file.name for file in store.manifest.everything}
        assert {path for path in (out / "train").rglob("*") if path.is_file()} == {
            *named,
            out / "train" / "manifest.json",
        }

    def test_a_part_without_a_readable_picture_is_refused(self, tmp_path: Path, workers: int) -> None:
        train, test = synthetic_splits()
        with pytest.raises(UserError, match="no readable image in the test split"):
            packed((train, with_bad(test, set(range(90)))), tmp_path / "out", workers=workers, skip_bad=True)
        assert list(tmp_path.iterdir()) == []


def test_origins_tell_where_each_picture_came_from(tmp_path: Path) -> None:
    train, test = synthetic_splits(train=40)
    paths = np.array([f'odd "name", {row}.png' for row in range(40)])
    chosen = replace(train, columns={"path": paths}).select(np.arange(39, -1, -3))
    packed((chosen, test), tmp_path / "out")
    store = open_split(tmp_path / "out", "train")
    lines = list(csv.DictReader((tmp_path / "out/train/origins.csv").open()))
    assert [int(line["row"]) for line in lines] == sorted(store.rows.tolist()) == list(range(0, 40, 3))
    assert [line["path"] for line in lines] == paths[::3].tolist()
    assert check_split(tmp_path / "out/train")[1] == []
    (tmp_path / "out/train/origins.csv").write_text("row,path\n")
    assert any("origins.csv" in fault for fault in check_split(tmp_path / "out/train")[1])


def test_long_texts_are_read_from_a_pack(tmp_path: Path) -> None:
    train, test = synthetic_splits(train=9)
    notes = np.array(["long " * 30_000, *"abcdefgh"])
    packed((replace(train, columns={"note": notes}), test), tmp_path / "out")
    assert packed_splits(tmp_path / "out")[0].columns["note"].tolist() == notes.tolist()


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"store": "zarr"}, "store 'tar'"),
        ({"options": {"size": "28x28"}}, "size not set"),
        ({"seed": 5}, "seed 0"),
    ],
)
def test_another_pack_is_not_taken_for_this_one(tmp_path: Path, settings: dict, word: str) -> None:
    parts = synthetic_splits(train=60)
    packed(parts, tmp_path / "out")
    with pytest.raises(UserError) as caught:
        packed(parts, tmp_path / "out", **settings)
    assert word in caught.value.found
    assert "--force" in caught.value.hint


def test_a_pack_of_the_images_of_another_has_their_format_and_compression(tmp_path: Path) -> None:
    of_images = {"fit": "crop", "size": "28x28", "color": "gray"}
    options = {"subset": 0.5, **of_images}
    packed(synthetic_splits(train=60), tmp_path / "out", store="zarr", compression="none", options=options)
    settings = PackSettings.like(open_split(tmp_path / "out", "train").manifest, {"near": 1})
    assert settings.recorded_options == {**of_images, "near": 1, "compression": "none"}


@pytest.mark.parametrize("has_dali", [True, False])
def test_large_images_are_advised_what_can_be_trained_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_dali: bool
) -> None:
    monkeypatch.setattr(pipeline.packing.pack, "has_dali", lambda: has_dali)
    splits = [replace(split, image_shape=(5000, 5000, 3)) for split in synthetic_splits()]
    with pytest.raises(UserError, match="GB per block") as caught:
        pack(lambda: splits, tmp_path / "out", PackSettings("large"))
    assert "--size 224" in caught.value.hint and ("--store records" in caught.value.hint) == has_dali


def test_work_done_by_processes_comes_back_in_order() -> None:
    bar = Tick()

    def work(item: int) -> tuple[int, int]:
        time.sleep(0.02 * (item % 3))
        return item, os.getpid()

    results = map_in_processes(work, [10] * 12, 3, bar)
    assert [item for item, _ in results] == list(range(12))
    assert len({process for _, process in results} - {os.getpid()}) > 1
    assert bar.n == 120


@pytest.mark.parametrize("platform", ["darwin", "win32"])
def test_without_a_safe_fork_threads_do_the_work(monkeypatch: pytest.MonkeyPatch, platform: str) -> None:
    monkeypatch.setattr(sys, "platform", platform)
    assert map_in_processes(lambda item: os.getpid(), [1] * 4, 2, Tick()) == [os.getpid()] * 4


def test_an_exception_in_a_process_is_raised_here() -> None:
    def work(item: int) -> None:
        if item == 3:
            raise UserError("a picture", "another", "none")

    with pytest.raises(UserError, match="a picture"):
        map_in_processes(work, [1] * 8, 3, Tick())


def test_a_killed_process_ends_in_a_message() -> None:
    def work(item: int) -> None:
        if item == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(UserError, match="was killed") as caught:
        map_in_processes(work, [1] * 8, 2, Tick())
    assert "--workers" in caught.value.hint


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_stopped_packing_leaves_no_process_and_only_complete_shards(tmp_path: Path, number: int) -> None:
    """A packer whose workers are in the midst of slow pictures is stopped, in every way there is."""
    program = slow_packing(tmp_path / "out", shard_images=16, seconds=0.3, workers=3)
    process = warm_process.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    process.stdout.readline()
    children = psutil.Process(process.pid).children()
    assert len(children) >= 2
    process.send_signal(number)
    process.wait(timeout=30)
    _, alive = psutil.wait_procs(children, timeout=10)
    assert alive == []
    process.stdout.close()
    errors = process.stderr.read()
    assert "Traceback" not in errors
    if number != signal.SIGKILL:
        assert process.returncode == 128 + number
        left = [path.name for path in tmp_path.iterdir()]
        assert left == ([".out.packing"] if "kept in" in errors else [])


def test_fewer_than_one_worker_is_refused() -> None:
    process = run_module("pipeline.shard", "digits", "--workers", 0)
    assert_user_error(process, "--workers 0")
