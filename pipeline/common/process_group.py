"""The process group of a command: one process, or the ranks that torchrun started."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

from shards.errors import UserError

T = TypeVar("T")

# How long ranks wait for one that downloads or computes alone. A rank that has died is noticed at once: its connections
# close, and torchrun ends the others.
ALONE_TIMEOUT = timedelta(days=7)
_REPORT_SECONDS = 10.0  # torchrun needs a second to end the other ranks
_GROUPS: list[Any] = []


@dataclass(frozen=True)
class ProcessGroup:
    """The rank of this process and the number of ranks.

    A `UserError` that a rank raises in `all_gather`, `barrier_run` or `run_on_main` is raised on all ranks.
    """

    rank: int = 0
    size: int = 1
    control: Any = field(default=None, kw_only=True)
    """The gloo group of small CPU messages; None for torch's default group."""

    @property
    def is_main_process(self) -> bool:
        """Whether this is rank 0, which writes files and prints."""
        return self.rank == 0

    def broadcast_object(self, value: Any) -> Any:
        """Return rank 0's value, a picklable object, on every rank."""
        if self.size == 1:
            return value
        import torch.distributed as dist  # the import takes seconds

        objects = [value]
        dist.broadcast_object_list(objects, src=0, group=self.control)
        return objects[0]

    def all_gather(self, work: Callable[[], T]) -> list[T]:
        """Call a function on every rank; return all (picklable) results in the order of ranks, on every rank."""
        outcomes: list[Any] = [_call(work)]
        if self.size > 1:
            import torch.distributed as dist

            (outcome,), outcomes = outcomes, [None] * self.size
            dist.all_gather_object(outcomes, outcome, group=self.control)
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
        result, error = self.broadcast_object(_call(work) if self.is_main_process else None)
        if error is not None:
            raise error
        return result


def _call(work: Callable[[], T]) -> tuple[T | None, UserError | None]:
    try:
        return work(), None
    except UserError as error:
        return None, error


@contextmanager
def report_errors_on_main() -> Iterator[None]:
    """Let rank 0 alone print a `UserError` that all ranks raise.

    torchrun ends all ranks when one fails. The other ranks therefore wait for 10 seconds before they raise. A rank
    that still runs then prints its error: either only this rank has it, or the rank is on another host.
    """
    try:
        yield
    except UserError:
        if os.environ.get("RANK", "0") != "0":
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # torchrun sends it; this rank ends silently
            time.sleep(_REPORT_SECONDS)
        raise


def keep_groups(*groups: Any) -> None:
    """Keep process groups of torch until the process ends.

    Before version 2.8, torch holds the GIL while it destroys a group and waits for the threads of the group. One of
    them may wait for the GIL, to release the tensors of the last operation. The process then hangs.
    """
    _GROUPS.extend(groups)


def world_size() -> int:
    """Return the number of ranks that torchrun started; 1 without torchrun.

    Raises:
        UserError: The variables of torchrun are incomplete.
    """
    size = os.environ.get("WORLD_SIZE") or "1"
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if size != "1" and (missing or not size.isdecimal()):
        raise UserError(
            found=f"WORLD_SIZE={size}" + (f" without {', '.join(missing)}" if missing else ""),
            expected="all variables that torchrun sets, or none",
            hint="unset WORLD_SIZE, or start the command with torchrun",
        )
    return int(size)


@contextmanager
def init_process_group() -> Iterator[ProcessGroup]:
    """Join the ranks of torchrun, if there are several, and leave them at the end."""
    size = world_size()
    if size == 1:
        yield ProcessGroup()
        return
    import torch.distributed as dist

    dist.init_process_group("gloo", timeout=ALONE_TIMEOUT)
    keep_groups(dist.group.WORLD)
    try:
        yield ProcessGroup(dist.get_rank(), size)
    finally:
        dist.destroy_process_group()
