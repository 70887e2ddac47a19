"""Rendezvous of the ranks that torchrun started, and the run directory that a torchrun job keeps over restarts.

The store of torchrun's agent outlives the processes. The addresses of an earlier start's ranks stay in it, and a rank
that reads one of them waits for a process that is gone. So the ranks of a start first agree on a key prefix that no
earlier start used. Ranks that still download the data set send heartbeats meanwhile, so that the others wait for them.

The agent's store also keeps the run directory of the first start: a restarted job continues in its own directory
with any value of `resume`, and another job never does. torchrun's restart count cannot replace this: it excludes
restarts after a host has joined or left.
"""

from __future__ import annotations

import os
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from trainer.config.schema import RunConfig

_PREFIX = "inkstream/rendezvous"
_HEARTBEATS = f"{_PREFIX}/heartbeats"  # the number of all heartbeats of the job
_POLL = 0.02  # seconds
_TIMEOUT = timedelta(seconds=60)


def elastic_agent_store(timeout: timedelta) -> dist.Store | None:
    """Return the store of torchrun's agent; None without torchrun."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.TCPStore(host, port, is_master=False, timeout=timeout)


def rendezvous(store: dist.Store, rank: int, size: int, timeout: timedelta) -> dist.Store:
    """Return a view of the store that only the ranks of this start use.

    Each rank writes a random token. Rank 0 publishes the list of tokens; every rank that finds its own acknowledges.
    Once all have, the list becomes the key prefix of this start.

    Raises:
        TimeoutError: Not all ranks came, and none sent a heartbeat in this time.
    """
    heartbeats, deadline = store.add(_HEARTBEATS, 0), time.monotonic() + timeout.total_seconds()
    token = uuid.uuid4().hex
    store.set(f"{_PREFIX}/token/{rank}", token)
    acknowledged = ""
    while True:
        if rank == 0:
            tokens = [_read(store, f"token/{other}") for other in range(size)]
            published = " ".join(tokens)
            if all(tokens) and published != acknowledged:
                store.set(f"{_PREFIX}/list", published)
                acknowledged = published
            if acknowledged and all(_read(store, f"acknowledged/{other}") == acknowledged for other in range(1, size)):
                store.set(f"{_PREFIX}/complete/{acknowledged}", "")
                break
        else:
            published = _read(store, "list")
            if published != acknowledged and token in published.split():
                store.set(f"{_PREFIX}/acknowledged/{rank}", published)
                acknowledged = published
            if acknowledged and store.check([f"{_PREFIX}/complete/{acknowledged}"]):
                break
        if time.monotonic() > deadline:
            earlier, heartbeats = heartbeats, store.add(_HEARTBEATS, 0)
            if heartbeats == earlier:
                raise TimeoutError(f"rank {rank} waited {timeout} for the other {size - 1} ranks")
            deadline = time.monotonic() + timeout.total_seconds()
        time.sleep(_POLL)
    return dist.PrefixStore(f"{_PREFIX}/{acknowledged}", store)


@contextmanager
def send_heartbeats(timeout: timedelta) -> Iterator[None]:
    """Let the ranks of this job that are at the rendezvous wait for this one, which has not come yet.

    Args:
        timeout: How long they wait without a heartbeat.
    """
    store = elastic_agent_store(_TIMEOUT)
    if store is None:
        yield
        return
    has_ended = threading.Event()

    def send() -> None:
        with suppress(RuntimeError):  # the agent is gone, and will end this process
            while not has_ended.wait(timeout.total_seconds() / 4):
                store.add(_HEARTBEATS, 1)

    thread = threading.Thread(target=send, daemon=True)
    thread.start()
    try:
        yield
    finally:
        has_ended.set()
        thread.join()


def get_run_dir_of_job(run: RunConfig) -> Path | None:
    """Return the directory of a run of this torchrun job; None at the first start, or without torchrun."""
    store = elastic_agent_store(_TIMEOUT)
    if store is None or not store.check([_run_dir_key(run)]):
        return None
    return Path(store.get(_run_dir_key(run)).decode())


def set_run_dir_of_job(run: RunConfig, path: Path) -> None:
    """Store the directory of a run for the restarts of this torchrun job."""
    store = elastic_agent_store(_TIMEOUT)
    if store is not None:
        store.set(_run_dir_key(run), str(path.absolute()))


def _run_dir_key(run: RunConfig) -> str:
    """A job may train several runs, one after another."""
    return f"inkstream/run_directory/{run.name}/{run.dir or ''}"


def _read(store: dist.Store, name: str) -> str:
    """A value of the store; empty if it is not set."""
    key = f"{_PREFIX}/{name}"
    return store.get(key).decode() if store.check([key]) else ""
