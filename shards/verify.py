"""Check packed shards: re-count, re-hash and decode every block, and name what is wrong.

    python -m shards.verify DIR        DIR is a packed set (train and test) or one part of it

Exit status 0 if all is as it was packed, 2 otherwise. The decoding here is deliberately not the one that
training uses: `tarfile` and `numpy.load`, record by record.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from shards.errors import UserError, run_command
from shards.manifest import PARTS, Manifest, Shard
from shards.tar import COMPONENTS, INDEX_VERSION, block_key


def check_hashes(directory: Path, manifest: Manifest) -> Iterator[str]:
    """Compare size and SHA-256 of every shard with the manifest; yield a line for each that differs."""
    for shard in manifest.shards:
        path = directory / shard.name
        if not path.is_file():
            yield f"{path}: missing"
            continue
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if path.stat().st_size != shard.bytes:
            yield f"{path}: {path.stat().st_size:,} bytes, the manifest says {shard.bytes:,}"
        elif digest != shard.sha256:
            yield f"{path}: SHA-256 {digest[:16]}…, the manifest says {shard.sha256[:16]}…"


def check_part(directory: Path) -> tuple[Manifest, list[str]]:
    """Check one part fully. Returns its manifest and a line for each fault (none if it is whole)."""
    manifest = Manifest.read(directory)
    faults = list(check_hashes(directory, manifest))
    counts = np.zeros(len(manifest.classes), np.int64)
    rows = []
    first_block = 0
    for shard in manifest.shards:
        path = directory / shard.name
        if path.is_file():
            index_lines, block_faults = _check_blocks(path, shard, manifest, first_block, counts, rows)
            faults += block_faults + _check_index(path, shard, first_block, index_lines)
        first_block += len(shard.blocks_crc32)
    if not faults and counts.tolist() != list(manifest.counts):
        faults.append(f"{directory}: counts by class differ from the manifest")
    if not faults and len(np.unique(np.concatenate(rows))) != manifest.samples:
        faults.append(f"{directory}: a source row is packed twice")
    return manifest, faults


def _check_blocks(
    path: Path, shard: Shard, manifest: Manifest, first_block: int, counts: np.ndarray, rows: list[np.ndarray]
) -> tuple[list[str], list[str]]:
    """Decode a shard's blocks; returns the index line of each that could be found, and the faults."""
    faults = []
    index_lines = []
    content = path.read_bytes()
    end = 0
    remaining = shard.samples
    for number, crc in enumerate(shard.blocks_crc32, start=first_block):
        size = min(manifest.block_size, remaining)
        remaining -= size
        start = end
        try:
            members, end = _find_block(content, start, number)
        except (tarfile.TarError, ValueError) as error:
            # Without a readable header the places of the blocks behind it are unknown.
            faults.append(f"{path}: block {block_key(number)} cannot be read: {error}")
            break
        index_lines.append(
            " ".join(f"{name} {begin} {length} {block_key(number)}.{name}" for name, begin, length in members)
        )
        if zlib.crc32(content[start:end]) != crc:
            faults.append(f"{path}: block {block_key(number)} was changed (CRC-32 differs)")
            continue
        images, labels, source = (
            np.load(io.BytesIO(content[begin : begin + length]), allow_pickle=False) for _, begin, length in members
        )
        if images.shape != (size, *manifest.image_shape) or images.dtype != np.uint8:
            faults.append(f"{path}: block {block_key(number)}: images {images.dtype} {images.shape}")
        if labels.shape != (size,) or source.shape != (size,):
            faults.append(f"{path}: block {block_key(number)}: {len(labels)} labels, {len(source)} rows of {size}")
        elif labels.min() < 0 or labels.max() >= len(counts):
            faults.append(f"{path}: block {block_key(number)}: a label outside 0 .. {len(counts) - 1}")
        else:
            counts += np.bincount(labels, minlength=len(counts))
            rows.append(source)
    return index_lines, faults


def _find_block(content: bytes, start: int, number: int) -> tuple[list[tuple[str, int, int]], int]:
    """Name, first byte and length of each component of the block at a byte of a shard, and where the block ends."""
    members = []
    for component in COMPONENTS:
        member = tarfile.TarInfo.frombuf(content[start : start + tarfile.BLOCKSIZE], "utf-8", "strict")
        if member.name != f"{block_key(number)}.{component}":
            raise ValueError(f"found {member.name!r} where {block_key(number)}.{component} should be")
        begin = start + tarfile.BLOCKSIZE
        members.append((component, begin, member.size))
        start = begin + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
        if start > len(content):
            raise ValueError("the shard ends inside it")
    return members, start


def _check_index(path: Path, shard: Shard, first_block: int, expected: list[str]) -> list[str]:
    """Compare the index byte for byte with the lines that the blocks ask for (of those that could be read)."""
    index = path.with_suffix(".idx")
    if not index.is_file():
        return [f"{index}: missing"]
    blocks = len(shard.blocks_crc32)
    first, *lines = index.read_bytes().decode(errors="replace").split("\n")
    if first != f"{INDEX_VERSION} {blocks}" or len(lines) != blocks + 1 or lines[-1]:
        return [f"{index}: not an {INDEX_VERSION} index of {blocks} blocks"]
    return [
        f"{index}: block {block_key(number)} lies elsewhere in {path.name}"
        for number, (line, wanted) in enumerate(zip(lines, expected, strict=False), start=first_block)
        if line != wanted
    ]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m shards.verify", description=__doc__.split("\n")[0])
    parser.add_argument("directory", type=Path, metavar="DIR", help="a packed set (train and test), or one part")
    directory = parser.parse_args().directory
    parts = [directory / part for part in PARTS] if any((directory / part).is_dir() for part in PARTS) else [directory]
    all_faults = []
    for part in parts:
        manifest, faults = check_part(part)
        all_faults += faults
        print(
            f"{'damaged' if faults else 'whole  '}  {part}: {manifest.samples:,} samples of "
            f"{len(manifest.classes)} classes in {len(manifest.shards)} shards, {manifest.packed_bytes:,} bytes"
        )
    if all_faults:
        raise UserError(
            found="\n           ".join(all_faults),
            expected="every byte as the manifest tells",
            hint="pack again: python -m pipeline.shard SOURCE --out DIR --force",
        )
    return 0


if __name__ == "__main__":
    run_command(main)
