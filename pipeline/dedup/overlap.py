"""Tell which images of one packed set are in another, and write the set without them.

    python -m pipeline.dedup.overlap A B                    how many images of each part of A are in each part of B
    python -m pipeline.dedup.overlap A B --csv FILE         a line for each of them
    python -m pipeline.dedup.overlap A B --near             also near-duplicates, which are changed a little
    python -m pipeline.dedup.overlap A B --remove OUT       write A without what B is judged by

Before a model is trained on A and then fine-tuned on B, what of B's test and val parts lies in A's train and val parts
has to go: `--remove` leaves those images out (A's own test part stays whole, as nothing is learned from it). Images
are the same if their upright pixels are, byte for byte.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.dedup.between_splits import Overlap, remove_duplicates, write_report
from pipeline.dedup.near_duplicates import find_identical, find_near_duplicates
from pipeline.dedup.perceptual_hash import digests_of_arrays
from pipeline.packing.pack import pack
from pipeline.packing.repack import packed_splits
from pipeline.readers.raw_split import RawSplit
from shards.atomic import check_writable
from shards.cli import program_name, run_command
from shards.errors import UserError
from shards.manifest import REQUIRED_SPLITS, VALIDATION, Manifest
from shards.remote.sets import resolve_dataset

_JUDGED_BY = (REQUIRED_SPLITS[1], VALIDATION)
_LEARNED_FROM = (REQUIRED_SPLITS[0], VALIDATION)
_READ_BATCH = 8192  # images


def find_overlaps(ours: tuple[RawSplit, ...], theirs: tuple[RawSplit, ...], near: bool = False) -> tuple[Overlap, ...]:
    """What of each split of one set is in each split of another. A pure function of the images.

    Args:
        ours: splits of the set whose images are counted.
        theirs: splits of the other set.
        near: also find near-duplicates; otherwise only images that are equal in all pixels.
    """
    pairs = [(part, other) for part in ours for other in theirs]
    if near:
        return tuple(Overlap.of(part, other, find_near_duplicates(part, other)) for part, other in pairs)
    known = [{part.name: image_digests(part) for part in parts} for parts in (ours, theirs)]
    return tuple(
        Overlap.of(part, other, find_identical(known[0][part.name], known[1][other.name])) for part, other in pairs
    )


def image_digests(part: RawSplit) -> NDArray[np.uint64]:
    """Digests uint64 [N] of the upright images of a split."""
    starts = range(0, len(part.source_index), _READ_BATCH)
    images = (part.read(part.source_index[start : start + _READ_BATCH]) for start in starts)
    return np.concatenate([digests_of_arrays(some, part.transposed) for some in images])


def without(ours: tuple[RawSplit, ...], found: Sequence[Overlap]) -> tuple[tuple[RawSplit, ...], int]:
    """The parts of a set without what they share with the judging parts of the other, and how many images that is."""
    left_out = [one for one in found if one.split in _LEARNED_FROM and one.other_split in _JUDGED_BY]
    kept = remove_duplicates(ours, left_out)
    return kept, sum(len(part.source_index) for part in ours) - sum(len(part.source_index) for part in kept)


def _pack_again(
    directory: Path, other: Path, parts: tuple[RawSplit, ...], out: Path | str, near: bool, force: bool
) -> None:
    first = Manifest.read(directory / REQUIRED_SPLITS[0])
    pack(
        lambda: parts,
        out,
        dataset=first.dataset,
        variant=first.variant,
        block_size=first.block_size,
        seed=first.seed,
        store=first.store,
        options={
            "packed_from": _identity(directory),
            "without": f"{Manifest.read(other / REQUIRED_SPLITS[1]).name} {_identity(other)}",
            "near": int(near),
        },
        force=force,
    )


def _identity(directory: Path) -> str:
    """Stands for the content of a packed set."""
    return "-".join(Manifest.read(directory / part).digest()[:12] for part in REQUIRED_SPLITS)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog=program_name("pipeline.dedup.overlap"),
        description="Tell which images of a packed set are in another, and write the set without them.",
    )
    add = parser.add_argument
    add("set", metavar="A", help="packed set, or its address")
    add("other", metavar="B", help="packed set that A is compared with, or its address")
    add("--near", action="store_true", help="also near-duplicates: images that are changed a little")
    add("--csv", type=Path, metavar="FILE", help="write a line for each image")
    add("--remove", metavar="OUT", help="write A without what of B's test and val parts is in its train and val parts")
    add("--force", action="store_true", help="replace a complete pack at OUT")
    arguments = parser.parse_args()
    if arguments.csv:
        check_writable(arguments.csv)
    directory, other = resolve_dataset(arguments.set), resolve_dataset(arguments.other)
    ours, theirs = packed_splits(directory), packed_splits(other)
    sizes = [parts[0].image_shape for parts in (ours, theirs)]
    if sizes[0] != sizes[1] and not arguments.near:
        raise UserError(
            found=f"images of shape {list(sizes[0])} in {arguments.set}, {list(sizes[1])} in {arguments.other}",
            expected="images of one shape, as others are never equal",
            hint="--near finds those that are alike whatever their size",
        )
    found = find_overlaps(ours, theirs, arguments.near)
    print(f"{Manifest.read(directory / REQUIRED_SPLITS[0]).name} in {Manifest.read(other / REQUIRED_SPLITS[0]).name}:")
    for one in found:
        print(f"  {one}")
    if arguments.csv:
        write_report(found, arguments.csv)
    if arguments.remove:
        kept, count = without(ours, found)
        _pack_again(directory, other, kept, arguments.remove, arguments.near, arguments.force)
        sizes_left = ", ".join(f"{len(part.source_index):,} {part.name}" for part in kept)
        print(f"left out {count:,} images; {sizes_left} images in {arguments.remove}")
    return 0


if __name__ == "__main__":
    run_command(main)
