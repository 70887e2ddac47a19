"""Write tar shards, each with the index that DALI's `wds2idx` would write."""

from __future__ import annotations

import hashlib
import os
import tarfile
import zlib
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import NamedTuple

from shards.atomic import write_file
from shards.manifest import RawFile, Shard
from shards.stores.base import Block, SplitWriter, shard_name
from shards.stores.record_index import index_content, index_line, index_name
from shards.stores.tar_members import BLOCK, Member

_END_OF_ARCHIVE = bytes(2 * BLOCK)


class TarRecord(NamedTuple):
    """Members of a tar file with a common key.

    Attributes:
        key: Common start of the members' names.
        components: For each member the end of its name after the key, and the pieces of its content.
    """

    key: str
    components: Sequence[tuple[str, Sequence[bytes | memoryview]]]


class TarShardWriter(SplitWriter):
    """Writes tar shards."""

    with_crc: bool
    """Whether the manifest's entry of a shard has a CRC-32 of the bytes of each record."""

    @abstractmethod
    def records(self, block: Block) -> Iterable[TarRecord]:
        """Return the records of a block."""

    def write_shard(self, number: int, blocks: Iterable[Block]) -> tuple[Shard, tuple[RawFile, ...]]:
        path = self.directory / shard_name(number)
        sha256 = hashlib.sha256()
        lines, crcs = [], []
        with open(path, "wb") as file:
            for record in chain.from_iterable(map(self.records, blocks)):
                crc = 0
                members = {}
                for component, content in record.components:
                    info = tarfile.TarInfo(f"{record.key}.{component}")
                    info.size = sum(map(len, content))
                    info.mode = 0o444
                    members[component] = Member(info.name, file.tell() + BLOCK, info.size)
                    for piece in (info.tobuf(tarfile.USTAR_FORMAT), *content, bytes(-info.size % BLOCK)):
                        crc = zlib.crc32(piece, crc) if self.with_crc else 0
                        sha256.update(piece)
                        file.write(piece)
                lines.append(index_line(members))
                if self.with_crc:
                    crcs.append(crc)
            sha256.update(_END_OF_ARCHIVE)
            file.write(_END_OF_ARCHIVE)
            file.flush()
            os.fsync(file.fileno())
            size = file.tell()
        shard = Shard(
            name=path.name,
            samples=len(self.layout.samples_of(number)),
            bytes=size,
            sha256=sha256.hexdigest(),
            blocks_crc32=tuple(crcs),
        )
        index = index_content(lines)
        write_file(path.with_suffix(".idx"), index)
        return shard, (RawFile.of_content(index_name(shard), index),)
