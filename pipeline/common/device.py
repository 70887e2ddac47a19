"""Choose the torch device of a process."""

from __future__ import annotations

import os

import torch
from numpy.typing import NDArray

from shards.cli import plural
from shards.errors import UserError
from shards.limits import available_cpus


def choose_device(name: str, local_rank: int = 0, local_size: int = 1) -> torch.device:
    """Return the torch device of a rank. If it is a CPU, torch uses no more threads than there are cores.

    Args:
        name: `auto` (a GPU if there is one), `cpu` or `cuda`.
        local_rank: The rank on this machine, which is the index of its GPU.
        local_size: The number of ranks on this machine.

    Raises:
        UserError: If there are fewer GPUs than ranks.
    """
    gpus = torch.cuda.device_count() if name != "cpu" else 0
    if name == "cpu" or (name == "auto" and not gpus):
        _limit_threads()
        return torch.device("cpu")
    if not gpus:
        raise UserError(
            found="device: cuda, but no CUDA device on this machine",
            expected="a CUDA device that torch can see",
            hint="use device=auto or device=cpu; nvidia-smi shows what the driver sees",
        )
    if local_size > gpus:
        raise UserError(
            found=f"{local_size} processes on a machine with {plural(gpus, 'CUDA device')}",
            expected="one process per GPU",
            hint=f"torchrun --nproc_per_node={gpus} ...",
        )
    return torch.device("cuda", local_rank)


def _limit_threads() -> None:
    # torch starts a thread for each core of the affinity mask. The kernel stops all of them when a quota of CPU time is
    # used up.
    cores = available_cpus()
    if cores < torch.get_num_threads() and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(cores)


def with_index(device: torch.device) -> torch.device:
    """Return a device with its index: `cuda` becomes the current CUDA device."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def to_device(array: NDArray, device: torch.device) -> torch.Tensor:
    """Return an array as a tensor on a device: on a CPU without a copy, on a GPU without waiting for the copy."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def free_memory(device: torch.device) -> int:
    """Return the free memory of a GPU in bytes, with what torch keeps of freed tensors; 0 for a CPU.

    On a CPU, stores and models share the memory.
    """
    if device.type != "cuda":
        return 0
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept
