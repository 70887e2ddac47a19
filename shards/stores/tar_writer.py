"""Write tar shards, each with the index that DALI's `wds2idx` would write."""

from __future__ import annotations

import hashlib
import os
import tarfile
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from shards.atomic import write_file
from shards.manifest import RawFile, Shard
from shards.stores.record_index import index_content, index_file, index_line
from shards.stores.tar_members import BLOCK, Member

_END_OF_ARCHIVE = bytes(2 * BLOCK)


class TarRecord(NamedTuple):
    """Members of a tar file with a common key.

    Attributes:
        key: Common start of the members' names.
        samples: Number of samples in the record.
        components: For each member the end of its name after the key, and the pieces of its content.
    """

    key: str
    samples: int
    components: Sequence[tuple[str, Sequence[bytes | memoryview]]]


def write_tar_shard(path: Path, records: Iterable[TarRecord], with_crc: bool) -> tuple[Shard, RawFile]:
    """Write a shard and its index.

    Args:
        path: The shard to write; the index gets the suffix `.idx`.
        records: Records in order.
        with_crc: Whether the manifest's entry has a CRC-32 of the bytes of each record.

    Returns:
        The manifest's entries of the shard and of the index.
    """
    sha256 = hashlib.sha256()
    lines, crcs, samples = [], [], 0
    with open(path, "wb") as file:
        for record in records:
            crc = 0
            members = {}
            for component, content in record.components:
                info = tarfile.TarInfo(f"{record.key}.{component}")
                info.size = sum(map(len, content))
                info.mode = 0o444
                members[component] = Member(info.name, file.tell() + BLOCK, info.size)
                for piece in (info.tobuf(tarfile.USTAR_FORMAT), *content, bytes(-info.size % BLOCK)):
                    crc = zlib.crc32(piece, crc) if with_crc else 0
                    sha256.update(piece)
                    file.write(piece)
            lines.append(index_line(members))
            crcs.append(crc)
            samples += record.samples
        sha256.update(_END_OF_ARCHIVE)
        file.write(_END_OF_ARCHIVE)
        file.flush()
        os.fsync(file.fileno())
        size = file.tell()
    crcs = crcs if with_crc else []
    shard = Shard(name=path.name, samples=samples, bytes=size, sha256=sha256.hexdigest(), blocks_crc32=tuple(crcs))
    index = index_content(lines)
    write_file(path.with_suffix(".idx"), index)
    return shard, index_file(shard, index)
