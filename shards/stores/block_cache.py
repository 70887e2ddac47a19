"""In-memory cache of blocks, for stores that cannot be memory-mapped: compressed, or larger than the memory."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from functools import partial
from types import MethodType
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from shards.errors import UserError
from shards.manifest import Manifest
from shards.stores.base import ImageTable, check_positions
from shards.stores.split_files import ForkLock

DEFAULT_BYTES = 1 << 30  # of images that are held by default if not all can be
LoadBlocks: TypeAlias = Callable[[NDArray[np.int64], list[NDArray[np.uint8]]], None]


class BlockCache:
    """Cache of decoded blocks in one buffer, with first-in first-out eviction.

    Args:
        manifest: Manifest of the split.
        load: Called with block numbers int64 [k] and k buffers uint8 [samples of the block, H * W * C]; fills each. The
            object of a bound method is not kept: it may hold this cache, and in a reference cycle its memory would not
            be freed before a garbage collection.
        memory: Maximum bytes of images to hold, None for all. The buffer is reserved at once, but its pages are
            allocated only as blocks are loaded.

    Raises:
        UserError: If `memory` is less than one block, or more than the machine has.
    """

    def __init__(self, manifest: Manifest, load: LoadBlocks, memory: int | None) -> None:
        self._load = partial(load.__func__, weakref.proxy(load.__self__)) if isinstance(load, MethodType) else load
        self._samples = manifest.samples
        self._block_size = min(manifest.block_size, manifest.samples)
        self._image_shape = manifest.pixel_shape
        self._image_bytes = manifest.image_bytes
        blocks = -(-manifest.samples // self._block_size)
        block_bytes = self._block_size * self._image_bytes
        self.slots = blocks if memory is None else min(blocks, memory // block_bytes)
        if self.slots < 1:
            raise UserError(
                found=f"{memory:,} bytes of memory for blocks of {block_bytes:,} bytes",
                expected="room for at least one block",
                hint="raise loader.cache_gb",
            )
        try:
            self._buffer = np.empty((self.slots * self._block_size, self._image_bytes), np.uint8)
        except (MemoryError, ValueError, OverflowError):
            raise UserError(
                found=f"{self.slots * block_bytes:,} bytes of images, more than the memory of this machine",
                expected="images that fit into memory, or a limit on the cached bytes",
                hint="set loader.cache_gb",
            ) from None
        self._slot_of_block = np.full(blocks, -1, np.int64)
        self._block_in_slot = np.full(self.slots, -1, np.int64)
        self._load_of_slot = np.zeros(self.slots, np.int64)  # load counter when each slot was filled, for FIFO eviction
        self._loads = 0
        # A training and a validation loader may share the store. A block is entered in `_slot_of_block`
        # after it is loaded, so a process forked during the load loads it again.
        self._lock = ForkLock()

    def gather(self, samples: NDArray[np.int64], out: NDArray[np.uint8]) -> None:
        """Copy images into a buffer; see `shards.stores.base.ImageStore.gather`."""
        check_positions(samples, self._samples)
        assert out.flags.c_contiguous and out.shape == (len(samples), *self._image_shape)
        flat = out.reshape(len(samples), self._image_bytes)
        blocks, offsets = np.divmod(samples, self._block_size)
        with self._lock:
            slots = self._slot_of_block[blocks]
            if len(slots) and slots.min() < 0:
                # Cached blocks first: loading the others would evict them.
                for some in self._groups(blocks):
                    self._load_missing(np.unique(blocks[some]))
                    flat[some] = self._buffer[self._slot_of_block[blocks[some]] * self._block_size + offsets[some]]
                return
            # NumPy writes directly into `out` only with mode `clip`. All indices are in range.
            np.take(self._buffer, slots * self._block_size + offsets, axis=0, out=flat, mode="clip")

    def locate(self, samples: NDArray[np.int64]) -> ImageTable | None:
        """Return the images in the buffer if all blocks fit into it, else None; see `ImageStore.locate`."""
        check_positions(samples, self._samples)
        if self.slots < len(self._slot_of_block):
            return None
        blocks, offsets = np.divmod(samples, self._block_size)
        with self._lock:
            slots = self._slot_of_block[blocks]
            if len(slots) and slots.min() < 0:
                self._load_missing(np.unique(blocks))
                slots = self._slot_of_block[blocks]
            return ImageTable(self._buffer, slots * self._block_size + offsets)

    def _groups(self, blocks: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
        """Yield all indices into `blocks`, in groups with at most as many different blocks as there are slots."""
        needed, inverse = np.unique(blocks, return_inverse=True)
        order = np.argsort(self._slot_of_block[needed] < 0, kind="stable")
        group_of_block = np.empty(len(needed), np.int64)
        group_of_block[order] = np.arange(len(needed)) // self.slots
        for number in range(-(-len(needed) // self.slots)):
            yield np.flatnonzero(group_of_block[inverse] == number)

    def _load_missing(self, needed: NDArray[np.int64]) -> None:
        """Load the blocks that are not cached. `needed` has at most as many blocks as there are slots.

        First-in first-out eviction suits a sampler with a sliding window of blocks: a block is needed for the length
        of the window after it was loaded, even if it is not used for a long time in between.
        """
        present = self._slot_of_block[needed]
        missing = needed[present < 0]
        if not len(missing):
            return
        age = self._load_of_slot.copy()
        age[present[present >= 0]] = np.iinfo(np.int64).max
        slots = np.argpartition(age, len(missing) - 1)[: len(missing)]
        evicted = self._block_in_slot[slots]
        self._slot_of_block[evicted[evicted >= 0]] = -1
        self._block_in_slot[slots] = -1
        self._load_of_slot[slots] = 0
        self._load(missing, [self._slot(slot, block) for slot, block in zip(slots, missing, strict=True)])
        self._loads += 1
        self._load_of_slot[slots] = self._loads
        self._block_in_slot[slots] = missing
        self._slot_of_block[missing] = slots

    def _slot(self, slot: int, block: int) -> NDArray[np.uint8]:
        count = min(self._block_size, self._samples - block * self._block_size)
        start = slot * self._block_size
        return self._buffer[start : start + count]
