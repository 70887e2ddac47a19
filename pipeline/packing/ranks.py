"""The processes that pack together: one, or those that torchrun started, on one machine or many."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from shards.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class Team:
    """This process's place: rank 0 .. size-1."""

    rank: int = 0
    size: int = 1

    def each(self, work: Callable[[], T]) -> T:
        """Let every rank do something, and wait for all; this rank's own result.

        A `UserError` that any rank meets is raised on all of them.
        """
        results: list[T] = []
        self.all(lambda: results.append(work()))
        return results[0]

    def first(self, work: Callable[[], T]) -> T:
        """Let rank 0 do something; its result on every rank. Errors as in `each`."""
        return self.all(lambda: work() if self.rank == 0 else None)[0]

    def all(self, work: Callable[[], T]) -> list[T]:
        """Let every rank do something; all (picklable) results in the order of ranks, on every rank. Errors as in
        `each`."""
        try:
            outcome: tuple[T | None, UserError | None] = (work(), None)
        except UserError as error:
            outcome = (None, error)
        outcomes = self._share(outcome)
        for _, error in outcomes:
            if error is not None:
                raise error
        return [result for result, _ in outcomes]

    def _share(self, value: Any) -> list[Any]:
        if self.size == 1:
            return [value]
        import torch.distributed as dist  # takes seconds, so only where there are several

        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values


@contextmanager
def join_team() -> Iterator[Team]:
    """Join the processes that torchrun started, or be alone, and leave them at the end."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Team()
        return
    import torch.distributed as dist

    dist.init_process_group("gloo")
    try:
        yield Team(dist.get_rank(), size)
    finally:
        dist.destroy_process_group()
