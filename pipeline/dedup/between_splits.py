"""Images of the train part that are in test too, perhaps changed a little: to be listed, or left out."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.datasets import RawPart, UnreadableImages
from pipeline.dedup.near_duplicates import Pictures, hash_pictures, match
from pipeline.dedup.perceptual_hash import SIDE, UNREADABLE, Miniatures, shrink_arrays, shrink_files
from shards.atomic import write_file
from shards.errors import UserError

_KEPT_FIRST = ("test", "val", "train")  # what is in two parts is left out of the later one


@dataclass(frozen=True)
class Overlap:
    """Images of one part that are also in another, which keeps them; each once, with the closest there.

    rows, labels, kept_rows, kept_labels: int64 [P], raw rows and labels of both, which are numbers in classes and
    kept_classes. identical: bool [P], whether they are
    equal to the last byte. likeness: float32 [P], the cosine of their spectra (see `pipeline.dedup.perceptual_hash`).
    kept_found: how many images of the other part are met in this one, out of kept_count. crowded: images of the part
    that look like too many of the other to be compared with all of these.
    """

    part: str
    kept_part: str
    classes: tuple[str, ...]
    kept_classes: tuple[str, ...]
    rows: NDArray[np.int64]
    labels: NDArray[np.int64]
    kept_rows: NDArray[np.int64]
    kept_labels: NDArray[np.int64]
    identical: NDArray[np.bool_]
    likeness: NDArray[np.float32]
    kept_found: int
    kept_count: int
    crowded: int

    def __str__(self) -> str:
        identical = int(self.identical.sum())
        names, kept_names = np.array(self.classes)[self.labels], np.array(self.kept_classes)[self.kept_labels]
        differing = int((names != kept_names).sum())
        text = (
            f"{len(self.rows):,} {self.part} images are in {self.kept_part} ({identical:,} identical, {differing:,} "
            f"under another label; they are {self.kept_found:,} of the {self.kept_count:,} {self.kept_part} images)"
        )
        if self.crowded:
            text += f", {self.crowded:,} have too many look-alikes to compare with all"
        return text


@dataclass(frozen=True)
class Duplicates:
    """What `find` has found: of each pair of parts, which images are in both."""

    overlaps: tuple[Overlap, ...]

    def summary(self) -> str:
        """One line to print."""
        found = "; ".join(str(overlap) for overlap in self.overlaps if len(overlap.rows) or overlap.crowded)
        return f"near-duplicates: {found or 'none'}"


def find(parts: tuple[RawPart, ...]) -> Duplicates:
    """Find the images that are in several parts. What counts as the same image is told by `pipeline.dedup.near_duplicates`.

    Images that cannot be read are passed over. A pure function of the images.
    """
    order = sorted(parts, key=lambda part: _KEPT_FIRST.index(part.name))
    hashed = [hash_pictures(pictures_of(part)) for part in order] if len(parts) > 1 else []
    overlaps = []
    for place, kept in enumerate(order):
        for later in range(place + 1, len(order)):
            part = order[later]
            found = match(hashed[later], hashed[place])
            overlaps.append(
                Overlap(
                    part=part.name,
                    kept_part=kept.name,
                    classes=part.classes,
                    kept_classes=kept.classes,
                    rows=part.rows[found.first],
                    labels=part.labels[found.first],
                    kept_rows=kept.rows[found.second],
                    kept_labels=kept.labels[found.second],
                    identical=found.identical,
                    likeness=found.likeness,
                    kept_found=len(found.seconds),
                    kept_count=len(kept.labels),
                    crowded=found.crowded,
                )
            )
    return Duplicates(tuple(overlaps))


def remove(parts: tuple[RawPart, ...], duplicates: Duplicates) -> tuple[RawPart, ...]:
    """The parts without what is in another: val without what is in test, train without what is in test or val.

    Raises `UserError` if nothing remains of one.
    """
    return tuple(_without(part, [one.rows for one in duplicates.overlaps if one.part == part.name]) for part in parts)


def _without(part: RawPart, rows: list[NDArray[np.int64]]) -> RawPart:
    found = np.isin(part.rows, np.concatenate([np.empty(0, np.int64), *rows]))
    if found.all():
        raise UserError(
            found=f"a {part.name} part of {len(found):,} images, all of them in another part too",
            expected="at least one that is not",
            hint="are the parts copies of each other? --near-duplicates report lists the images",
        )
    return part.select(np.flatnonzero(~found)) if found.any() else part


def write_report(duplicates: Duplicates, path: Path) -> None:
    """Write a CSV with a line for each image that is in another part too, the most alike first."""
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(["part", "row", "label", "in_part", "in_row", "in_label", "identical", "likeness"])
    for one in duplicates.overlaps:
        for place in np.lexsort((one.rows, -one.likeness, ~one.identical)):
            lines.writerow(
                [
                    one.part,
                    one.rows[place],
                    one.classes[one.labels[place]],
                    one.kept_part,
                    one.kept_rows[place],
                    one.kept_classes[one.kept_labels[place]],
                    "yes" if one.identical[place] else "no",
                    f"{one.likeness[place]:.4f}",
                ]
            )
    write_file(path, text.getvalue())


def pictures_of(part: RawPart) -> Pictures:
    """The images of a part, to be compared."""
    return Pictures(part.name, len(part.labels), partial(_look, part))


def _look(part: RawPart, positions: NDArray[np.int64]) -> Miniatures:
    rows = part.rows[positions]
    try:
        return _shrink(part, rows)
    except UnreadableImages as error:
        readable = np.flatnonzero(~np.isin(rows, list(error.reasons)))
    images = np.zeros((len(rows), SIDE, SIDE), np.float32)
    digests = np.full(len(rows), UNREADABLE)
    if len(readable):
        images[readable], digests[readable] = _shrink(part, rows[readable])
    return Miniatures(images, digests)


def _shrink(part: RawPart, rows: NDArray[np.int64]) -> Miniatures:
    images = part.read(rows)
    if isinstance(images, list):
        return shrink_files([image.content for image in images])
    return shrink_arrays(images, part.transposed)
