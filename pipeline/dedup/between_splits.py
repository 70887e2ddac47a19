"""Images of the train part that are in test too, perhaps changed a little: to be listed, or left out."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.dedup.near_duplicates import Matches, find_near_duplicates
from pipeline.readers.raw_split import RawSplit
from shards.atomic import write_file
from shards.errors import UserError

_KEPT_FIRST = ("test", "val", "train")  # what is in two splits is removed from the later one


@dataclass(frozen=True)
class Overlap:
    """Images of one split that are also in another, which keeps them; each once, with the closest there.

    Attributes:
        part, other_split: names of both splits.
        rows, other_source_index: int64 [P], raw rows of both.
        labels, other_labels: class names, str [P].
        identical: bool [P], whether both images are equal, byte for byte.
        similarity: float32 [P], the cosine of their embeddings (see `pipeline.dedup.perceptual_hash`).
        other_matches: number of images of the other split that are in this one.
        other_size: number of images of the other split.
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

    @classmethod
    def of(cls, part: RawSplit, kept: RawSplit, matches: Matches) -> Overlap:
        """The overlap of two splits from the positions of the matches in both."""
        return cls(
            split=part.name,
            other_split=kept.name,
            source_index=part.source_index[matches.first],
            labels=np.array(part.classes)[part.labels[matches.first]],
            other_source_index=kept.source_index[matches.second],
            other_labels=np.array(kept.classes)[kept.labels[matches.second]],
            identical=matches.identical,
            similarity=matches.similarity,
            other_matches=len(matches.second_matches),
            other_size=len(kept.labels),
        )

    def __str__(self) -> str:
        return (
            f"{len(self.source_index):,} {self.split} images are in {self.other_split} "
            f"({self.identical.sum():,} identical, "
            f"{(self.labels != self.other_labels).sum():,} under another label; they are {self.other_matches:,} of the "
            f"{self.other_size:,} {self.other_split} images)"
        )


def find_duplicates(parts: tuple[RawSplit, ...]) -> tuple[Overlap, ...]:
    """Find the images that are in several splits of a set; `near_duplicates` says what counts as the same image.

    Images that cannot be read are skipped. A pure function of the images.
    """
    order = sorted(parts, key=lambda part: _KEPT_FIRST.index(part.name))
    pairs = [(part, kept) for place, kept in enumerate(order) for part in order[place + 1 :]]
    return tuple(Overlap.of(part, kept, find_near_duplicates(part, kept)) for part, kept in pairs)


def summarize(overlaps: Sequence[Overlap]) -> str:
    """One line to print."""
    return f"near-duplicates: {'; '.join(str(one) for one in overlaps if len(one.source_index)) or 'none'}"


def remove_duplicates(parts: tuple[RawSplit, ...], overlaps: Sequence[Overlap]) -> tuple[RawSplit, ...]:
    """The splits without what is in another: val without what is in test, train without what is in test or val.

    Raises:
        UserError: if nothing remains of a split.
    """
    return tuple(_without(part, [one.source_index for one in overlaps if one.split == part.name]) for part in parts)


def _without(part: RawSplit, rows: list[NDArray[np.int64]]) -> RawSplit:
    found = np.isin(part.source_index, np.concatenate([np.empty(0, np.int64), *rows]))
    if found.all():
        raise UserError(
            found=f"a {part.name} part of {len(found):,} images, all of them in another part too",
            expected="at least one that is not",
            hint="are the parts copies of each other? --near-duplicates report lists the images",
        )
    return part.select(np.flatnonzero(~found)) if found.any() else part


def write_report(overlaps: Sequence[Overlap], path: Path) -> None:
    """Write a CSV with a line for each image that is in another part too, the most similar first."""
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(["part", "row", "label", "in_part", "in_row", "in_label", "identical", "similarity"])
    for one in overlaps:
        for place in np.lexsort((one.source_index, -one.similarity, ~one.identical)):
            lines.writerow(
                [
                    one.split,
                    one.source_index[place],
                    one.labels[place],
                    one.other_split,
                    one.other_source_index[place],
                    one.other_labels[place],
                    "yes" if one.identical[place] else "no",
                    f"{one.similarity[place]:.4f}",
                ]
            )
    write_file(path, text.getvalue())
