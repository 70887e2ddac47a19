"""Make the splits of a packed set from those of a raw data set: split off test and val, and subsample train."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.common.bitmap import Bitmap
from pipeline.common.rng import PARTITION_STREAM, permutation
from pipeline.common.stratified import group_quotas, iterate_stratified_mask, stratified_quotas
from pipeline.readers.archives.files import corrupt_as_user_error
from pipeline.readers.formats.csv import CsvTable, read_csv
from pipeline.readers.naming import TEST, TRAIN, warn
from pipeline.readers.raw_split import RawSplit, computed_array
from shards.atomic import read_file
from shards.cli import plural
from shards.errors import UserError, os_errors_as_user_errors, quote
from shards.manifest import VALIDATION, check_several_classes

_MAX_TABLE_BYTES = 1 << 30
_MAX_DIGITS = 18  # of a source index, an int64
# Independent of each other, and of the choices during training.
_STREAMS = {TEST: PARTITION_STREAM + 1, VALIDATION: PARTITION_STREAM + 2, TRAIN: PARTITION_STREAM + 3}


def make_splits(
    splits: tuple[RawSplit, ...],
    *,
    test_fraction: float | None,
    val_fraction: float | None,
    subset: float,
    stratify: str,
    seed: int,
    exclude: CsvTable | None = None,
) -> tuple[RawSplit, ...]:
    """Return the splits train, test and val (if any), in this order. A pure function of its arguments.

    Args:
        splits: The splits of the raw data set.
        test_fraction: Fraction of a data set with only a train split that becomes the test split.
        val_fraction: Fraction of the remaining train split that becomes the val split.
        subset: Fraction of the remaining train split that is kept; it changes neither test nor val.
        stratify: A column of the train split. Images are chosen in proportion by label, and within each label by the
            values of this column; empty for the label alone.
        seed: The seed of all choices.
        exclude: Images to leave out, after all choices: the columns `part` and `row`, and possibly `label`.

    Raises:
        UserError: If the options do not fit the data set.
    """
    result = {split.name: split for split in splits}
    train = result[TRAIN]
    if TEST not in result and VALIDATION in result and test_fraction is None:
        warn("the val split is the test split, as there is none (--test-fraction 0.2 makes one)")
        result[TEST] = replace(result.pop(VALIDATION), name=TEST)
    fractions = {TEST: test_fraction, VALIDATION: val_fraction}
    if TEST not in result and test_fraction is None:
        raise UserError(
            found="no test split in this data set", expected="a fraction for testing", hint="--test-fraction 0.2"
        )
    for name, fraction in fractions.items():
        if name in result and fraction is not None:
            images = len(result[name].labels)
            raise UserError(
                found=f"--{name}-fraction {fraction} for a data set with a {name} split of {images:,} images",
                expected=f"a data set without a {name} split",
                hint=f"omit --{name}-fraction",
            )
    if stratify and stratify not in train.columns:
        columns = ", ".join(train.columns)
        raise UserError(
            found=f"--stratify {stratify}",
            expected=f"one of the columns {columns}" if columns else "no --stratify: these images have only labels",
            hint=f"--stratify {quote(next(iter(train.columns)))}" if columns else "omit --stratify to choose by label",
        )
    for name, fraction in fractions.items():
        if fraction is not None:
            chosen, rest = _choose(train, f"--{name}-fraction", fraction, stratify, seed, _STREAMS[name])
            result[name] = train.select(chosen, name)
            train = train.select(rest)
    if subset != 1:
        train = train.select(_choose(train, "--subset", subset, stratify, seed, _STREAMS[TRAIN])[0])
    result[TRAIN] = train
    if exclude is not None:
        result = _exclude(result, exclude)
    train = result[TRAIN]
    check_several_classes(train.classes, train.class_counts().tolist(), "the raw files")
    return (train, *(result[name] for name in (TEST, VALIDATION) if name in result))


def read_exclusions(path: Path) -> tuple[CsvTable, str]:
    """Read the table of images to exclude; returns it with the start of its hash.

    Raises:
        UserError: There is no such table.
    """
    expected = "a CSV table with the columns part and row, and an image in each line"
    hint = "omit --exclude to pack all images"
    with os_errors_as_user_errors(path), corrupt_as_user_error(path, expected, hint):
        content = read_file(path, _MAX_TABLE_BYTES)
        return read_csv(content, str(path)), hashlib.sha256(content).hexdigest()[:12]


def _exclude(splits: dict[str, RawSplit], table: CsvTable) -> dict[str, RawSplit]:
    """The splits without the images that a table lists by split and source index.

    Raises:
        UserError: An image is in no split, or has another label, as in the table of another data set; or a split loses
            all images.
    """
    names, rows = table.column(["part"], "splits"), table.column(["row"], "source indices")
    labels = table.column(["label"], "labels") if "label" in map(str.lower, table.columns) else [None] * len(rows)
    numbers = np.array([row for row in rows if row.isdecimal() and len(row) <= _MAX_DIGITS], np.int64)
    places = {
        name: {str(split.source_index[place]): place for place in np.flatnonzero(np.isin(split.source_index, numbers))}
        for name, split in splits.items()
    }
    keep = {name: np.ones(len(split.labels), bool) for name, split in splits.items()}
    for line, (name, row, label) in enumerate(zip(names, rows, labels, strict=True)):
        place = places.get(name, {}).get(row)
        true = None if place is None else splits[name].classes[splits[name].labels[place]]
        # Tables have an apostrophe before a text that a spreadsheet would run as a formula (`format_csv`).
        # Tables are read without outer blanks.
        if place is None or (label is not None and _as_read(label) != _as_read(str(true))):
            what = "which is no image" if place is None else f"listed as {label} but labelled {true}"
            raise UserError(
                found=f"{table.line(line)}: row {row} of the {name} split, {what}",
                expected="a table of images of this data set, packed with the same options",
                hint="omit --exclude, or list images of this data set",
            )
        keep[name][place] = False
    for name, kept in keep.items():
        if not kept.any():
            raise UserError(
                found=f"{table.path}: all {len(kept):,} images of the {name} split",
                expected="a table that leaves images in each split",
                hint="omit --exclude, or remove lines from the table",
            )
    return {name: split.select(Bitmap([keep[name]])) for name, split in splits.items()}


def _as_read(label: str) -> str:
    return label.strip().removeprefix("'").strip()


def _choose(
    split: RawSplit, option: str, fraction: float, stratify: str, seed: int, stream: int
) -> tuple[Bitmap, Bitmap]:
    """The images in proportion by label, and by the values of the column to stratify by; and the other images.

    Raises:
        UserError: If all or none of the images are chosen.
    """
    # Classes in random order: otherwise, of many small classes, always the first would contribute one more image.
    number = permutation(len(split.classes), seed, stream)
    sizes = np.zeros(len(number), np.int64)
    sizes[number] = split.class_counts()
    # Of a subset the images to remove are chosen, so that no class loses its last image.
    removes = option == "--subset"
    quotas = stratified_quotas(sizes, 1 - fraction if removes else fraction)

    strata = computed_array(len(split.labels), lambda positions: number[split.labels[positions]])
    if stratify:
        strata, sizes, quotas = group_quotas(strata[:], split.columns[stratify], quotas, seed, stream)
    count = len(split.labels)
    chosen = count - int(quotas.sum()) if removes else int(quotas.sum())
    if chosen == 0 or (chosen == count and not removes):
        raise UserError(
            found=f"{option} {fraction}, which is {'all' if chosen else 'none'} of {plural(count, 'image')}",
            expected="at least one image in each split",
            hint="add images" if count < 2 else f"{option} {0.2 if count > 2 else 0.5}",
        )

    def masks() -> Iterator[NDArray[np.bool_]]:
        return iterate_stratified_mask(strata, sizes, quotas, seed, stream)

    both = Bitmap(masks()), Bitmap(~mask for mask in masks())
    return (both[1], both[0]) if removes else both
