"""How the ranks that torchrun started find one another, and none that an earlier start left traces of.

torchrun's agent keeps one store for all starts of its processes, and the addresses of the ranks before still stand in
it. A rank that reads one of these waits for a process that is gone, and the start is lost. So all ranks first agree on
a name that no start before had, and keep their addresses under it.
"""

from __future__ import annotations

import os
import time
import uuid
from datetime import timedelta

import torch.distributed as dist

_PLACE = "inkstream/meeting"
_POLL = 0.02  # seconds


def agent_store(timeout: timedelta) -> dist.Store | None:
    """The store of torchrun's agent, which outlives the processes; None where there is none."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.TCPStore(host, port, is_master=False, timeout=timeout)


def meet(store: dist.Store, rank: int, size: int, timeout: timedelta) -> dist.Store:
    """A part of the store that the ranks of this start have to themselves.

    Every rank leaves a word that was never used. Rank 0 lists the words it finds; each rank that finds its own in the
    list confirms it; and when all have, the list is the name. Raises `TimeoutError`.
    """
    deadline = time.monotonic() + timeout.total_seconds()
    word = uuid.uuid4().hex
    store.set(f"{_PLACE}/word/{rank}", word)
    confirmed = ""
    while True:
        if rank == 0:
            words = [_read(store, f"word/{other}") for other in range(size)]
            listed = " ".join(words)
            if all(words) and listed != confirmed:
                store.set(f"{_PLACE}/list", listed)
                confirmed = listed
            if confirmed and all(_read(store, f"confirmed/{other}") == confirmed for other in range(1, size)):
                store.set(f"{_PLACE}/agreed/{confirmed}", "")
                break
        else:
            listed = _read(store, "list")
            if listed != confirmed and word in listed.split():
                store.set(f"{_PLACE}/confirmed/{rank}", listed)
                confirmed = listed
            if confirmed and store.check([f"{_PLACE}/agreed/{confirmed}"]):
                break
        if time.monotonic() > deadline:
            raise TimeoutError(f"rank {rank} waited {timeout} for the other {size - 1} ranks")
        time.sleep(_POLL)
    return dist.PrefixStore(f"{_PLACE}/{confirmed}", store)


def _read(store: dist.Store, name: str) -> str:
    """What stands in the store; empty if nothing does."""
    key = f"{_PLACE}/{name}"
    return store.get(key).decode() if store.check([key]) else ""
