"""Duplicates between the splits of a data set, and within its train split: search, report and removal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.dedup.near_duplicates import Matches, find_near_duplicates
from pipeline.readers.formats.csv import format_csv
from pipeline.readers.raw_split import RawSplit
from shards.atomic import write_file
from shards.errors import UserError

_PRIORITY = ("test", "val", "train")  # a duplicate is removed from the later one of two splits


@dataclass(frozen=True)
class Overlap:
    """The P images of a split that are also in another split, each with the most similar image there.

    If both are the same split, the P images that equal or nearly equal an earlier one.

    Attributes:
        split: Name of the split.
        other_split: Name of the other split.
        source_index: int64 [P], index of each image in the raw data.
        labels: str [P], class names.
        other_source_index: int64 [P], index of the most similar image of the other split.
        other_labels: str [P], class names in the other split.
        identical: bool [P], whether both images have the same bytes.
        similarity: float32 [P], cosine similarity of the embeddings (see `pipeline.dedup.perceptual_hash`).
        other_matches: Number of images of the other split that are in this split.
        other_size: Number of images of the other split.
        within: Whether both are the same split.
    """

    split: str
    other_split: str
    source_index: NDArray[np.int64]
    labels: NDArray[np.str_]
    other_source_index: NDArray[np.int64]
    other_labels: NDArray[np.str_]
    identical: NDArray[np.bool_]
    similarity: NDArray[np.float32]
    other_matches: int
    other_size: int
    within: bool

    @classmethod
    def of(cls, split: RawSplit, other: RawSplit, matches: Matches) -> Overlap:
        """Build the overlap from the positions of the matches in both splits."""
        return cls(
            split=split.name,
            other_split=other.name,
            source_index=split.source_index[matches.first],
            labels=np.array(split.classes)[split.labels[matches.first]],
            other_source_index=other.source_index[matches.second],
            other_labels=np.array(other.classes)[other.labels[matches.second]],
            identical=matches.identical,
            similarity=matches.similarity,
            other_matches=len(matches.second_matches),
            other_size=len(other.labels),
            within=split is other,
        )

    def __str__(self) -> str:
        if self.within:
            return (
                f"{len(self.source_index):,} {self.split} images repeat an earlier one ({self.identical.sum():,} "
                f"identical, {(self.labels != self.other_labels).sum():,} with another label)"
            )
        return (
            f"{len(self.source_index):,} {self.split} images are in {self.other_split} "
            f"({self.identical.sum():,} identical, {(self.labels != self.other_labels).sum():,} with another label; "
            f"they match {self.other_matches:,} of the {self.other_size:,} {self.other_split} images)"
        )


def find_duplicates(
    splits: tuple[RawSplit, ...], within_train: bool = False, workers: int | None = None
) -> tuple[Overlap, ...]:
    """Find the images that are in several splits of a data set, including near-duplicates.

    With `within_train`, also those of the train split that equal or nearly equal an earlier one. Unreadable images are
    skipped. The result is a pure function of the images, whatever the number of processes `workers`.
    """
    ordered = sorted(splits, key=lambda split: _PRIORITY.index(split.name))
    pairs = list(combinations(ordered, 2))
    if within_train:
        pairs += [(split, split) for split in ordered if split.name == "train"]
    return tuple(Overlap.of(split, other, find_near_duplicates(split, other, workers)) for other, split in pairs)


def summarize(overlaps: Sequence[Overlap]) -> str:
    """Return a summary of the overlaps in one line."""
    return f"near-duplicates: {'; '.join(str(overlap) for overlap in overlaps if len(overlap.source_index)) or 'none'}"


def remove_duplicates(
    splits: tuple[RawSplit, ...], overlaps: Sequence[Overlap], report: str = "--near-duplicates report"
) -> tuple[RawSplit, ...]:
    """Return the splits without the images that each overlap lists. `report` is the option that lists them.

    Raises:
        UserError: A split would be empty.
    """
    return tuple(_without_duplicates(split, overlaps, report) for split in splits)


def _without_duplicates(split: RawSplit, overlaps: Sequence[Overlap], report: str) -> RawSplit:
    listed = [overlap.source_index for overlap in overlaps if overlap.split == split.name]
    is_duplicate = np.isin(split.source_index, np.concatenate([np.empty(0, np.int64), *listed]))
    classes = len(np.unique(split.labels[~is_duplicate]))
    if is_duplicate.any() and classes < (2 if split.name == "train" else 1):
        which = "all but those of one class" if classes else "all of them"
        raise UserError(
            found=f"a {split.name} split of {len(is_duplicate):,} images, {which} also in another split",
            expected="at least one image, and training images of at least two classes, that are in no other split",
            hint=f"check whether the splits are copies of each other; {report} lists the images",
        )
    return split.select(np.flatnonzero(~is_duplicate)) if is_duplicate.any() else split


def write_report(overlaps: Sequence[Overlap], path: Path) -> None:
    """Write a CSV file with one line for each image of each overlap, most similar first."""
    header = ["part", "row", "label", "in_part", "in_row", "in_label", "identical", "similarity"]
    write_file(path, format_csv(header, (row for overlap in overlaps for row in _report_rows(overlap))))


def _report_rows(overlap: Overlap) -> Iterator[tuple[object, ...]]:
    for image in np.lexsort((overlap.source_index, -overlap.similarity, ~overlap.identical)):
        here = overlap.split, overlap.source_index[image], overlap.labels[image]
        there = overlap.other_split, overlap.other_source_index[image], overlap.other_labels[image]
        yield *here, *there, "yes" if overlap.identical[image] else "no", f"{overlap.similarity[image]:.4f}"
