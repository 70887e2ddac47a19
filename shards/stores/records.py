"""Records of one picture each, an ordinary WebDataset: for pictures of differing sizes, and for shards of others."""

from __future__ import annotations

import itertools
import mmap
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from shards.errors import damaged
from shards.manifest import Manifest, RawFile, Shard
from shards.stores.base import Block, Layout, block_key, check_positions, shard_name
from shards.stores.image_header import EXTENSIONS
from shards.stores.record_index import (
    ROW,
    NotANumber,
    index_name,
    name_in_index,
    read_numbers,
    read_places,
)
from shards.stores.tar_writer import TarRecord, write_tar_shard

_OPENERS = 8  # shards opened side by side: where nothing is cached yet, each waits for many small reads
_FAR_APART = 64 << 10  # bytes of a record from which reading ahead costs more than it saves


class RecordWriter:
    """The `shards.stores.base.SplitWriter` of records: each is a picture file as it is, its label and its row."""

    def __init__(self, directory: Path, layout: Layout) -> None:
        self._directory = directory

    def start(self) -> tuple[RawFile, ...]:
        return ()

    def write_shard(self, number: int, blocks: Iterable[Block]) -> tuple[Shard, tuple[RawFile, ...]]:
        shard, index = write_tar_shard(self._directory / shard_name(number), _records(blocks), with_crc=False)
        return shard, (index,)


def _records(blocks: Iterable[Block]) -> Iterator[TarRecord]:
    for block in blocks:
        for position, (image, label, row) in enumerate(
            zip(block.images, block.labels, block.rows, strict=True), start=block.first
        ):
            assert not isinstance(image, np.ndarray) and image.extension in EXTENSIONS
            components = ((image.extension, [image.content]), ("cls", [b"%d" % label]), (ROW, [b"%d" % row]))
            yield TarRecord(block_key(position), 1, components)


class _OpenShard(NamedTuple):
    """int64 [n, 2] byte offsets and sizes of the pictures, int64 [n] labels, and rows if they are in it."""

    pictures: NDArray[np.int64]
    labels: NDArray[np.int64]
    rows: NDArray[np.int64] | None


class RecordStore:
    """The `Store` over records: labels and rows are read at once, pictures when they are asked for.

    Pictures are read, not mapped, so that the memory of the process does not grow with what it has touched.
    """

    def __init__(self, directory: Path, manifest: Manifest) -> None:
        self.manifest = manifest
        self._paths = [directory / shard.name for shard in manifest.shards]
        self._index_bytes = {file.name: file.bytes for file in manifest.files}
        with ThreadPoolExecutor(_OPENERS) as pool:
            shards = list(pool.map(self._open, range(len(self._paths))))
        self._starts = np.cumsum([0, *(shard.samples for shard in manifest.shards)])
        self._places = np.concatenate([shard.pictures for shard in shards])
        self.labels = np.concatenate([shard.labels for shard in shards])
        rows = [shard.rows for shard in shards if shard.rows is not None]
        if rows and len(rows) < len(shards):
            raise damaged(directory, "shards with rows and shards without")
        self.rows = np.concatenate(rows) if rows else np.arange(manifest.samples)

    def __len__(self) -> int:
        return self.manifest.samples

    def read(self, samples: NDArray[np.int64]) -> list[NDArray[np.uint8]]:
        """Picture files, each uint8 [bytes], not writable; see `shards.stores.base.Store.read`."""
        check_positions(samples, len(self))
        shards = self._shards_of(samples).tolist()
        places = self._places[samples].tolist()
        pictures: list[NDArray[np.uint8]] = [np.empty(0, np.uint8)] * len(samples)
        in_order = np.argsort(samples, kind="stable").tolist()
        # Opened anew for each batch: there may be more shards than a process may hold open.
        for number, positions in itertools.groupby(in_order, key=shards.__getitem__):
            with _opened(self._paths[number]) as file:
                for position in positions:
                    offset, size = places[position]
                    file.seek(offset)
                    content = file.read(size)
                    if len(content) != size:
                        raise damaged(self.describe_sample(int(samples[position])), "its shard ends inside it")
                    pictures[position] = np.frombuffer(content, np.uint8)
        return pictures

    def describe_sample(self, sample: int) -> str:
        """The shard of a sample and its picture's name there, for messages."""
        number = int(self._shards_of(np.array([sample]))[0])
        return self._place(number, sample - int(self._starts[number]))

    def _shards_of(self, samples: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.searchsorted(self._starts, samples, side="right") - 1

    def _place(self, number: int, record: int) -> str:
        return f"{self._paths[number]}: {name_in_index(self._read_index(number), record)}"

    def _read_index(self, number: int) -> bytes:
        path = self._paths[number].with_suffix(".idx")
        name = index_name(self.manifest.shards[number])
        with _opened(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size != self._index_bytes.get(name):
                raise damaged(path, f"{size:,} bytes where the manifest says {self._index_bytes.get(name, 0):,}")
            return file.read(size)

    def _open(self, number: int) -> _OpenShard:
        path, shard = self._paths[number], self.manifest.shards[number]
        with _opened(path) as file:
            size = os.fstat(file.fileno()).st_size
        if size != shard.bytes:
            raise damaged(path, f"{size:,} bytes where the manifest says {shard.bytes:,}")
        try:
            places = read_places(self._read_index(number))
            places.check_within(size)
            if len(places.pictures) != shard.samples:
                raise ValueError(f"{len(places.pictures):,} records where the manifest says {shard.samples:,}")
        except ValueError as error:
            raise damaged(path.with_suffix(".idx"), f"no index that fits the shard: {error}") from None
        data = _map(path, far_apart=size // shard.samples > _FAR_APART)
        try:
            labels = read_numbers(data, places.labels)
            rows = None if places.rows is None else read_numbers(data, places.rows)
        except NotANumber as fault:
            raise damaged(self._place(number, fault.record), f"{fault.text!r} for a label or row") from None
        outside = np.flatnonzero(labels >= len(self.manifest.classes))
        if len(outside):
            fault = f"label {labels[outside[0]]} outside 0 .. {len(self.manifest.classes) - 1}"
            raise damaged(self._place(number, int(outside[0])), fault)
        return _OpenShard(places.pictures, labels, rows)


def _map(path: Path, far_apart: bool) -> NDArray[np.uint8]:
    """A file's bytes, until the array is let go of. far_apart: what will be looked at lies far apart."""
    with open(path, "rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    if far_apart and hasattr(mmap, "MADV_RANDOM"):
        mapped.madvise(mmap.MADV_RANDOM)  # or the system reads much more than that
    return np.frombuffer(mapped, np.uint8)


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    try:
        with open(path, "rb", buffering=0) as file:
            yield file
    except FileNotFoundError:
        raise damaged(path, "no such file, though it belongs to the pack") from None
