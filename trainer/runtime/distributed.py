"""The process group of a training: one process, or those that torchrun started."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from pipeline.common.device import choose_device
from pipeline.common.process_group import ProcessGroup, keep_groups, report_errors_on_main, world_size
from shards.errors import UserError
from trainer.runtime.memory import keep_freed_memory
from trainer.runtime.rendezvous import elastic_agent_store, rendezvous


@dataclass(frozen=True)
class World(ProcessGroup):
    """The process group of a training, with the device of this process."""

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's value, a picklable object, in the order of ranks, on rank 0; an empty list elsewhere."""
        if self.size == 1:
            return [value]
        values = [None] * self.size if self.is_main_process else None
        dist.gather_object(value, values, dst=0, group=self.control)
        return values or []

    def broadcast_tensors_(self, tensors: list[torch.Tensor]) -> None:
        """Overwrite tensors by rank 0's, in place."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, src=0)


@contextmanager
def init_distributed(device_name: str, timeout_minutes: float = 10) -> Iterator[World]:
    """Initialize the process group of torchrun's processes, or a single process.

    It is destroyed at the end, except after an error on GPUs.

    Args:
        device_name: `auto`, `cpu` or `cuda`. NCCL reduces gradients between GPUs, gloo between CPUs.
        timeout_minutes: How long ranks wait for each other before they fail.

    Yields:
        The process group.
    """
    size = world_size()
    local_rank, local_size = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    device = choose_device(device_name, local_rank, local_size)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        # In fp32, convolutions use TF32. Matrix products, such as those of the resize, are exact.
        torch.backends.cudnn.allow_tf32 = True
        torch.backends.cuda.matmul.allow_tf32 = False
        # cuDNN benchmarks its algorithms for each shape; training has one shape per resolution.
        torch.backends.cudnn.benchmark = True
    else:
        keep_freed_memory()
    if size == 1:
        yield World(device=device)
        return
    rank, timeout, on_gpu = int(os.environ["RANK"]), timedelta(minutes=timeout_minutes), device.type == "cuda"
    store = elastic_agent_store(timeout)
    if store is not None:
        store = rendezvous(store, rank, size, timeout)
    backend = "nccl" if on_gpu else "gloo"
    dist.init_process_group(backend, timeout=timeout, store=store, rank=rank, world_size=size)
    keep_groups(dist.group.WORLD)
    has_failed = True
    try:
        control = dist.new_group(backend="gloo", timeout=timeout) if on_gpu else None
        if on_gpu:
            keep_groups(control)
        yield World(rank, size, device, control=control)
        has_failed = False
    finally:
        # NCCL destroys a group only when all ranks call destroy_process_group. After an error, the other ranks may wait
        # in a collective until the timeout. This rank exits without the call, and torchrun then ends the others.
        if not (on_gpu and has_failed):
            dist.destroy_process_group()


@contextmanager
def init_single_process(device_name: str, reason: str) -> Iterator[World]:
    """Initialize the only process of a command.

    Args:
        device_name: As in `init_distributed`.
        reason: Why several processes are refused.

    Raises:
        UserError: torchrun started several processes.
    """
    with report_errors_on_main():
        if (size := world_size()) > 1:
            raise UserError(
                found=f"{size} ranks",
                expected=f"one process; {reason}",
                hint="start the command without torchrun",
            )
        with init_distributed(device_name) as world:
            yield world


class AsyncFlags:
    """Asynchronous all-reduce (MAX) of three control flags per optimizer step.

    The result is returned one step late, so no rank blocks.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._flags = torch.zeros(3, dtype=torch.int64)
        self._work: dist.Work | None = None

    def reduce(self, *flags: int) -> list[int]:
        """Start the reduction of this step's flags; return those of the previous step (of this one if size is 1)."""
        if self._world.size == 1:
            return list(flags)
        previous = self.wait()
        self._flags = torch.tensor(flags)
        self._work = dist.all_reduce(self._flags, dist.ReduceOp.MAX, group=self._world.control, async_op=True)
        return previous

    def wait(self) -> list[int]:
        """Wait for the last reduction; return its result, or zeros if there is none."""
        if self._work is not None:
            self._work.wait()
        return self._flags.tolist()
