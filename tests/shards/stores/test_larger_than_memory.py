"""Sets larger than the memory they may take: drawn from a sliding window, within the bound, and resumed exactly."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, pack_splits, run_module, synthetic_splits
from support import warm_process

from benchmarks.common.sparse_store import write_sparse_split
from pipeline.packing.pack import PackSettings, pack
from pipeline.readers.raw_split import RawSplit
from shards import open_split
from shards.convert import convert

MEGABYTE = 1 << 20
BOUND = 8 * MEGABYTE
IMAGES = 234 * 256  # 45 MB in whole batches, so that an epoch leaves none out

# Reads an epoch in batches and says how many bytes of memory that took at its highest, beyond what was there before.
READER = f"""
import sys
from pathlib import Path
import numpy as np
from pipeline.sampler import ShuffledBatchSampler, max_shuffle_window
from shards import open_split

def high_water():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))

open_split(sys.argv[2], "train").read(np.arange(10))  # what the libraries take by themselves
before = high_water()
store = open_split(sys.argv[1], "train", {BOUND})
window = max_shuffle_window(store.manifest, {BOUND}, 256)
order = ShuffledBatchSampler(np.arange(len(store)), 256, 0, store.manifest.block_size, window)
out = np.empty((256, 28, 28, 1), np.uint8)
total = 0
for step in order.steps(0, 0, 1):
    store.gather(step.samples, out[: len(step.samples)])
    total += int(out[: len(step.samples)].sum(dtype=np.int64))
print(window, high_water() - before, total)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Path], int]:
    """A set of 45 MB as tar and as zarr, and the sum of its training pixels."""
    directory = tmp_path_factory.mktemp("large")
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (IMAGES, 28, 28, 1), dtype=np.uint8)
    labels = random.integers(0, 3, IMAGES)
    classes = ("a", "b", "c")
    parts = (
        RawSplit.from_arrays("train", images, labels, classes),
        RawSplit.from_arrays("test", images[:9], labels[:9], classes),
    )
    pack(lambda: parts, directory / "tar", PackSettings("large", block_size=64))
    convert(directory / "tar", directory / "zarr", "zarr")
    return {name: directory / name for name in ("tar", "zarr")}, int(images.sum(dtype=np.int64))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
