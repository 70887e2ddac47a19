"""Packed parts as raw ones, so that some of their images can be packed again, beside others or without them."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import cast

import numpy as np
from numpy.typing import NDArray

from pipeline.packing.pack import ORIGINS
from pipeline.readers.raw_split import RawSplit
from shards.errors import UserError
from shards.manifest import SPLITS, VALIDATION, has_split
from shards.open import open_split
from shards.remote.sets import resolve_dataset
from shards.stores.base import Store


def packed_splits(shards: Path | str) -> tuple[RawSplit, ...]:
    """The parts of a packed set (a directory or an address) with the rows that they have.

    Raises `UserError` if there is no such set, or if it holds picture files of differing sizes.
    """
    directory = resolve_dataset(shards)
    return tuple(
        packed_split(open_split(directory, name), directory / name)
        for name in SPLITS
        if name != VALIDATION or has_split(directory, name)
    )


def packed_split(store: Store, directory: Path) -> RawSplit:
    """An open packed part, and its directory, as a raw one. Raises `UserError` if it holds picture files."""
    manifest = store.manifest
    if manifest.encoded:
        raise UserError(
            found=f"{directory}, which holds picture files of differing sizes",
            expected="images of one size",
            hint="pack it again with a size: python -m pipeline.shard ... --size N",
        )
    order = np.argsort(store.rows, kind="stable")
    rows = store.rows[order]

    def read(wanted: NDArray[np.int64]) -> NDArray[np.uint8]:
        return cast(NDArray[np.uint8], store.read(order[np.searchsorted(rows, wanted)]))

    return RawSplit(
        name=manifest.split,
        classes=manifest.classes,
        labels=store.labels[order],
        image_shape=manifest.image_shape,
        transposed=manifest.transposed,
        read=read,
        files=manifest.raw,
        rows=rows,
        columns=_origins(directory, rows),
    )


def concatenate(part: RawSplit, other: RawSplit) -> RawSplit:
    """A part with the images of another appended, which are given rows above its own.

    Which part and row they have come from stands in the columns `from` and `from_row`. Raises `UserError` if images
    or classes are of another kind.
    """
    for what, in_part, in_other in (
        ("images of shape", part.image_shape, other.image_shape),
        ("images stored transposed:", part.transposed, other.transposed),
        ("classes", part.classes, other.classes),
    ):
        if in_part != in_other:
            raise UserError(
                found=f"{what} {in_other} beside {in_part}",
                expected="parts that are alike",
                hint="pack both from the same kind of files, with the same --size and --color",
            )
    first = int(part.rows.max()) + 1
    rows = np.concatenate([part.rows, first + np.arange(len(other.rows))])

    def read(wanted: NDArray[np.int64]) -> NDArray[np.uint8]:
        images = np.empty((len(wanted), *part.image_shape), np.uint8)
        theirs = wanted >= first
        for mask, source, own in ((~theirs, part, wanted), (theirs, other, other.rows[(wanted - first) * theirs])):
            if mask.any():
                images[mask] = source.read(own[mask])
        return images

    names = dict.fromkeys([*part.columns, *other.columns])
    columns = {name: np.concatenate([_column(part, name), _column(other, name)]) for name in names}
    columns["from"] = np.repeat([part.name, other.name], [len(part.rows), len(other.rows)])
    columns["from_row"] = np.concatenate([part.rows, other.rows]).astype(str)
    return RawSplit(
        name=part.name,
        classes=part.classes,
        labels=np.concatenate([part.labels, other.labels]),
        image_shape=part.image_shape,
        transposed=part.transposed,
        read=read,
        files=tuple(dict.fromkeys(part.files + other.files)),
        rows=rows,
        columns=columns,
    )


def _column(part: RawSplit, name: str) -> NDArray[np.str_]:
    return part.columns.get(name, np.full(len(part.rows), ""))


def _origins(directory: Path, rows: NDArray[np.int64]) -> dict[str, NDArray[np.str_]]:
    """The columns of `origins.csv` in the order of rows, none if a part has no such file."""
    path = directory / ORIGINS
    if not path.exists():
        return {}
    with path.open(encoding="utf-8", newline="") as file:
        head, *lines = csv.reader(file)
    lines = sorted(lines, key=lambda line: int(line[0]))
    assert [int(line[0]) for line in lines] == rows.tolist(), "origins.csv lists every row once"
    return {name: np.array([line[place] for line in lines]) for place, name in enumerate(head) if place}
