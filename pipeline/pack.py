"""Pack the parts of a raw data set into a packed set: permuted once, block records, all or nothing."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import numpy as np
from tqdm import tqdm

from pipeline.order import PACKING_STREAM, permutation
from pipeline.sources import RawPart
from shards.atomic import replace_directory, staging_directory
from shards.errors import UserError
from shards.manifest import PARTS, Manifest, Shard, is_packed_set
from shards.tar import ShardWriter

SHARD_BYTES = 32 << 20  # pixels of one shard: large enough to stream, small enough to fetch again
DEFAULT_BLOCK_SIZE = 512  # the smallest power of two at which 28x28 images cost less than 1.03 times their pixels


def find_pack(out: Path, dataset: str, split: str, block_size: int, seed: int) -> tuple[Manifest, ...] | None:
    """The manifests of the complete pack at `out`, None if there is none.

    Raises `UserError` if what stands there is another pack than the one asked for, or no pack at all.
    """
    check_is_ours(out)
    if not is_packed_set(out):
        return None
    manifests = tuple(Manifest.read(out / part) for part in PARTS)
    asked = {"data set": dataset, "split": split, "block size": block_size, "seed": seed}
    for manifest in manifests:
        there = (manifest.dataset, manifest.split, manifest.block_size, manifest.seed)
        for (what, wanted), found in zip(asked.items(), there, strict=True):
            if wanted != found:
                raise UserError(
                    found=f"{out}, packed with {what} {found!r}",
                    expected=f"{what} {wanted!r}, as asked",
                    hint="add --force to replace it, or choose another --out",
                )
    return manifests


def check_is_ours(out: Path) -> None:
    """Raise `UserError` if something stands at `out` that no packer wrote, which is never replaced."""
    if is_packed_set(out) or not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    raise UserError(
        found=f"{out}, which exists and is not a complete pack",
        expected="a new or empty directory, or a complete pack",
        hint="choose another --out, or remove it if nothing in it is needed",
    )


def needs_recovery(out: Path) -> bool:
    """Whether a killed writer left something beside `out` that the next pack has to clean up."""
    return staging_directory(out).exists()


def pack(
    load: Callable[[], tuple[RawPart, ...]],
    out: Path,
    *,
    dataset: str,
    split: str = "",
    block_size: int = DEFAULT_BLOCK_SIZE,
    seed: int = 0,
    force: bool = False,
) -> tuple[tuple[Manifest, ...], bool]:
    """Pack a data set into `out`, or leave a complete pack of the same settings alone.

    load: reads the raw parts; called only if they are needed.
    Returns the manifests and whether they were packed now. The directory appears whole, by a rename; killed at any
    moment, this leaves what was there before, and the next call cleans up.
    """
    if not force and not needs_recovery(out):
        found = find_pack(out, dataset, split, block_size, seed)
        if found:
            return found, False
    check_is_ours(out)
    with replace_directory(out) as replacement:
        if not force and (found := find_pack(out, dataset, split, block_size, seed)):
            return found, False
        parts = load()
        manifests = []
        for part in parts:
            directory = replacement.path / part.name
            directory.mkdir()
            manifests.append(_pack_part(part, directory, dataset, split, block_size, seed))
        # Manifests last: where one stands, its part is complete.
        for manifest in manifests:
            manifest.write(replacement.path / manifest.part)
        replacement.commit()
    return tuple(manifests), True


def _pack_part(part: RawPart, directory: Path, dataset: str, split: str, block_size: int, seed: int) -> Manifest:
    rows = permutation(len(part.labels), seed, PACKING_STREAM + PARTS.index(part.name))
    image_bytes = int(np.prod(part.image_shape))
    blocks_per_shard = max(1, SHARD_BYTES // (block_size * image_bytes))
    shard_size = blocks_per_shard * block_size
    bar = tqdm(total=len(rows), desc=f"packing {part.name}", unit=" images", unit_scale=True, disable=None)

    def write_shard(number: int) -> Shard:
        first_block = number * blocks_per_shard
        mine = rows[number * shard_size : (number + 1) * shard_size]
        with ShardWriter(directory, number) as writer:
            for block, start in enumerate(range(0, len(mine), block_size), start=first_block):
                block_rows = mine[start : start + block_size]
                writer.add(block, part.read(block_rows), part.labels[block_rows], block_rows)
                bar.update(len(block_rows))
        return writer.entry

    # A shard's content depends on its number alone, so they may be written side by side.
    with bar, ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        shards = tuple(pool.map(write_shard, range(-(-len(rows) // shard_size))))
    counts = np.bincount(part.labels, minlength=len(part.classes))
    return Manifest(
        dataset=dataset,
        split=split,
        part=part.name,
        classes=part.classes,
        counts=tuple(counts.tolist()),
        image_shape=part.image_shape,
        transposed=part.transposed,
        samples=len(rows),
        block_size=block_size,
        seed=seed,
        shards=shards,
        raw=part.files,
        versions={"inkstream": version("inkstream"), "numpy": np.__version__, "python": platform.python_version()},
    )
