"""A figure on the device, read without waiting for the device."""

from __future__ import annotations

import math

import torch


class AsyncScalar:
    """The newest loss that has reached the host.

    On a GPU every offered value would be there only when all work before it is done. It is copied into pinned memory
    behind that work instead, and taken from there once an event says that the copy has happened; values offered
    meanwhile are passed over. On a CPU the value is there at once, and is read only when it is asked for.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._newest = math.nan
        self._count = 1
        self._value = torch.zeros((), pin_memory=self._on_gpu)
        self._copied = torch.cuda.Event() if self._on_gpu else None

    def update(self, total: torch.Tensor, count: int) -> None:
        """total: a scalar on the device, the loss summed over `count` samples."""
        if self._copied is None:
            self._value, self._count = total, count
        elif self._copied.query():  # also true of an event that was never recorded
            self._newest = float(self._value) / self._count
            self._value.copy_(total, non_blocking=True)
            self._copied.record()
            self._count = count

    def __call__(self) -> float:
        """The mean loss of a sample; NaN before the first one has arrived."""
        return self._newest if self._on_gpu else float(self._value) / self._count
