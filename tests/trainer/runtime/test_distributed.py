"""The process group of torchrun's ranks is destroyed at the end, unless that would wait for ranks that wait."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from pipeline.common import process_group
from shards import UserError
from trainer.runtime import distributed
from trainer.runtime.distributed import init_distributed


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of what is called of `torch.distributed`, by rank 1 of 2."""
    found: list[str] = []
    for name in ("init_process_group", "new_group", "destroy_process_group"):
        monkeypatch.setattr(dist, name, lambda *_, name=name, **__: found.append(name) or name)
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "1"), ("LOCAL_WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "1")
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    monkeypatch.setattr(distributed, "choose_device", lambda name, rank, size: torch.device(name, rank))
    monkeypatch.setattr(process_group, "_GROUPS", [])
    monkeypatch.setattr(distributed, "keep_freed_memory", lambda: None)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    for module, name in ((torch.backends, "cudnn"), (torch.backends.cuda, "matmul")):
        monkeypatch.setattr(module, name, SimpleNamespace())
    return found


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_rank_that_fails_does_not_wait_for_the_ranks_that_wait_for_it(
    device: str, fails: bool, calls: list[str]
) -> None:
    """NCCL destroys a group together with the other ranks, gloo alone."""
    with pytest.raises(RuntimeError) if fails else contextlib.nullcontext(), init_distributed(device) as world:
        assert (world.rank, world.size, world.device) == (1, 2, torch.device(device, 1))
        if fails:
            raise RuntimeError
    assert process_group._GROUPS[-1] == ("new_group" if device == "cuda" else None), "gloo's group is kept"
    groups = ["init_process_group", *(["new_group"] if device == "cuda" else [])]
    assert calls == groups + ([] if fails and device == "cuda" else ["destroy_process_group"])


@pytest.mark.parametrize(("size", "found"), [("2", "WORLD_SIZE=2 without RANK, MASTER_PORT"), ("x", "WORLD_SIZE=x")])
def test_incomplete_variables_of_torchrun_are_named(size: str, found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("WORLD_SIZE", size), ("MASTER_ADDR", "localhost"), ("MASTER_PORT", ""), ("RANK", "")):
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError) as caught:
        process_group.world_size()
    assert caught.value.found.startswith(found)
    monkeypatch.setenv("WORLD_SIZE", "")
    assert process_group.world_size() == 1
