"""The device of a process, and the threads of torch on a CPU."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from support.control_groups import show_tree

from pipeline.common.device import choose_device
from shards import UserError
from trainer.runtime import distributed


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The last number is that of torch's threads."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))
    numbers = [64]
    monkeypatch.setattr(torch, "get_num_threads", lambda: numbers[-1])
    monkeypatch.setattr(torch, "set_num_threads", numbers.append)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    return numbers


@pytest.mark.skipif(sys.platform != "linux", reason="control groups are Linux's")
@pytest.mark.parametrize("device", ["auto", "cpu"])
@pytest.mark.parametrize(
    ("quota", "expected"), [("400000", 4), ("50000", 1), ("6350000", 64), ("12800000", 64), ("max", 64)]
)
def test_torch_has_no_more_threads_than_the_process_has_cores(
    quota: str, expected: int, device: str, threads: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    show_tree(monkeypatch, tmp_path, "0::/\n", {"cpu.max": f"{quota} 100000"})
    assert choose_device(device).type == "cpu"
    assert torch.get_num_threads() == expected
    assert choose_device(device).type == "cpu" and threads in ([64], [64, expected]), "set once"


@pytest.mark.skipif(sys.platform != "linux", reason="control groups are Linux's")
def test_a_checkpoint_and_the_run_that_resumes_it_see_the_same_threads(
    threads: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both ask torch after the process group is there."""
    monkeypatch.setattr(distributed, "keep_freed_memory", lambda: None)
    show_tree(monkeypatch, tmp_path, "0::/\n", {"cpu.max": "300000 100000"})
    for name in ("auto", "cpu"):
        threads[:] = [64]
        with distributed.init_distributed(name):
            assert torch.get_num_threads() == 3


@pytest.mark.parametrize("variable", ["1", "8", "96"])
def test_the_users_number_of_threads_counts(
    variable: str, threads: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    show_tree(monkeypatch, tmp_path, "0::/\n", {"cpu.max": "400000 100000"})
    monkeypatch.setenv("OMP_NUM_THREADS", variable)
    choose_device("cpu")
    assert threads == [64]


def test_a_gpu_leaves_the_threads_alone(threads: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    show_tree(monkeypatch, tmp_path, "0::/\n", {"cpu.max": "400000 100000"})
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("auto", 1, 2) == torch.device("cuda", 1)
    with pytest.raises(UserError):
        choose_device("cuda", 2, 3)
    assert threads == [64]
