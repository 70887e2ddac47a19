"""Memory for batches that is used again once nobody holds the batch any more."""

from __future__ import annotations

import sys

import numpy as np
import torch
from numpy.typing import NDArray


class Buffers:
    """Arrays and tensors of changing shapes out of a few lasting buffers.

    A new buffer of a megabyte costs more than filling it: the system gives it page by page, and zeroes each. A buffer
    is given again only when nothing refers to the array or tensor made of it (or to a view of that), so a batch may be
    kept as long as one likes.
    """

    def __init__(self) -> None:
        self._buffers: list[NDArray[np.uint8]] = []

    def array(self, shape: tuple[int, ...], dtype: type = np.uint8) -> NDArray:
        """An uninitialised array of this shape."""
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        buffer = _first_free(self._buffers, size)
        if buffer is None:
            # Those that are too small are of no use any more: batches of an epoch have one size, but for the last.
            self._buffers = [old for old in self._buffers if len(old) >= size]
            buffer = np.empty(size, np.uint8)
            self._buffers.append(buffer)
        return buffer[:size].view(dtype).reshape(shape)

    def tensor(self, shape: tuple[int, ...]) -> torch.Tensor:
        """An uninitialised float32 tensor of this shape, on the CPU."""
        return torch.from_numpy(self.array(shape, np.float32))


def _first_free(buffers: list[NDArray[np.uint8]], size: int) -> NDArray[np.uint8] | None:
    """The first buffer of at least `size` bytes to which only this list refers."""
    for buffer in buffers:
        if len(buffer) >= size and sys.getrefcount(buffer) == _references_if_free():
            return buffer
    return None


def _references_if_free() -> int:
    """What `sys.getrefcount` says of an object in a list, asked from a loop over it; Pythons differ in this."""
    for item in [object()]:
        return sys.getrefcount(item)
    raise AssertionError
