"""Where the images of a batch come from: memory of a CPU, pinned memory that is copied to a GPU, or the GPU itself."""

from __future__ import annotations

import math
import warnings
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.common.buffer_pool import BufferPool
from pipeline.common.device import free_memory
from shards.stores.base import Images, ImageStore, ImageTable, Store, is_image_store

Loaded: TypeAlias = tuple[Images | torch.Tensor, dict[str, torch.Tensor]]

_ALIGNMENT = 64  # bytes, of the arrays in a block
_BLOCKS = 3  # pinned: one is filled while others are copied
_UPLOAD_BYTES = 32 << 20  # images copied at a time to a device that keeps all


class HostSource:
    """Gathers images in memory; the device is a CPU."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._buffers = BufferPool(torch.device("cpu"))
        self._table: tuple[NDArray[np.uint8], torch.Tensor] | None = None

    def load(self, samples: NDArray[np.int64], arrays: Mapping[str, NDArray]) -> Loaded:
        """Load a batch.

        Args:
            samples: int64 [n], positions in the store.
            arrays: Further arrays of the batch.

        Returns:
            The images, uint8 [n, H, W, C], or a list of n image files; and the arrays as tensors.
        """
        store = self._store
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        if not is_image_store(store):
            return store.read(samples), tensors
        images = self._buffers.array((len(samples), *store.manifest.pixel_shape))
        located = store.locate(samples)
        if located is None:
            store.gather(samples, images)
        else:
            # index_select copies on all cores, and each core then has its images in its cache.
            table, rows = self._as_tensor(located.table), torch.from_numpy(located.rows)
            torch.index_select(table, 0, rows, out=torch.from_numpy(images).view(len(rows), -1))
        return torch.from_numpy(images), tensors

    def _as_tensor(self, table: NDArray[np.uint8]) -> torch.Tensor:
        if self._table is None or self._table[0] is not table:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "The given NumPy array is not writable", UserWarning)
                self._table = table, torch.from_numpy(table)
        return self._table[1]


@dataclass(frozen=True, eq=False)
class ImagesOf:
    """The images of samples, to be gathered."""

    store: ImageStore
    samples: NDArray[np.int64]
    dtype: ClassVar[np.dtype] = np.dtype(np.uint8)

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.samples), *self.store.manifest.pixel_shape)


class PinnedRing:
    """Copies arrays to a device without waiting: those of a batch in one block of pinned memory, by one copy.

    A block is filled again when its copy has ended. On a CPU the memory is not pinned, and copies are complete.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pins = device.type == "cuda"
        self._blocks: deque[tuple[torch.Tensor, torch.cuda.Event | None]] = deque(
            (torch.empty(0, dtype=torch.uint8), torch.cuda.Event(blocking=True) if self._pins else None)
            for _ in range(_BLOCKS)
        )

    def send(self, arrays: Mapping[str, NDArray | ImagesOf]) -> dict[str, torch.Tensor]:
        """Return arrays on the device, in the order of torch's current stream; they share one storage."""
        places, end = {}, 0
        for name, array in arrays.items():
            start = -(-end // _ALIGNMENT) * _ALIGNMENT
            end = start + math.prod(array.shape) * array.dtype.itemsize
            places[name] = slice(start, end)
        block, copied = self._blocks[0]
        if copied is not None:
            copied.synchronize()
        if len(block) < end:
            block = torch.empty(end, dtype=torch.uint8, pin_memory=self._pins)
        memory, dtypes = block.numpy(), {}
        for name, array in arrays.items():
            host = memory[places[name]].view(array.dtype).reshape(array.shape)
            dtypes[name] = torch.from_numpy(host).dtype
            if isinstance(array, ImagesOf):
                array.store.gather(array.samples, host)  # by this thread: others would spin beside the one that trains
            else:
                host[...] = array
        sent = block[:end].to(self._device, non_blocking=True, copy=True)
        if copied is not None:
            copied.record(torch.cuda.current_stream(self._device))
        self._blocks[0] = block, copied
        self._blocks.rotate(-1)
        return {name: sent[places[name]].view(dtypes[name]).view(array.shape) for name, array in arrays.items()}


class ResidentStore(ImageStore):
    """A store whose images are on a device as well.

    Attributes:
        images: uint8 [N, H, W, C].
    """

    def __init__(self, store: ImageStore, images: torch.Tensor) -> None:
        self.manifest, self.labels, self.rows = store.manifest, store.labels, store.rows
        self.images = images
        self._store = store

    def locate(self, samples: NDArray[np.int64]) -> ImageTable | None:
        return self._store.locate(samples)

    def gather(self, samples: NDArray[np.int64], out: NDArray[np.uint8]) -> None:
        self._store.gather(samples, out)


class DeviceSource:
    """Copies the images of each batch to a GPU; those of a `ResidentStore` are there."""

    def __init__(self, store: Store, device: torch.device) -> None:
        self._store = store
        self._ring = PinnedRing(device)

    def load(self, samples: NDArray[np.int64], arrays: Mapping[str, NDArray]) -> Loaded:
        """Load a batch; see `HostSource.load`."""
        store = self._store
        if isinstance(store, ResidentStore):
            sent = self._ring.send({**arrays, "samples": samples})
            return store.images.index_select(0, sent.pop("samples")), sent
        if not is_image_store(store):
            return store.read(samples), self._ring.send(arrays)
        sent = self._ring.send({**arrays, "images": ImagesOf(store, samples)})
        return sent.pop("images"), sent


def make_source(store: Store, device: torch.device) -> HostSource | DeviceSource:
    """Return the source of a store's batches on a device."""
    on_cpu = device.type == "cpu" and not isinstance(store, ResidentStore)
    return HostSource(store) if on_cpu else DeviceSource(store, device)


def keep_on_device(store: Store, device: torch.device, max_fraction: float) -> Store:
    """Copy the images of a store to a GPU if they take at most this fraction of its free memory.

    Returns:
        A `ResidentStore`; the store itself if the images are too large or files, or the device is a CPU.
    """
    if not is_image_store(store) or len(store) * store.manifest.image_bytes > max_fraction * free_memory(device):
        return store
    images = torch.empty((len(store), *store.manifest.pixel_shape), dtype=torch.uint8, device=device)
    ring, count = PinnedRing(device), max(1, _UPLOAD_BYTES // store.manifest.image_bytes)
    for samples in np.split(np.arange(len(store)), range(count, len(store), count)):
        images[samples[0] : samples[-1] + 1] = ring.send({"images": ImagesOf(store, samples)})["images"]
    return ResidentStore(store, images)
