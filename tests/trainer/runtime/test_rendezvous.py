"""The ranks of a start agree on a key prefix that no earlier start used."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from trainer.runtime.rendezvous import rendezvous

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