@pytest.mark.parametrize("store", ["tar", "zarr"])
def test_an_epoch_stays_within_its_memory(
    large: tuple[dict[str, Path], int], synthetic_set: Path, tmp_path: Path, store: str
) -> None:
    directories, total = large
    warm_up = synthetic_set
    if store == "zarr":
        convert(synthetic_set, tmp_path / "zarr", "zarr")
        warm_up = tmp_path / "zarr"
    process = subprocess.run(
        [sys.executable, "-c", READER, str(directories[store]), str(warm_up)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert process.returncode == 0, process.stderr
    window, grown, read = map(int, process.stdout.split())
    assert 100 < window < BOUND // (64 * 784)
    assert read == total
    # Beside the images: labels and rows, the order of an epoch, a batch, and what libraries and threads keep.
    assert grown < BOUND + 16 * MEGABYTE < IMAGES * 784 / 1.5


RECIPE = {
    "data": {"val_fraction": 0.1, "resolution": 14},
    "loader": {"batch_size": 32, "cache_gb": 0.0003},
    "model": {"name": "three_block_cnn"},
    "trainer": {"epochs": 2, "precision": "fp32"},
}

# Trains, and says how many bytes of memory the whole process took at its highest.
TRAINING = """
from trainer.run import main
from trainer.runtime.memory import peak_memory
status = main()
print(status, peak_memory())
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_the_memory_of_a_training_hardly_depends_on_the_number_of_images(tmp_path: Path) -> None:
    """Ten million images (7.8 GB) instead of a thousand, with validation and test."""
    random = np.random.default_rng(0)
    images, labels = random.integers(0, 256, (1024, 28, 28, 1), dtype=np.uint8), np.arange(1024) % 2
    parts = (RawSplit.from_arrays(name, images, labels, ("0", "1")) for name in ("train", "test"))
    small = pack_splits(tuple(parts), tmp_path / "small", block_size=512)
    large = Path(shutil.copytree(small, tmp_path / "large"))
    shutil.rmtree(large / "train")
    write_sparse_split(large, 10_000 * 1024)
    recipe = tmp_path / "recipe.yaml"
    settings = {"data": {"shards": "", "resolution": 28}, "trainer": {"minutes": 0.05}, "model": RECIPE["model"]}
    recipe.write_text(yaml.safe_dump({**settings, "loader": {"batch_size": 128, "cache_gb": 0.05}}))
    peaks = []
    for shards, val_fraction in ((small, 0.5), (large, 0.0005)):
        settings = [
            f"data.shards={shards}",
            f"data.val_fraction={val_fraction}",
            f"run.dir={tmp_path / 'run'}-{shards.name}",
        ]
        process = subprocess.run(
            [sys.executable, "-c", TRAINING, recipe, *settings],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert process.returncode == 0, process.stderr
        status, peak = map(int, process.stdout.splitlines()[-1].split())
        assert status == 0, process.stdout + process.stderr
        peaks.append(peak)
    # The window, pages of labels and rows, and the results of validation. Measured: 45 MB.
    assert peaks[1] - peaks[0] < 200 * MEGABYTE


@pytest.fixture(scope="module")
def small_blocks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack_splits(synthetic_splits(), tmp_path_factory.mktemp("small-blocks") / "set", block_size=8)


def run(recipe: Path, directory: Path, *overrides: str) -> dict:
    process = run_module("trainer.run", recipe, f"run.dir={directory}", *overrides)
    assert process.returncode == 0, process.stdout + process.stderr
    return torch.load(directory / "checkpoints/last.pt", weights_only=True)


@pytest.mark.slow
def test_training_resumes_in_its_window_on_a_machine_with_more_memory(small_blocks: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(RECIPE | {"data": RECIPE["data"] | {"shards": str(small_blocks)}}))
    whole = run(recipe, tmp_path / "whole")
    assert 5 < whole["window"] < 30

    roomy = run(recipe, tmp_path / "roomy", "loader.cache_gb=auto")
    assert roomy["window"] is None
    assert not all(torch.equal(whole["model"][name], roomy["model"][name]) for name in whole["model"])

    # One epoch here, then (as a run whose last epoch is still to come) the other one with any amount of memory.
    directory = tmp_path / "moved"
    stop = (
        "import trainer.loop.engine as engine\n"
        "import signal, os\n"
        "end = engine._end_epoch\n"
        "def end_and_stop(*arguments):\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    return end(*arguments)\n"
        "engine._end_epoch = end_and_stop\n"
        "from trainer.run import main\n"
        "from shards.cli import run_command\n"
        "run_command(main)\n"
    )
    stopped = warm_process.run(
        [sys.executable, "-c", stop, str(recipe), f"run.dir={directory}"], cwd=ROOT, capture_output=True, timeout=120
    )
    assert stopped.returncode == 143, stopped.stderr
    moved = run(recipe, directory, "loader.cache_gb=auto", "resume=auto")
    assert moved["window"] == whole["window"]
    assert all(torch.equal(whole["model"][name], moved["model"][name]) for name in whole["model"])


def test_a_packed_val_part_is_what_validates(tmp_path: Path) -> None:
    train, test = synthetic_splits()
    parts = (train.select(np.arange(0, 700, 2)), test, train.select(np.arange(1, 700, 2), "val"))
    out = pack_splits(parts, tmp_path / "set", block_size=8)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(RECIPE | {"data": {"shards": str(out), "resolution": 14}}))
    run(recipe, tmp_path / "run")
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["validation"]["samples"] == len(open_split(out, "val")) == 350
