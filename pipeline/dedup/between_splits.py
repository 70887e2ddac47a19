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
        part, kept_part: names of both splits.
        rows, kept_rows: int64 [P], raw rows of both.
        labels, kept_labels: class names, str [P].
        identical: bool [P], whether both images are equal, byte for byte.
        similarity: float32 [P], the cosine of their embeddings (see `pipeline.dedup.perceptual_hash`).
        kept_found: number of images of the other split that are in this one.
        kept_count: number of images of the other split.
    """

    part: str
    kept_part: str
    rows: NDArray[np.int64]
    labels: NDArray[np.str_]
    kept_rows: NDArray[np.int64]
    kept_labels: NDArray[np.str_]
    identical: NDArray[np.bool_]
    similarity: NDArray[np.float32]
    kept_found: int
    kept_count: int

    @classmethod
    def of(cls, part: RawSplit, kept: RawSplit, matches: Matches) -> Overlap:
        """The overlap of two splits from the positions of the matches in both."""
        return cls(
            part=part.name,
            kept_part=kept.name,
            rows=part.rows[matches.first],
            labels=np.array(part.classes)[part.labels[matches.first]],
            kept_rows=kept.rows[matches.second],
            kept_labels=np.array(kept.classes)[kept.labels[matches.second]],
            identical=matches.identical,
            similarity=matches.similarity,
            kept_found=len(matches.second_found),
            kept_count=len(kept.labels),
        )

    def __str__(self) -> str:
        return (
            f"{len(self.rows):,} {self.part} images are in {self.kept_part} ({self.identical.sum():,} identical, "
            f"{(self.labels != self.kept_labels).sum():,} under another label; they are {self.kept_found:,} of the "
            f"{self.kept_count:,} {self.kept_part} images)"
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
    return f"near-duplicates: {'; '.join(str(one) for one in overlaps if len(one.rows)) or 'none'}"


def remove_duplicates(parts: tuple[RawSplit, ...], overlaps: Sequence[Overlap]) -> tuple[RawSplit, ...]:
    """The splits without what is in another: val without what is in test, train without what is in test or val.

    Raises:
        UserError: if nothing remains of a split.
    """
    return tuple(_without(part, [one.rows for one in overlaps if one.part == part.name]) for part in parts)


def _without(part: RawSplit, rows: list[NDArray[np.int64]]) -> RawSplit:
    found = np.isin(part.rows, np.concatenate([np.empty(0, np.int64), *rows]))
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
        for place in np.lexsort((one.rows, -one.similarity, ~one.identical)):
            lines.writerow(
                [
                    one.part,
                    one.rows[place],
                    one.labels[place],
                    one.kept_part,
                    one.kept_rows[place],
                    one.kept_labels[place],
                    "yes" if one.identical[place] else "no",
                    f"{one.similarity[place]:.4f}",
                ]
            )
    write_file(path, text.getvalue())
