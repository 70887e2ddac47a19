"""CIFAR-10 and CIFAR-100: 60,000 colour images each, 32x32 (Krizhevsky 2009).

https://www.cs.toronto.edu/~kriz/cifar.html, section "Binary version": a file is records of one length, label bytes and
then 3,072 bytes of an image, its red, green and blue plane. The pickled version would run whatever code stands in it,
and is not read. Of CIFAR-100, `--split fine` takes the 100 classes, `coarse` the 20 groups; the column of the other
name keeps the other label. Sizes and hashes as in the checksums of TensorFlow Datasets.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pipeline.datasets.base import DatasetSource
from pipeline.readers.download import Download
from pipeline.readers.naming import text_column
from pipeline.readers.raw_dir import PublishedArchive, RawContent
from pipeline.readers.raw_split import RawSplit, SourceOptions
from shards.errors import UserError
from shards.manifest import REQUIRED_SPLITS

_SIDE = 32
_PIXELS = 3 * _SIDE * _SIDE

_TEN_NAMES = "batches.meta.txt"
_TEN_FILES = {"train": tuple(f"data_batch_{number}.bin" for number in range(1, 6)), "test": ("test_batch.bin",)}
_TEN = PublishedArchive(
    Download(
        url="https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
        name="cifar-10-binary.tar.gz",
        bytes=170_052_171,
        sha256="c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
    ),
    names=(_TEN_NAMES, *_TEN_FILES["train"], *_TEN_FILES["test"]),
    label="CIFAR-10",
    unpacked="cifar-10-batches-bin",
)
_HUNDRED_CLASSES = {"coarse": 20, "fine": 100}  # in the order of the label bytes
_HUNDRED_NAMES = {kind: f"{kind}_label_names.txt" for kind in _HUNDRED_CLASSES}
_HUNDRED = PublishedArchive(
    Download(
        url="https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
        name="cifar-100-binary.tar.gz",
        bytes=168_513_733,
        sha256="58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
    ),
    names=(*_HUNDRED_NAMES.values(), *(f"{part}.bin" for part in REQUIRED_SPLITS)),
    label="CIFAR-100",
    unpacked="cifar-100-binary",
)


def _load_ten(options: SourceOptions) -> tuple[RawSplit, ...]:
    files = _TEN.open(options.raw)
    raw_names = files.read(_TEN_NAMES)
    classes = _read_names(raw_names, 10)
    parts = []
    for part, names in _TEN_FILES.items():
        raw = [files.read(name) for name in names]
        images, labels = zip(*(read_records(one, [10]) for one in raw), strict=True)
        records = (raw_names.record(), *(one.record() for one in raw))
        labels = np.concatenate(labels)[:, 0]
        parts.append(RawSplit.from_arrays(part, np.concatenate(images), labels, classes, files=records))
    return tuple(parts)


def _load_hundred(options: SourceOptions) -> tuple[RawSplit, ...]:
    files = _HUNDRED.open(options.raw)
    raw_names = {kind: files.read(name) for kind, name in _HUNDRED_NAMES.items()}
    classes = {kind: _read_names(raw_names[kind], count) for kind, count in _HUNDRED_CLASSES.items()}
    kind, other = ("fine", "coarse") if options.split == "fine" else ("coarse", "fine")
    parts = []
    for part in REQUIRED_SPLITS:
        raw = files.read(f"{part}.bin")
        images, table = read_records(raw, list(_HUNDRED_CLASSES.values()))
        labels = dict(zip(_HUNDRED_CLASSES, table.T, strict=True))
        records = (*(names.record() for names in raw_names.values()), raw.record())
        columns = {other: text_column(np.array(classes[other])[labels[other]].tolist())}
        parts.append(RawSplit.from_arrays(part, images, labels[kind], classes[kind], files=records, columns=columns))
    return tuple(parts)


def _read_names(raw: RawContent, count: int) -> tuple[str, ...]:
    """The class names in a text file, one a line; raises `UserError` if they are not so many."""
    names = tuple(raw.content.decode("ascii", errors="replace").split())
    if len(names) != count or not all(name.isprintable() and name.isascii() for name in names):
        raise _bad(raw, f"with {len(names)} names of classes", f"{count} names, one a line")
    return names


def read_records(raw: RawContent, classes: Sequence[int]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Decode the records of a file.

    Args:
        raw: The file.
        classes: The number of classes of each label byte.

    Returns:
        Images uint8 [N, 32, 32, 3], and labels int64 [N, len(classes)], the k-th below classes[k].

    Raises:
        UserError: The file is cut short or has a label out of range.
    """
    length = len(classes) + _PIXELS
    if not raw.content or len(raw.content) % length:
        raise _bad(raw, f"of {len(raw.content):,} bytes", f"a whole number of records of {length:,} bytes")
    records = np.frombuffer(raw.content, np.uint8).reshape(-1, length)
    labels = records[:, : len(classes)].astype(np.int64)
    if wrong := np.argwhere(labels >= np.array(classes)).tolist():
        row, column = wrong[0]
        raise _bad(raw, f"with label {labels[row, column]} in record {row}", f"labels 0 .. {classes[column] - 1}")
    planes = records[:, len(classes) :].reshape(-1, 3, _SIDE, _SIDE)
    return np.ascontiguousarray(planes.transpose(0, 2, 3, 1)), labels


def _bad(raw: RawContent, found: str, expected: str) -> UserError:
    return UserError(
        found=f"{raw.place} {found}",
        expected=f"{expected}, as published",
        hint="get it again: remove it or the archive it is in, and the archive is downloaded",
    )


SOURCES = (
    DatasetSource(
        name="cifar10",
        description="CIFAR-10, pictures of animals and vehicles, 32x32 RGB",
        plan=lambda options: _TEN.plan(options.raw),
        load=_load_ten,
    ),
    DatasetSource(
        name="cifar100",
        description="CIFAR-100, pictures of 100 classes (fine) or 20 (coarse), 32x32 RGB",
        splits=("fine", "coarse"),
        plan=lambda options: _HUNDRED.plan(options.raw),
        load=_load_hundred,
    ),
)
