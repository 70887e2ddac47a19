"""Find the images of one packed data set that are in another, and write the data set without them.

    python -m pipeline.dedup.overlap A B                    count the images of each split of A in each split of B
    python -m pipeline.dedup.overlap A B --csv FILE         list the images
    python -m pipeline.dedup.overlap A B --near             include near-duplicates
    python -m pipeline.dedup.overlap A B --remove OUT       write A without the images on which B is evaluated

Pretraining on A and fine-tuning on B leaks B's evaluation data if images of B's test or val split are in A's train or
val split. `--remove` leaves these images out; A's test split is complete, because no model is trained on it. Two images
are the same if their upright pixels are identical.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.dedup.between_splits import Overlap, remove_duplicates, write_report
from pipeline.dedup.near_duplicates import find_identical, find_near_duplicates
from pipeline.dedup.perceptual_hash import digests_of_arrays
from pipeline.packing.pack import PackSettings, pack
from pipeline.packing.repack import packed_splits
from pipeline.readers.naming import TEST, TRAIN
from pipeline.readers.raw_split import RawSplit
from shards.atomic import check_writable, detect_replacement
from shards.cli import command_parser, plural, run_command
from shards.errors import UserError
from shards.manifest import REQUIRED_SPLITS, VALIDATION, Manifest, manifest_paths
from shards.remote.datasets import resolve_dataset

_EVALUATED_ON = (TEST, VALIDATION)
_TRAINED_ON = (TRAIN, VALIDATION)
_READ_BATCH = 8192  # images


def find_overlaps(
    splits: tuple[RawSplit, ...], others: tuple[RawSplit, ...], near: bool = False
) -> tuple[Overlap, ...]:
    """Find the images of each split of one data set in each split of another.

    The result is a pure function of the images.

    Args:
        splits: Splits of the data set whose images are counted.
        others: Splits of the other data set.
        near: Whether to include near-duplicates; otherwise all pixels must be equal.
    """
    pairs = [(split, other) for split in splits for other in others]
    if near:
        return tuple(Overlap.of(split, other, find_near_duplicates(split, other)) for split, other in pairs)
    digests = [image_digests(split) for split in splits]
    other_digests = [image_digests(other) for other in others]
    matches = [find_identical(first, second) for first in digests for second in other_digests]
    return tuple(Overlap.of(split, other, match) for (split, other), match in zip(pairs, matches, strict=True))


def image_digests(split: RawSplit) -> NDArray[np.uint64]:
    """Compute the digests uint64 [N] of the upright images of a split with images of one size."""
    starts = range(0, len(split.source_index), _READ_BATCH)
    batches = (np.asarray(split.read(split.source_index[start : start + _READ_BATCH])) for start in starts)
    return np.concatenate([digests_of_arrays(images, split.transposed) for images in batches])


def remove_leaks(splits: tuple[RawSplit, ...], overlaps: Sequence[Overlap]) -> tuple[RawSplit, ...]:
    """Return the splits without training images on which the other data set is evaluated."""
    leaks = [one for one in overlaps if one.split in _TRAINED_ON and one.other_split in _EVALUATED_ON]
    return remove_duplicates(splits, leaks, "--csv FILE")


def _identity(directory: Path) -> str:
    """Return the shortened identities of the required splits."""
    return "-".join(Manifest.read(directory / split).identity()[:12] for split in REQUIRED_SPLITS)


def main() -> int:
    """Run the command line."""
    parser = command_parser("pipeline.dedup.overlap", __doc__)
    add = parser.add_argument
    add("set", metavar="A", help="packed data set: directory or URL")
    add("other", metavar="B", help="packed data set to compare with: directory or URL")
    add("--near", action="store_true", help="include near-duplicates (slightly changed images)")
    add("--csv", type=Path, metavar="FILE", help="write a CSV file with one line per image")
    add("--remove", metavar="OUT", help="write A to OUT without train and val images that are in B's test or val split")
    add("--force", action="store_true", help="replace a complete packed data set at OUT")
    arguments = parser.parse_args()
    if arguments.csv:
        check_writable(arguments.csv)
    directory, other = resolve_dataset(arguments.set), resolve_dataset(arguments.other)
    with detect_replacement(*manifest_paths(directory), *manifest_paths(other)):
        splits, others = packed_splits(directory), packed_splits(other)
        manifest, other_manifest = Manifest.read(directory / TRAIN), Manifest.read(other / TRAIN)
        identity, other_identity = _identity(directory), _identity(other)
    shape, other_shape = splits[0].image_shape, others[0].image_shape
    if shape != other_shape and not arguments.near:
        raise UserError(
            found=f"images of shape {list(shape)} in {arguments.set}, {list(other_shape)} in {arguments.other}",
            expected="images of one shape; images of different shapes are never identical",
            hint="use --near to compare images of different sizes",
        )
    overlaps = find_overlaps(splits, others, arguments.near)
    print(f"{manifest.name} in {other_manifest.name}:")
    for overlap in overlaps:
        print(f"  {overlap}")
    if arguments.csv:
        write_report(overlaps, arguments.csv)
    if arguments.remove:
        remaining = remove_leaks(splits, overlaps)
        count = sum(len(before.labels) - len(after.labels) for before, after in zip(splits, remaining, strict=True))
        options: dict[str, str | int | float] = {
            "packed_from": identity,
            "without": f"{other_manifest.name} {other_identity}",
            "near": int(arguments.near),
        }
        pack(lambda: remaining, arguments.remove, PackSettings.like(manifest, options), force=arguments.force)
        sizes = ", ".join(f"{len(split.source_index):,} {split.name}" for split in remaining)
        print(f"removed {plural(count, 'image')}; {sizes} images in {arguments.remove}")
    return 0


if __name__ == "__main__":
    run_command(main)
