"""CPU cores of a process: those of its affinity mask, or fewer if a control group limits its CPU time."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
from support.control_groups import TREES, Tree, show_tree

from pipeline.common.process_pool import default_workers
from shards import limits

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="control groups are Linux's")


@pytest.fixture(autouse=True)
def large_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(128)))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)


def cpu_files(tree: Tree, quota: int | None, period: int = 100_000) -> dict[str, Any]:
    """The files of the groups of a tree; the first has the quota."""
    files: dict[str, Any] = {}
    for number, group in enumerate(tree.cpu):
        own = None if number else quota
        if tree.version == 2:
            files[f"{group}/cpu.max"] = f"{'max' if own is None else own} {period}"
        else:
            files[f"{group}/cpu.cfs_quota_us"] = -1 if own is None else own
            files[f"{group}/cpu.cfs_period_us"] = period
    return files


@pytest.mark.parametrize("tree", TREES.values(), ids=TREES)
@pytest.mark.parametrize(
    ("quota", "period", "cores"),
    [(400_000, 100_000, 4), (150_000, 100_000, 2), (1_000, 100_000, 1), (25_600_000, 100_000, 128), (8_000, 2_000, 4)],
)
def test_a_quota_of_cpu_time_counts_as_cores(
    tree: Tree, quota: int, period: int, cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    show_tree(monkeypatch, tmp_path, tree.membership, cpu_files(tree, quota, period))
    assert limits.available_cpus() == default_workers() == cores


@pytest.mark.parametrize("tree", TREES.values(), ids=TREES)
def test_without_a_quota_the_affinity_mask_counts(tree: Tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    show_tree(monkeypatch, tmp_path, tree.membership, cpu_files(tree, None))
    assert limits.available_cpus() == 128
    show_tree(monkeypatch, tmp_path, tree.membership)
    assert limits.available_cpus() == 128


def test_the_lowest_quota_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"pod/cpu.max": "300000 100000", "pod/one/cpu.max": "900000 100000", "cpu.max": "max 100000"}
    show_tree(monkeypatch, tmp_path, "0::/pod/one\n", files)
    assert limits.available_cpus() == 3
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 7})
    assert limits.available_cpus() == 2


def test_what_cannot_be_read_is_no_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    show_tree(monkeypatch, tmp_path, "0::/\n", {"cpu.max": "nonsense", "memory.max": 1})
    assert limits.available_cpus() == 128
    monkeypatch.setattr(limits, "_MEMBERSHIP", tmp_path / "none")
    assert limits.control_groups("cpu") == [] and limits.available_cpus() == 128


def test_quotas_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    show_tree(monkeypatch, tmp_path, "0::/\n", {"cpu.max": "400000 100000"})
    assert limits.available_cpus() == 4
    (tmp_path / "cgroup" / "cpu.max").unlink()
    assert limits.available_cpus() == 4
