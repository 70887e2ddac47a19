"""Limits of control groups count as the memory of the machine; freed memory stays with the process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from conftest import ROOT
from support.control_groups import TREES, Tree, show_tree

from trainer.config.schema import Config
from trainer.data.training_data import _image_memory
from trainer.runtime.memory import available_memory, memory_limit

GB = 10**9

PROGRAM = """
import resource
import torch
from trainer.runtime.memory import keep_freed_memory
def page_faults():
    for number in range(20):
        if number == 10:  # by then the allocator has settled
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.empty(64 << 20, dtype=torch.uint8).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(page_faults())
keep_freed_memory()
print(page_faults())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the setting is glibc's")
def test_large_blocks_are_reused() -> None:
    process = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    default, kept = map(int, process.stdout.split())
    assert kept < 100
    assert default > 50 * max(kept, 1), "else the setting would be of no use"


def memory_files(tree: Tree, limit: int | None, used: int = 0, cache: tuple[int, int] = (0, 0)) -> dict[str, Any]:
    """The files of the groups of a tree; the first has the limit."""
    files: dict[str, Any] = {}
    names, total = ("max", "current"), ""
    none: Any = "max"
    if tree.version == 1:
        names, total, none = ("limit_in_bytes", "usage_in_bytes"), "total_", 2**63 - 4096
    for number, group in enumerate(tree.memory):
        files[f"{group}/memory.{names[0]}"] = none if number or limit is None else limit
        files[f"{group}/memory.{names[1]}"] = used
        own = "active_file 7\ninactive_file 7\n" if total else ""  # without the groups below
        files[f"{group}/memory.stat"] = f"anon 5\n{own}{total}active_file {cache[0]}\n{total}inactive_file {cache[1]}"
    return files


@pytest.fixture
def large_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=1000 * GB, available=900 * GB))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)


linux = pytest.mark.skipif(sys.platform != "linux", reason="control groups are Linux's")


@linux
@pytest.mark.usefixtures("large_machine")
@pytest.mark.parametrize("tree", TREES.values(), ids=TREES)
@pytest.mark.parametrize("limit", [64 * GB, 4 * GB])
def test_a_limit_of_a_control_group_is_the_memory_of_the_machine(
    tree: Tree, limit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    show_tree(monkeypatch, tmp_path, tree.membership, memory_files(tree, limit, 3 * GB))
    assert memory_limit() == limit
    assert available_memory() == limit - 3 * GB
    assert _image_memory(Config(data={"shards": "x"})) == limit // 2, "loader.cache_gb=auto"


@linux
@pytest.mark.usefixtures("large_machine")
@pytest.mark.parametrize("tree", TREES.values(), ids=TREES)
def test_without_a_limit_the_memory_is_that_of_the_machine(
    tree: Tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for files in (memory_files(tree, None, 3 * GB), memory_files(tree, 2000 * GB, 3 * GB), {}):
        show_tree(monkeypatch, tmp_path, tree.membership, files)
        assert (memory_limit(), available_memory()) == (1000 * GB, 900 * GB)
    show_tree(monkeypatch, tmp_path, "")
    assert (memory_limit(), available_memory()) == (1000 * GB, 900 * GB)


@linux
@pytest.mark.usefixtures("large_machine")
@pytest.mark.parametrize("name", ["version 2, a parent", "version 1"])
@pytest.mark.parametrize(("used", "cache", "free"), [(60, (20, 30), 54), (64, (0, 63), 63), (65, (0, 0), 0)])
def test_the_page_cache_of_a_group_is_free(
    name: str, used: int, cache: tuple[int, int], free: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job that has read a large data set is at its limit."""
    files = memory_files(TREES[name], 64 * GB, used * GB, (cache[0] * GB, cache[1] * GB))
    show_tree(monkeypatch, tmp_path, TREES[name].membership, files)
    assert available_memory() == free * GB
    for path in tmp_path.rglob("memory.stat"):
        path.unlink()
    assert (memory_limit(), available_memory()) == (64 * GB, max(0, 64 - used) * GB)


@linux
@pytest.mark.usefixtures("large_machine")
def test_the_group_with_the_least_memory_left_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The job has 64 GB, of which other steps use most; its step may use 32 GB."""
    groups = {"job": (64, 60), "job/step": (32, 2)}
    files = {f"{group}/memory.max": limit * GB for group, (limit, _) in groups.items()}
    files |= {f"{group}/memory.current": used * GB for group, (_, used) in groups.items()}
    files |= {f"{group}/memory.stat": "active_file 0" for group in groups}
    show_tree(monkeypatch, tmp_path, "0::/job/step\n", files)
    assert (memory_limit(), available_memory()) == (32 * GB, 4 * GB)
