"""Two hosts train together, one is cut off and comes back, and the result is that of hosts that nothing happened to."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT, pack_splits, synthetic_splits

import pipeline.packing.pack
from shards.manifest import Manifest

RECIPE = {
    "data": {"val_fraction": 0.1, "resolution": 20},
    "loader": {"batch_size": 32},
    "model": {"name": "three_block_cnn", "drop_rate": 0.2},
    "optim": {"name": "adamw", "lr": 1e-3},
    "trainer": {"epochs": 3, "precision": "fp32", "timeout_minutes": 0.1},
    "checkpoint": {"every_steps": 5},
}
ADDRESSES = ("10.77.31.1", "10.77.31.2")
PORT = 29417

# Steps take a little time, so that there is something to cut off.
SLOW = """
import time
import trainer.loop.engine as engine
step = engine.train_step
def slow_step(*arguments):
    time.sleep(0.1)
    return step(*arguments)
engine.train_step = slow_step
from shards.cli import run_command
from trainer.run import main
run_command(main)
"""


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@pytest.fixture
def hosts() -> Iterator[tuple[str, str]]:
    """Two network namespaces with an address each, joined by a pair of interfaces; torn down at the end."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and iproute2")
    names = tuple(f"ink{os.getpid()}{letter}" for letter in "ab")
    try:
        ip("netns", "add", names[0])
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespaces here: {error.stderr.decode().strip()}")
    try:
        ip("netns", "add", names[1])
        ip("link", "add", names[0], "type", "veth", "peer", "name", names[1])
        for name, address in zip(names, ADDRESSES, strict=True):
            ip("link", "set", name, "netns", name)
            ip("-n", name, "address", "add", f"{address}/24", "dev", name)
            for interface in ("lo", name):
                ip("-n", name, "link", "set", interface, "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)


class Host:
    """torchrun on one of the hosts."""

    def __init__(self, name: str, address: str, place: Path, recipe: Path, run: Path) -> None:
        self.output = place / f"{name}-{time.time_ns()}.txt"
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1"]
        launcher += ["--rdzv_backend=c10d", f"--rdzv_endpoint={ADDRESSES[0]}:{PORT}", "--rdzv_id=two-hosts"]
        # A host knows itself as the one to rendezvous at by its name, and these have none.
        launcher += [f"--rdzv_conf=is_host={int(address == ADDRESSES[0])}", f"--local_addr={address}"]
        launcher += ["--max-restarts=20", "--monitor-interval=0.2"]
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": name,
            "INKSTREAM_CACHE": str(place / name),
        }
        with open(self.output, "w") as output:
            self.process = subprocess.Popen(
                ["ip", "netns", "exec", name, *launcher, str(place / "slow.py"), str(recipe), f"run.dir={run}"],
                cwd=place,
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def stop(self, how: signal.Signals) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, how)
            self.process.wait()


def step_of(run: Path) -> tuple[int, int]:
    """(epoch, step) of the newest checkpoint; (-1, 0) if there is none."""
    try:
        state = torch.load(run / "checkpoints" / "last.pt", weights_only=True)
    except (FileNotFoundError, EOFError):
        return -1, 0
    return state["epoch"], state["step"]


def train(hosts: tuple[str, str], place: Path, shards: Path | str, seconds_cut: float) -> Path:
    """Train on two hosts; returns the run directory. seconds_cut: how long the second is cut off, in epoch 2."""
    place.mkdir()
    recipe, run = place / "recipe.yaml", place / "run"
    recipe.write_text(yaml.safe_dump(RECIPE | {"data": RECIPE["data"] | {"shards": str(shards)}}))
    (place / "slow.py").write_text(SLOW)
    running = [Host(name, address, place, recipe, run) for name, address in zip(hosts, ADDRESSES, strict=True)]
    try:
        if seconds_cut:
            while step_of(run) < (1, 5):
                assert all(host.process.poll() is None for host in running), running[0].output.read_text()
                time.sleep(0.05)
            ip("-n", hosts[1], "link", "set", hosts[1], "down")
            time.sleep(seconds_cut)
            ip("-n", hosts[1], "link", "set", hosts[1], "up")
        statuses = [host.process.wait() for host in running]
        assert statuses == [0, 0], "\n".join(host.output.read_text() for host in running)
        if seconds_cut > 60 * RECIPE["trainer"]["timeout_minutes"]:
            assert "resuming from epoch 2 after step" in running[0].output.read_text()
    finally:
        for host in running:
            host.stop(signal.SIGKILL)
    return run


@pytest.mark.slow
@pytest.mark.parametrize("seconds_cut", [3, 15])
def test_a_host_is_cut_off_and_brought_back(
    hosts: tuple[str, str], tmp_path: Path, synthetic_set: Path, seconds_cut: float
) -> None:
    """For less and for more than the ranks wait for one another."""
    runs = [train(hosts, tmp_path / str(seconds), synthetic_set, seconds) for seconds in (0, seconds_cut)]
    check_same_result(runs)


@pytest.mark.slow
def test_a_host_that_fetches_shards_is_cut_off_and_brought_back(
    hosts: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each host has a cache for 60% of the data set, which the first one serves."""
    monkeypatch.setattr(pipeline.packing.pack, "SHARD_BYTES", 16 * 28 * 28)
    shards = pack_splits(synthetic_splits(), tmp_path / "web" / "set", block_size=1)
    packed = sum(Manifest.read(shards / split).packed_bytes for split in ("train", "test"))
    monkeypatch.setenv("INKSTREAM_CACHE_SIZE", str(packed * 6 // 10))
    server = [sys.executable, "-m", "http.server", "8000", f"--bind={ADDRESSES[0]}", f"--directory={shards.parent}"]
    with subprocess.Popen(["ip", "netns", "exec", hosts[0], *server], stderr=subprocess.DEVNULL) as process:
        address = f"http://{ADDRESSES[0]}:8000/set"
        runs = [train(hosts, tmp_path / str(seconds), address, seconds) for seconds in (0, 15)]
        process.terminate()
    assert len(list((tmp_path / "0" / hosts[0]).rglob("train/shard-*.tar"))) < 44
    check_same_result(runs)


def check_same_result(runs: list[Path]) -> None:
    states = [torch.load(run / "checkpoints" / "last.pt", weights_only=True) for run in runs]
    assert all(torch.equal(states[0]["model"][name], states[1]["model"][name]) for name in states[0]["model"])
    accuracies = [json.loads((run / "summary.json").read_text())["accuracy"] for run in runs]
    assert accuracies[0] == accuracies[1]
