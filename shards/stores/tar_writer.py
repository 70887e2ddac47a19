"""Write tar shards, each with the index that DALI's `wds2idx` would write."""

from __future__ import annotations

import hashlib
import os
import tarfile
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from isal import isal_zlib

from shards.atomic import write_file
from shards.manifest import RawFile, Shard
from shards.stores.base import Block, SplitWriter, WrittenShard, shard_name
from shards.stores.record_index import index_content, index_line, index_name
from shards.stores.sample_arrays import BLOCK_DTYPE, Numbers, PixelSums, numbers_crc32
from shards.stores.tar_members import BLOCK, Member

_END_OF_ARCHIVE = bytes(2 * BLOCK)


class TarRecord(NamedTuple):
    """Members of a tar file with a common key.

    Attributes:
        key: Common start of the members' names.
        components: For each member the end of its name after the key, and the pieces of its content. The last piece of
            the first member is the pixels of a block, or an image file.
        labels: The labels of its samples.
        rows: Their rows.
    """

    key: str
    components: Sequence[tuple[str, Sequence[bytes | memoryview]]]
    labels: Numbers
    rows: Numbers


class TarShardWriter(SplitWriter):
    """Writes tar shards."""

    @abstractmethod
    def records(self, block: Block) -> Iterable[TarRecord]:
        """Return the records of a block."""

    def write_shard(self, number: int, blocks: Iterable[Block]) -> WrittenShard:
        path = self.directory / shard_name(number)
        sha256 = hashlib.sha256()
        lines: list[str] = []
        entries: list[tuple[int, int, int, int]] = []
        sums = PixelSums()
        path.unlink(missing_ok=True)  # a process of a killed call may still write to it
        with open(path, "wb") as file:
            for block in blocks:
                if isinstance(block.images, np.ndarray):
                    sums.add(block.first, block.images)
                for record in self.records(block):
                    members = {}
                    for component, content in record.components:
                        info = tarfile.TarInfo(f"{record.key}.{component}")
                        info.size = sum(map(len, content))
                        info.mode = 0o444
                        members[component] = Member(info.name, file.tell() + BLOCK, info.size)
                        for piece in (info.tobuf(tarfile.USTAR_FORMAT), *content, bytes(-info.size % BLOCK)):
                            sha256.update(piece)
                            file.write(piece)
                    lines.append(index_line(members))
                    (first, (*_, images)), *_ = record.components
                    start = members[first].offset + members[first].size - len(images)
                    checksums = isal_zlib.crc32(images), numbers_crc32(record.labels, record.rows)
                    entries.append((start, len(images), *checksums))
            sha256.update(_END_OF_ARCHIVE)
            file.write(_END_OF_ARCHIVE)
            file.flush()
            os.fsync(file.fileno())
            size = file.tell()
        samples = len(self.layout.samples_of(number))
        shard = Shard(name=path.name, samples=samples, bytes=size, sha256=sha256.hexdigest())
        index = index_content(lines)
        write_file(path.with_suffix(".idx"), index)
        files = (RawFile.of_content(index_name(shard), index),)
        return WrittenShard(shard, files, np.array(entries, BLOCK_DTYPE), sums.total)
