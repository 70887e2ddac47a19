"""CIFAR-10: 60,000 colour pictures of ten classes, 32x32 (Krizhevsky 2009, https://www.cs.toronto.edu/~kriz/cifar.html).

Read from the binary archive; the pickled one would run whatever code stands in it. Size and hash as in the checksums of
TensorFlow Datasets.
"""

from __future__ import annotations

import numpy as np

from pipeline.datasets import RawPart, Request, Source
from pipeline.raw.cifar import have_archive, plan_archive, read_names, read_records
from pipeline.raw.download import Download

ARCHIVE = Download(
    url="https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
    name="cifar-10-binary.tar.gz",
    bytes=170_052_171,
    sha256="c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
)
_UNPACKED = "cifar-10-batches-bin"
_NAMES = "batches.meta.txt"
_FILES = {"train": tuple(f"data_batch_{number}.bin" for number in range(1, 6)), "test": ("test_batch.bin",)}
_ALL_FILES = (_NAMES, *_FILES["train"], *_FILES["test"])
_CLASSES = 10


def _plan(request: Request) -> str:
    return plan_archive(request, ARCHIVE, _UNPACKED, _ALL_FILES)


def _load(request: Request) -> tuple[RawPart, ...]:
    files = have_archive(request, ARCHIVE, _UNPACKED, _ALL_FILES)
    raw_names = files.read(_NAMES)
    classes = read_names(raw_names, _CLASSES)
    parts = []
    for part, names in _FILES.items():
        raw = [files.read(name) for name in names]
        images, labels = zip(*(read_records(one, [_CLASSES]) for one in raw), strict=True)
        records = (raw_names.record(), *(one.record() for one in raw))
        parts.append(
            RawPart.from_arrays(part, np.concatenate(images), np.concatenate(labels)[:, 0], classes, files=records)
        )
    return tuple(parts)


SOURCE = Source(
    name="cifar10",
    description="CIFAR-10, pictures of animals and vehicles, 32x32 RGB",
    splits=(),
    raw_files=True,
    plan=_plan,
    load=_load,
)
