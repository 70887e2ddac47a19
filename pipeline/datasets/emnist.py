"""EMNIST: 814,255 handwritten characters in six variants (Cohen et al. 2017, https://arxiv.org/abs/1702.05373).

`--raw` names a directory with the archive of NIST or its files, with the directory of torchvision (`EMNIST/raw`), or
with the files of Kaggle's copy (crawford/emnist) or its zip. Of Kaggle's two forms the idx files are preferred to the
tables, `emnist-VARIANT-train.csv`: a row is a label and 784 pixels, transposed as in the idx files.
"""

from __future__ import annotations

import io
import string
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from pipeline.datasets.base import DatasetSource, published_archive
from pipeline.datasets.mnist_family import read_idx_splits, torchvision_folders
from pipeline.readers.archives.files import CorruptFileError, corrupt_as_user_error
from pipeline.readers.formats.idx import check_pair
from pipeline.readers.raw_dir import PublishedFiles, RawContent
from pipeline.readers.raw_split import RawSplit, SourceOptions
from shards.errors import first_line
from shards.manifest import REQUIRED_SPLITS, RawFile

ARCHIVE = published_archive("emnist")
_MERGED = f"{string.digits}{string.ascii_uppercase}abdefghnqrt"
# The class names, where the mapping file is missing: torchvision deletes it.
_CLASSES = {
    "byclass": tuple(string.digits + string.ascii_uppercase + string.ascii_lowercase),
    "bymerge": tuple(_MERGED),
    "balanced": tuple(_MERGED),
    "letters": tuple(map("".join, zip(string.ascii_uppercase, string.ascii_lowercase, strict=True))),
    "digits": tuple(string.digits),
    "mnist": tuple(string.digits),
}
VARIANTS = tuple(_CLASSES)
_FOLDERS = (*torchvision_folders("EMNIST"), "gzip", "emnist_source_files")
_ARCHIVES = ("emnist-gzip.zip", "archive.zip", "emnist.zip")  # of Western Sydney, of Kaggle's page and its command
_SIDE = 28
_CHUNK = 1 << 24  # bytes of a table that are parsed at a time


def _pairs(variant: str) -> dict[str, tuple[str, str]]:
    """The idx files of images and labels of each split."""
    return {
        split: (f"emnist-{variant}-{split}-images-idx3-ubyte", f"emnist-{variant}-{split}-labels-idx1-ubyte")
        for split in REQUIRED_SPLITS
    }


def parse_mapping(raw: RawContent) -> tuple[tuple[str, ...], int]:
    """Parse a mapping file.

    A line is a label and the character codes of its class: `10 65`, or in `letters`, which is numbered from 1,
    `1 65 97`, which is named `Aa`.

    Returns:
        The class names in the order of the labels, and the label of the first class.

    Raises:
        UserError: If the file has another form.
    """
    with corrupt_as_user_error(
        raw.path, "lines of a label and character codes, such as '10 65'", f"get it again from {ARCHIVE.name}"
    ):
        try:
            lines = [list(map(int, line.split())) for line in raw.content.decode("ascii").splitlines() if line.strip()]
            labels = [line[0] for line in lines]
            names = tuple("".join(map(chr, line[1:])) for line in lines)
            if not labels or labels != list(range(labels[0], labels[0] + len(labels))) or not all(names):
                raise ValueError("labels are not consecutive")
        except (ValueError, OverflowError) as error:
            raise CorruptFileError(f"not a mapping file: {error}") from None
    return names, labels[0]


def _published(variant: str, tables: bool = False) -> PublishedFiles:
    names = (
        [f"emnist-{variant}-{split}.csv" for split in REQUIRED_SPLITS] if tables else chain(*_pairs(variant).values())
    )
    return PublishedFiles(tuple(names), (ARCHIVE,), variant, _FOLDERS, _ARCHIVES)


def _find(options: SourceOptions) -> tuple[PublishedFiles, bool]:
    """The files of the variant, and whether they are tables, which is so only if there are no idx files."""
    published, tables = _published(options.variant), _published(options.variant, tables=True)
    is_table = not tables.missing(options.raw) and bool(published.missing(options.raw))
    return (tables if is_table else published), is_table


def _load(options: SourceOptions) -> tuple[RawSplit, ...]:
    published, is_table = _find(options)
    directory = published.open(options.raw)
    classes, first_label = _CLASSES[options.variant], int(options.variant == "letters")
    mapping: tuple[RawFile, ...] = ()
    if not directory.missing([name := f"emnist-{options.variant}-mapping.txt"]):
        raw = directory.read(name)
        classes, first_label = parse_mapping(raw)
        mapping = (raw.record(),)
    if is_table:
        names = zip(REQUIRED_SPLITS, published.names, strict=True)
        splits = tuple(_read_table(split, directory.read(table), classes, first_label) for split, table in names)
    else:
        splits = read_idx_splits(directory, _pairs(options.variant), classes, first_label)
    return tuple(replace(split, transposed=True, files=(*split.files, *mapping)) for split in splits)


def _read_table(split: str, raw: RawContent, classes: tuple[str, ...], first_label: int) -> RawSplit:
    with corrupt_as_user_error(raw.path, "rows of a label and 784 pixels, as Kaggle publishes them", "get it again"):
        if not raw.content.strip():
            raise CorruptFileError("empty")
        rows = np.concatenate(list(_parse_rows(raw.content)))
    images, labels = rows[:, 1:].reshape(-1, _SIDE, _SIDE, 1), rows[:, 0].astype(np.int64)
    check_pair(raw, len(images), raw, labels, len(classes), first_label)
    return RawSplit.from_arrays(split, images, labels - first_label, classes, files=(raw.record(),))


def _parse_rows(content: bytes) -> Iterator[NDArray[np.uint8]]:
    """Yield rows of a table, uint8 [N, 785]."""
    file = io.BytesIO(content)
    while chunk := file.read(_CHUNK) + file.readline():
        lines = chunk.strip().replace(b"\r", b"").split(b"\n")
        try:
            if any(line.count(b",") != _SIDE * _SIDE for line in lines):
                raise ValueError(f"a line without {1 + _SIDE * _SIDE} values")
            rows = np.fromstring(b",".join(lines), np.int64, sep=",").reshape(len(lines), 1 + _SIDE * _SIDE)
        except ValueError as error:
            raise CorruptFileError(f"not a table of pixels: {first_line(error)}") from None
        if rows.min(initial=0) < 0 or rows.max(initial=0) > np.iinfo(np.uint8).max:
            raise CorruptFileError(f"values {rows.min()} .. {rows.max()}")
        yield rows.astype(np.uint8)


SOURCES = (
    DatasetSource(
        name="emnist",
        description="EMNIST, handwritten letters and digits, 28x28 gray, six variants",
        variants=VARIANTS,
        plan=lambda options: _find(options)[0].plan(options.raw),
        load=_load,
    ),
)
