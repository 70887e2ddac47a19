"""Map a function over items in processes, with one progress bar."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from tqdm import tqdm

from shards.errors import UserError
from shards.limits import available_cpus

T = TypeVar("T")

# The function of the pool. Processes are forked while it is set, so it need not be picklable.
_work: Callable[[int], Any] | None = None


def default_workers() -> int:
    """Return the number of CPUs of this process: those of the machine divided by its ranks, at least 1."""
    return max(1, available_cpus() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def map_in_processes(work: Callable[[int], T], sizes: Sequence[int], workers: int, bar: tqdm) -> list[T]:
    """Return `[work(0), work(1), ...]`, computed by several processes.

    Where processes cannot be forked safely (macOS, Windows), threads are used. An exception of `work` is raised here,
    after the items in progress have ended.

    Args:
        work: Called with the number of an item, 0 .. len(sizes) - 1.
        sizes: The size of each item, by which the bar advances.
        workers: The number of processes; with 1 this process does the work.
        bar: The progress bar.

    Raises:
        UserError: If a process is killed.
    """
    global _work
    workers = min(workers, len(sizes))
    if workers <= 1:
        results = []
        for number, size in enumerate(sizes):
            results.append(work(number))
            bar.update(size)
        return results
    _work = work
    try:
        with _make_pool(workers) as pool:
            futures = [pool.submit(_call, number) for number in range(len(sizes))]
            size_of = dict(zip(futures, sizes, strict=True))
            try:
                for future in as_completed(futures):
                    future.result()
                    bar.update(size_of[future])
            except BrokenProcessPool:
                raise UserError(
                    found="a packing process that was killed",
                    expected="all processes to finish",
                    hint="the process probably ran out of memory: run again with fewer --workers",
                ) from None
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise
            return [future.result() for future in futures]
    finally:
        _work = None


def _make_pool(workers: int) -> Executor:
    if sys.platform != "linux":  # libraries of macOS may crash in forked processes
        return ThreadPoolExecutor(workers)
    return ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("fork"), initializer=_follow_parent)


def _call(number: int) -> Any:
    assert _work is not None
    return _work(number)


def _follow_parent() -> None:
    """Leave signals to the parent, and end with it: a killed parent would leave its children waiting for ever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
