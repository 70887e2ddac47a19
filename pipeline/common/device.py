"""Which device does the work, chosen by name, by what is there and by the rank on this machine."""

from __future__ import annotations

import torch

from shards.errors import UserError


def choose_device(name: str, local_rank: int = 0, local_size: int = 1) -> torch.device:
    """The torch device for `auto`, `cpu` or `cuda`; the `local_size` ranks of one machine take a GPU each."""
    gpus = torch.cuda.device_count() if name != "cpu" else 0
    if name == "cpu" or (name == "auto" and not gpus):
        return torch.device("cpu")
    if not gpus:
        raise UserError(
            found="device: cuda, and no CUDA device on this machine",
            expected="a CUDA device that torch can see",
            hint="use device=auto or device=cpu; nvidia-smi shows what the driver sees",
        )
    if local_size > gpus:
        raise UserError(
            found=f"{local_size} processes on a machine with {gpus} CUDA devices",
            expected="one process for each GPU",
            hint=f"torchrun --nproc_per_node={gpus} ...",
        )
    return torch.device("cuda", local_rank)
