"""The processes that train together: one, or those that torchrun started."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from pipeline.common.device import choose_device
from shards.cli import USER_ERROR_STATUS
from shards.errors import UserError
from trainer.allocator import keep_freed_memory
from trainer.meeting import agent_store, meet

T = TypeVar("T")

_LOCAL = (("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", "1"))  # set by torchrun: of the processes on this machine


@dataclass(frozen=True)
class World:
    """This process's place. rank: 0 .. size-1; the process of rank 0 writes files and speaks.

    control: a gloo group for small messages between the hosts' processors, None if alone.
    """

    rank: int
    size: int
    device: torch.device
    control: dist.ProcessGroup | None = None

    @property
    def speaks(self) -> bool:
        return self.rank == 0

    def share(self, value: Any) -> Any:
        """Rank 0's value, on every rank; any picklable object."""
        if self.control is None:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def on_first(self, work: Callable[[], T]) -> T:
        """Let rank 0 do something; its result, or the `UserError` that it met, on every rank."""
        outcome: tuple[T | None, UserError | None] = (None, None)
        if self.speaks:
            try:
                outcome = (work(), None)
            except UserError as error:
                outcome = (None, error)
        result, error = self.share(outcome)
        if error is not None:
            raise error
        return result

    def largest(self, value: int) -> int:
        """The largest of the ranks' values, on every rank."""
        box = torch.tensor(value)
        if self.control is not None:
            dist.all_reduce(box, dist.ReduceOp.MAX, group=self.control)
        return int(box)

    def each(self, value: float) -> list[float]:
        """Every rank's value, in the order of ranks, on every rank."""
        values = torch.zeros(self.size, dtype=torch.float64)
        values[self.rank] = value
        return self.sum(values).tolist()

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over ranks of a CPU tensor, on every rank."""
        if self.control is not None:
            tensor = tensor.clone()
            dist.all_reduce(tensor, group=self.control)
        return tensor

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in the order of ranks, on rank 0; an empty list elsewhere."""
        if self.control is None:
            return [value]
        values = [None] * self.size if self.rank == 0 else None
        dist.gather_object(value, values, dst=0, group=self.control)
        return values or []

    def share_tensors(self, tensors: list[torch.Tensor]) -> None:
        """Overwrite tensors with rank 0's, in place."""
        if self.control is not None:
            for tensor in tensors:
                dist.broadcast(tensor, src=0)


@contextmanager
def spoken_once() -> Iterator[None]:
    """Let rank 0 alone speak of a mistake that every rank meets; the others end without a word."""
    try:
        yield
    except UserError:
        if os.environ.get("RANK", "0") == "0":
            raise
        sys.exit(USER_ERROR_STATUS)


@contextmanager
def join(device_name: str, timeout_minutes: float = 10) -> Iterator[World]:
    """Join the processes that torchrun started (or be alone), and leave them at the end.

    device_name: `auto`, `cpu` or `cuda`. NCCL carries gradients between GPUs, gloo between CPUs.
    timeout_minutes: how long ranks wait for one another before they take the others for lost, and fail.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    local_rank, local_size = (int(os.environ.get(name, default)) for name, default in _LOCAL)
    device = choose_device(device_name, local_rank, local_size)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        # cuDNN finds the fastest of its algorithms for a shape by trying them; there are few shapes and many steps.
        torch.backends.cudnn.benchmark = True
    else:
        keep_freed_memory()
    if size == 1:
        yield World(rank=0, size=1, device=device)
        return
    timeout = timedelta(minutes=timeout_minutes)
    backend = "nccl" if device.type == "cuda" else "gloo"
    store = agent_store(timeout)
    if store is None:
        dist.init_process_group(backend, timeout=timeout)
    else:
        rank = int(os.environ["RANK"])
        store = meet(store, rank, size, timeout)
        dist.init_process_group(backend, timeout=timeout, store=store, rank=rank, world_size=size)
    try:
        apart = device.type == "cuda"
        control = dist.new_group(backend="gloo", timeout=timeout) if apart else dist.group.WORLD
        yield World(rank=dist.get_rank(), size=size, device=device, control=control)
    finally:
        dist.destroy_process_group()


class Vote:
    """What ranks tell one another at every update, answered one update later, so that nobody waits for the answer."""

    def __init__(self, world: World, words: int) -> None:
        self._world = world
        self._nothing = [0] * words
        self._ballot: torch.Tensor | None = None
        self._work: dist.Work | None = None

    def cast(self, *words: int) -> list[int]:
        """Say some numbers (0 for nothing), and learn the largest of each among the ranks: of now if alone, of the
        update before otherwise."""
        if self._world.control is None:
            return list(words)
        answer = self.finish()
        self._ballot = torch.tensor(words)
        self._work = dist.all_reduce(self._ballot, dist.ReduceOp.MAX, group=self._world.control, async_op=True)
        return answer

    def finish(self) -> list[int]:
        """Wait for the vote that is still open, and learn its answer."""
        if self._work is None:
            return self._nothing
        assert self._ballot is not None
        self._work.wait()
        self._work = None
        return self._ballot.tolist()
