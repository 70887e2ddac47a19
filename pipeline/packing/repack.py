"""Packed splits as raw splits, to pack some of their images again or to append others."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import cast

import numpy as np
from numpy.typing import NDArray

from pipeline.packing.pack import ORIGINS
from pipeline.readers.raw_split import RawSplit
from shards.atomic import detect_replacement
from shards.errors import UserError
from shards.manifest import SPLITS, VALIDATION, Manifest, has_split, manifest_paths
from shards.open import open_split
from shards.remote.datasets import resolve_dataset
from shards.stores.base import Store
from shards.stores.image_header import MAX_BYTES
from shards.stores.split_files import SplitFiles


def packed_splits(shards: Path | str) -> tuple[RawSplit, ...]:
    """Return the splits of a packed set (a directory or an address) with their source indices.

    Raises:
        UserError: If there is no such set, or if it holds image files of different sizes.
    """
    directory = resolve_dataset(shards)
    with detect_replacement(*manifest_paths(directory)):
        return tuple(
            packed_split(open_split(directory, name))
            for name in SPLITS
            if name != VALIDATION or has_split(directory, name)
        )


def packed_split(store: Store) -> RawSplit:
    """Return an open packed split as a raw split.

    Raises:
        UserError: If it holds image files.
    """
    manifest, files = store.manifest, store.files
    assert files is not None
    manifest.check_one_size(files.directory)
    order = np.argsort(store.rows, kind="stable")
    source_index = store.rows[order].astype(np.int64)

    def read(indices: NDArray[np.int64]) -> NDArray[np.uint8]:
        return cast(NDArray[np.uint8], store.read(order[np.searchsorted(source_index, indices)]))

    return RawSplit(
        name=manifest.split,
        classes=manifest.classes,
        labels=store.labels[order].astype(np.int64),
        image_shape=manifest.image_shape,
        transposed=manifest.transposed,
        read=read,
        files=manifest.raw,
        source_index=source_index,
        columns=_read_origins(files, manifest, source_index),
    )


def concatenate(split: RawSplit, other: RawSplit) -> RawSplit:
    """Append the images of another split, with source indices above those of the first.

    The columns `from` and `from_row` hold the split and source index from which each image comes.

    Raises:
        UserError: If images or classes are of another kind.
    """
    for what, first, second in (
        ("images of shape", split.image_shape, other.image_shape),
        ("images stored transposed:", split.transposed, other.transposed),
        ("classes", split.classes, other.classes),
    ):
        if first != second:
            raise UserError(
                found=f"{what} {second} beside {first}",
                expected="splits of the same kind",
                hint="pack both from the same kind of files, with the same --size and --color",
            )
    offset = int(np.max(split.source_index)) + 1

    def read(indices: NDArray[np.int64]) -> NDArray[np.uint8]:
        images = np.empty((len(indices), *cast(tuple[int, int, int], split.image_shape)), np.uint8)
        is_other = indices >= offset
        if not is_other.all():
            images[~is_other] = split.read(indices[~is_other])
        if is_other.any():
            images[is_other] = other.read(other.source_index[indices[is_other] - offset])
        return images

    both = (split, other)
    columns = {
        name: np.concatenate([each.columns.get(name, np.full(len(each.labels), "")) for each in both])
        for name in dict.fromkeys([*split.columns, *other.columns])
    }
    columns["from"] = np.repeat([each.name for each in both], [len(each.labels) for each in both])
    columns["from_row"] = np.concatenate([each.source_index for each in both]).astype(str)
    return RawSplit(
        name=split.name,
        classes=split.classes,
        labels=np.concatenate([split.labels, other.labels]),
        image_shape=split.image_shape,
        transposed=split.transposed,
        read=read,
        files=tuple(dict.fromkeys(split.files + other.files)),
        source_index=np.concatenate([split.source_index, offset + np.arange(len(other.labels))]),
        columns=columns,
    )


def _read_origins(
    files: SplitFiles, manifest: Manifest, source_index: NDArray[np.int64]
) -> dict[str, NDArray[np.str_]]:
    """The columns of `origins.csv` in the order of source indices, empty if a split has no such file."""
    if ORIGINS not in {file.name for file in manifest.files}:
        return {}
    limit = csv.field_size_limit(MAX_BYTES)  # of a Parquet table, a text may be longer than the default
    try:
        names, *lines = csv.reader(io.StringIO(files.read_all(ORIGINS).decode("utf-8"), newline=""))
    finally:
        csv.field_size_limit(limit)
    lines.sort(key=lambda line: int(line[0]))
    assert [int(line[0]) for line in lines] == source_index.tolist(), "origins.csv lists every row once"
    return {name: np.array([line[column] for line in lines]) for column, name in enumerate(names) if column}
