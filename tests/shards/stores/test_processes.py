"""A store in other processes: forked while a thread reads it, pickled, and after a change of the working directory."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, pack_splits, synthetic_splits
from support.raw_files import refusal
from support.synthetic_records import pack_pictures

from shards import open_split
from shards.errors import MismatchError

KINDS = ("tar", "zarr", "records")
BLOCKS_OF_16 = 4 * 16 * 5 * 4 * 3  # bytes of four blocks


@pytest.fixture(scope="module")
def packs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("packs")
    found = {"records": pack_pictures(directory / "records", records_per_shard=30, train=300, test=3)}
    for store in ("tar", "zarr"):
        splits = synthetic_splits(train=300, test=20, shape=(5, 4, 3), transposed=False)
        found[store] = pack_splits(splits, directory / store, 16, store=store)
    return found


FORKS = """
import os, sys, threading, time
import numpy as np
from shards import open_split

store = open_split(sys.argv[1], "train", int(sys.argv[2]) or None)
expected = [np.asarray(image).tobytes() for image in store.read(np.arange(300))]

def read_for_ever():
    while True:
        store.read(np.random.permutation(300))

threading.Thread(target=read_for_ever, daemon=True).start()
time.sleep(0.1)
for _ in range(30):
    child = os.fork()
    if child == 0:
        found = [np.asarray(image).tobytes() for image in store.read(np.arange(300))]
        os._exit(0 if found == expected else 1)
    end = time.monotonic() + 60
    while (status := os.waitpid(child, os.WNOHANG))[0] == 0 and time.monotonic() < end:
        time.sleep(0.002)
    if status[0] == 0:
        os.kill(child, 9)
        sys.exit("a child hangs")
    if status[1]:
        sys.exit("a child reads other images")
os._exit(0)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows does not fork")
@pytest.mark.parametrize(
    ("kind", "memory"), [("tar", 0), ("tar", BLOCKS_OF_16), ("zarr", BLOCKS_OF_16), ("records", 0)]
)
def test_a_process_forked_while_a_thread_reads(packs: dict[str, Path], kind: str, memory: int) -> None:
    """The child has no thread that could release the locks that were held."""
    command = [sys.executable, "-c", FORKS, str(packs[kind]), str(memory)]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr


@pytest.mark.parametrize("memory", [None, BLOCKS_OF_16])
@pytest.mark.parametrize("kind", KINDS)
def test_a_pickled_store_is_opened_again(packs: dict[str, Path], kind: str, memory: int | None) -> None:
    store = open_split(packs[kind], "train", memory)
    copy = pickle.loads(pickle.dumps(store))
    assert type(copy) is type(store) and copy.labels.tolist() == store.labels.tolist()
    for one, other in zip(store.read(np.arange(300)), copy.read(np.arange(300)), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_pickled_store_whose_data_set_was_replaced_is_refused(tmp_path: Path) -> None:
    splits = synthetic_splits(train=20, test=5)
    pickled = pickle.dumps(open_split(pack_splits(splits, tmp_path / "set"), "train"))
    (tmp_path / "set").rename(tmp_path / "earlier")
    pack_splits(synthetic_splits(train=21, test=5), tmp_path / "set")
    assert isinstance(refusal(lambda: pickle.loads(pickled)), MismatchError)


SPAWN = """
import sys
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from shards import open_split

class Images(Dataset):
    def __init__(self, store):
        self.store = store

    def __len__(self):
        return len(self.store)

    def __getitem__(self, number):
        return int(np.asarray(self.store.read(np.array([number]))[0]).sum())

if __name__ == "__main__":
    loader = DataLoader(Images(open_split(sys.argv[1], "train")), 50, num_workers=1, multiprocessing_context="spawn")
    print(int(torch.cat(list(loader)).sum()))
"""


def test_workers_of_a_data_loader_that_are_not_forked(packs: dict[str, Path], tmp_path: Path) -> None:
    """As on macOS and Windows, and on Linux from Python 3.14 on."""
    (tmp_path / "spawn.py").write_text(SPAWN)
    command = [sys.executable, str(tmp_path / "spawn.py"), str(packs["zarr"])]
    environment = {"PYTHONPATH": str(ROOT), "PATH": ""}
    process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr
    images = open_split(packs["zarr"], "train").read(np.arange(300))
    assert json.loads(process.stdout) == int(np.asarray(images).sum(dtype=np.int64))


@pytest.mark.parametrize("memory", [None, BLOCKS_OF_16])
@pytest.mark.parametrize("kind", KINDS)
def test_the_working_directory_may_change(
    packs: dict[str, Path], kind: str, memory: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = open_split(packs[kind], "train").read(np.arange(300))
    monkeypatch.chdir(packs[kind].parent)
    store = open_split(packs[kind].name, "train", memory)
    monkeypatch.chdir(tmp_path)
    for one, other in zip(expected, store.read(np.arange(300)), strict=True):
        np.testing.assert_array_equal(one, other)
