"""Work shared out among processes that inherit what they work on, with one progress bar."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any, TypeVar

from tqdm import tqdm

from shards.cpus import available_cpus
from shards.errors import UserError

T = TypeVar("T")
Advance = Callable[[int], None]

_REFRESH = 0.2  # seconds between two looks at how far the workers are

# What the processes of a pool work on; they are forked while it is set, so that nothing has to be pickled.
_work: Callable[[int, Advance], Any] | None = None
_done: Any = None


def default_workers() -> int:
    """The cores that this process may use, shared with the other ranks of this machine."""
    return max(1, available_cpus() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def map_in_processes(work: Callable[[int, Advance], T], items: Sequence[int], workers: int, bar: tqdm) -> list[T]:
    """`[work(item, advance) for item in items]`, by several processes; `advance(n)` moves the bar by n.

    Where processes cannot be forked (Windows), threads do it. An exception of `work` is raised here, once no other
    item is being worked on. Raises `UserError` if a process is killed.
    """
    workers = min(workers, len(items))
    if workers <= 1:
        return [work(item, bar.update) for item in items]
    with _pool(work, workers) as (pool, done):
        futures = [pool.submit(_call, item) for item in items]
        open_ones = set(futures)
        try:
            while open_ones:
                finished, open_ones = wait(open_ones, timeout=_REFRESH, return_when=FIRST_COMPLETED)
                bar.update(done.value - bar.n)
                for future in finished:
                    future.result()
        except BrokenProcessPool:
            raise UserError(
                found="a packing process that was killed",
                expected="all of them to finish",
                hint="most likely the memory did not suffice: run again with fewer --workers",
            ) from None
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
        bar.update(done.value - bar.n)
        return [future.result() for future in futures]


@contextmanager
def _pool(work: Callable[[int, Advance], Any], workers: int) -> Iterator[tuple[Executor, Any]]:
    global _work, _done
    _work = work
    try:
        if "fork" in multiprocessing.get_all_start_methods():
            context = multiprocessing.get_context("fork")
            _done = context.Value("q", 0)
            pool: Executor = ProcessPoolExecutor(workers, mp_context=context, initializer=_follow_parent)
        else:
            _done = multiprocessing.Value("q", 0)
            pool = ThreadPoolExecutor(workers)
        with pool:
            yield pool, _done
    finally:
        _work = _done = None


def _call(item: int) -> Any:
    assert _work is not None
    return _work(item, _advance)


def _advance(count: int) -> None:
    with _done.get_lock():
        _done.value += count


def _follow_parent() -> None:
    """Leave signals to the parent, and end with it: killed, it would leave its children waiting for ever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
