"""Packs of format version 2, as they were written before the arrays of version 3."""

from __future__ import annotations

import json
import tarfile
import zlib
from pathlib import Path

import numpy as np

from shards.manifest import ARRAYS, MANIFEST_NAME


def downgrade(pack: Path) -> Path:
    """Turn a pack, or a split, into one of version 2: the same shards, checksums in the manifest, and no arrays."""
    for path in pack.rglob(MANIFEST_NAME):
        fields = json.loads(path.read_text())
        del fields["statistics"], fields["sha256"]
        first = 0
        crcs = np.load(path.parent / "blocks.npy")["crc32"].tolist()
        for shard in fields["shards"]:
            if fields["store"] == "tar":
                shard["blocks_crc32"] = _record_checksums(path.parent / shard["name"])
            elif fields["store"] == "zarr":
                blocks = -(-shard["samples"] // fields["block_size"])
                shard["blocks_crc32"] = crcs[first : first + blocks]
                first += blocks
            else:
                shard["blocks_crc32"] = []
        fields["files"] = [file for file in fields["files"] if file["name"] not in ARRAYS]
        content = json.dumps({**fields, "version": 2}, indent=1, ensure_ascii=False) + "\n"
        path.write_text(content, encoding="utf-8")
        for name in ARRAYS:
            (path.parent / name).unlink()
    return pack


def _record_checksums(shard: Path) -> list[int]:
    """CRC-32 of each three consecutive members, with headers and padding."""
    content = shard.read_bytes()
    with tarfile.open(shard) as tar:
        members = tar.getmembers()
    starts = [member.offset for member in members[::3]]
    end = members[-1].offset_data + -(-members[-1].size // 512) * 512
    return [zlib.crc32(content[start:stop]) for start, stop in zip(starts, [*starts[1:], end], strict=True)]
