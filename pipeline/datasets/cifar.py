"""CIFAR-10 and CIFAR-100: 60,000 colour images each, 32x32 (Krizhevsky 2009).

https://www.cs.toronto.edu/~kriz/cifar.html, section "Binary version": a file is a sequence of records of equal length,
label bytes and then 3,072 bytes of an image, its red, green and blue plane. The pickled version is not read, because
unpickling runs code. Of CIFAR-100, `--split fine` selects the 100 classes, `coarse` the 20 groups; a column holds the
other label. Sizes and hashes are those of the checksums of TensorFlow Datasets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from pipeline.datasets.base import DatasetSource, published_archive
from pipeline.readers.download import Download
from pipeline.readers.naming import text_column
from pipeline.readers.raw_dir import PublishedFiles, RawContent
from pipeline.readers.raw_split import RawSplit, SourceOptions
from shards.errors import UserError

_SIDE = 32
_PIXELS = 3 * _SIDE * _SIDE


@dataclass(frozen=True)
class _Cifar:
    """One of the two data sets.

    Attributes:
        archive: The published archive.
        label: The name of the data set.
        unpacked: The directory to which the archive unpacks.
        files: The files of each split.
        variants: The file of class names and the number of classes of each label byte, by variant.
    """

    archive: Download
    label: str
    unpacked: str
    files: Mapping[str, tuple[str, ...]]
    variants: Mapping[str, tuple[str, int]]

    @property
    def published(self) -> PublishedFiles:
        names = [name for name, _ in self.variants.values()] + [name for names in self.files.values() for name in names]
        return PublishedFiles(tuple(names), (self.archive,), self.label, (self.unpacked,))


_CIFAR10 = _Cifar(
    published_archive("cifar10"),
    unpacked="cifar-10-batches-bin",
    label="CIFAR-10",
    files={"train": tuple(f"data_batch_{number}.bin" for number in range(1, 6)), "test": ("test_batch.bin",)},
    variants={"": ("batches.meta.txt", 10)},
)
_CIFAR100 = _Cifar(
    published_archive("cifar100"),
    unpacked="cifar-100-binary",
    label="CIFAR-100",
    files={"train": ("train.bin",), "test": ("test.bin",)},
    variants={"coarse": ("coarse_label_names.txt", 20), "fine": ("fine_label_names.txt", 100)},
)


def _load(cifar: _Cifar, options: SourceOptions) -> tuple[RawSplit, ...]:
    directory = cifar.published.open(options.raw)
    raw_names = [directory.read(name) for name, _ in cifar.variants.values()]
    counts = [count for _, count in cifar.variants.values()]
    names = [_read_names(raw, count) for raw, count in zip(raw_names, counts, strict=True)]
    used = list(cifar.variants).index(options.variant)
    splits = []
    for split, files in cifar.files.items():
        raw = [directory.read(name) for name in files]
        images, labels = map(np.concatenate, zip(*(read_records(each, counts) for each in raw), strict=True))
        columns = {
            variant: text_column(np.array(names[byte])[labels[:, byte]].tolist())
            for byte, variant in enumerate(cifar.variants)
            if byte != used
        }
        records = tuple(each.record() for each in (*raw_names, *raw))
        splits.append(RawSplit.from_arrays(split, images, labels[:, used], names[used], files=records, columns=columns))
    return tuple(splits)


def _read_names(raw: RawContent, count: int) -> tuple[str, ...]:
    """The class names in a text file, one per line."""
    names = tuple(raw.content.decode("ascii", errors="replace").split())
    if len(names) != count or not all(name.isprintable() and name.isascii() for name in names):
        raise _corrupt(raw, f"with {len(names)} of {count} class names", "all of them, one per line")
    return names


def read_records(raw: RawContent, classes: Sequence[int]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Decode the records of a file.

    Args:
        raw: The file.
        classes: The number of classes of each label byte.

    Returns:
        Images uint8 [N, 32, 32, 3], and labels int64 [N, len(classes)], the k-th below classes[k].

    Raises:
        UserError: If the file is incomplete or has a label out of range.
    """
    length = len(classes) + _PIXELS
    if not raw.content or len(raw.content) % length:
        raise _corrupt(raw, f"of {len(raw.content):,} bytes", f"complete records of {length:,} bytes")
    records = np.frombuffer(raw.content, np.uint8).reshape(-1, length)
    labels = records[:, : len(classes)].astype(np.int64)
    if wrong := np.argwhere(labels >= np.array(classes)).tolist():
        row, column = wrong[0]
        raise _corrupt(raw, f"with label {labels[row, column]} in record {row}", f"labels 0 .. {classes[column] - 1}")
    planes = records[:, len(classes) :].reshape(-1, 3, _SIDE, _SIDE)
    return np.ascontiguousarray(planes.transpose(0, 2, 3, 1)), labels


def _corrupt(raw: RawContent, found: str, expected: str) -> UserError:
    return UserError(
        found=f"{raw.path} {found}",
        expected=f"{expected}, as published",
        hint="remove the file, or the archive that contains it, and run again to download the archive",
    )


SOURCES = (
    DatasetSource(
        name="cifar10",
        description="CIFAR-10, images of animals and vehicles, 32x32 RGB",
        plan=lambda options: _CIFAR10.published.plan(options.raw),
        load=partial(_load, _CIFAR10),
    ),
    DatasetSource(
        name="cifar100",
        description="CIFAR-100, images of 100 classes (fine) or 20 (coarse), 32x32 RGB",
        variants=("fine", "coarse"),
        plan=lambda options: _CIFAR100.published.plan(options.raw),
        load=partial(_load, _CIFAR100),
    ),
)
