"""Scalars of the device, read without waiting for the device."""

from __future__ import annotations

import math

import torch


class AsyncScalar:
    """The newest mean loss that has been copied to the host.

    On a GPU, reading a value directly waits for all queued work. The value is copied asynchronously to pinned memory,
    and read once an event reports that the copy is complete; values updated before that are skipped. On a CPU the
    value is read when it is requested.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._newest = math.nan
        self._count = 1
        self._value = torch.zeros((), pin_memory=self._on_gpu)
        self._copied = torch.cuda.Event() if self._on_gpu else None

    def update(self, total: torch.Tensor, count: int) -> None:
        """Start to copy a value.

        Args:
            total: Scalar on the device, the loss summed over the samples.
            count: Number of samples.
        """
        if self._copied is None:
            self._value, self._count = total, count
        elif self._copied.query():  # also true for an event that was never recorded
            self._newest = float(self._value) / self._count
            self._value.copy_(total, non_blocking=True)
            self._copied.record()
            self._count = count

    def __call__(self) -> float:
        """Return the mean loss per sample; NaN before the first copy is complete."""
        return self._newest if self._on_gpu else float(self._value) / self._count
