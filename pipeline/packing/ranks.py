"""The process group of packing: one process, or the ranks of torchrun on one machine or many."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from shards.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class ProcessGroup:
    """The rank of this process and the number of ranks.

    A `UserError` that any rank raises in the methods below is raised on all ranks.
    """

    rank: int = 0
    size: int = 1

    def all_gather(self, work: Callable[[], T]) -> list[T]:
        """Call a function on every rank; return all (picklable) results in the order of ranks, on every rank."""
        outcome: tuple[T | None, UserError | None]
        try:
            outcome = (work(), None)
        except UserError as error:
            outcome = (None, error)
        outcomes: list[Any] = [outcome]
        if self.size > 1:
            import torch.distributed as dist  # the import takes seconds

            outcomes = [None] * self.size
            dist.all_gather_object(outcomes, outcome)
        if errors := [error for _, error in outcomes if error is not None]:
            raise errors[0]
        return [result for result, _ in outcomes]

    def barrier_run(self, work: Callable[[], T]) -> T:
        """Call a function on every rank and wait for all; return this rank's result, which need not be picklable."""
        results: list[T] = []
        self.all_gather(lambda: results.append(work()))
        return results[0]

    def run_on_main(self, work: Callable[[], T]) -> T:
        """Call a function on rank 0; return its (picklable) result on every rank."""
        return self.all_gather(lambda: work() if self.rank == 0 else None)[0]  # type: ignore[return-value]  # T on rank 0


@contextmanager
def init_process_group() -> Iterator[ProcessGroup]:
    """Join the ranks of torchrun, if there are several, and leave them at the end."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield ProcessGroup()
        return
    import torch.distributed as dist

    dist.init_process_group("gloo")
    try:
        yield ProcessGroup(dist.get_rank(), size)
    finally:
        dist.destroy_process_group()
