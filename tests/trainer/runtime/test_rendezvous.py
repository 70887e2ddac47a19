"""The ranks of a start agree on a key prefix that no earlier start used. They wait for ranks that still prepare."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from trainer.runtime import rendezvous as rendezvous_module
from trainer.runtime.rendezvous import rendezvous, send_heartbeats

MINUTE = timedelta(minutes=1)


def start(store: dist.Store, size: int, late: int) -> list[dist.Store]:
    """Rendezvous of all ranks, one of them a little after the others."""

    def rank(number: int) -> dist.Store:
        time.sleep(0.1 * (number == late))
        return rendezvous(store, number, size, MINUTE)

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(rank, range(size)))


@pytest.mark.parametrize("late", [0, 1, 2])
def test_every_start_has_a_place_of_its_own(late: int) -> None:
    store = dist.HashStore()
    for size in (3, 3, 2, 3):
        parts = start(store, size, late)
        assert not parts[0].check(["address"]), "nothing of an earlier start"
        parts[0].set("address", "here")
        assert all(part.get("address") == b"here" for part in parts)


def test_a_start_that_came_to_nothing_is_not_met() -> None:
    store = dist.HashStore()
    with pytest.raises(TimeoutError, match="rank 1 waited"):
        rendezvous(store, 1, 2, timedelta(seconds=0.1))
    with pytest.raises(TimeoutError, match="rank 0 waited"):
        rendezvous(store, 0, 2, timedelta(seconds=0.1))
    first, second = start(store, 2, late=1)
    first.set("address", "here")
    assert second.get("address") == b"here"


@pytest.mark.parametrize("late", [0, 1, 2])
def test_ranks_wait_for_one_that_sends_heartbeats(late: int, monkeypatch: pytest.MonkeyPatch) -> None:
    store, timeout = dist.HashStore(), timedelta(seconds=0.4)
    monkeypatch.setattr(rendezvous_module, "elastic_agent_store", lambda _: store)

    def rank(number: int) -> dist.Store:
        if number == late:
            with send_heartbeats(timeout):
                time.sleep(1.2)  # a download
        return rendezvous(store, number, 3, timeout)

    with ThreadPoolExecutor(3) as pool:
        assert len(list(pool.map(rank, range(3)))) == 3


@pytest.mark.parametrize("number", [0, 1])
def test_ranks_do_not_wait_for_one_that_has_died(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    store, timeout = dist.HashStore(), timedelta(seconds=0.1)
    monkeypatch.setattr(rendezvous_module, "elastic_agent_store", lambda _: store)
    with ThreadPoolExecutor(1) as pool:
        with send_heartbeats(timeout):
            waiting = pool.submit(rendezvous, store, number, 2, timeout)
            time.sleep(0.5)
            assert not waiting.done()
        with pytest.raises(TimeoutError, match=f"rank {number} waited"):
            waiting.result()
