"""CIFAR-100: 60,000 colour pictures, 32x32, of 100 classes in 20 groups (Krizhevsky 2009).

https://www.cs.toronto.edu/~kriz/cifar.html. `--split fine` takes the 100 classes, `coarse` the 20; the column of the
other name keeps the other one. Read from the binary archive; the pickled one would run whatever code stands in it.
Size and hash as in the checksums of TensorFlow Datasets.
"""

from __future__ import annotations

import numpy as np

from pipeline.datasets import RawPart, Request, Source
from pipeline.raw.cifar import have_archive, plan_archive, read_names, read_records
from pipeline.raw.download import Download
from pipeline.readers.naming import text_column
from shards.manifest import PARTS

ARCHIVE = Download(
    url="https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
    name="cifar-100-binary.tar.gz",
    bytes=168_513_733,
    sha256="58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
)
_UNPACKED = "cifar-100-binary"
_CLASSES = {"coarse": 20, "fine": 100}  # in the order of the label bytes
_NAMES = {kind: f"{kind}_label_names.txt" for kind in _CLASSES}
_FILES = (*_NAMES.values(), *(f"{part}.bin" for part in PARTS))


def _plan(request: Request) -> str:
    return plan_archive(request, ARCHIVE, _UNPACKED, _FILES)


def _load(request: Request) -> tuple[RawPart, ...]:
    files = have_archive(request, ARCHIVE, _UNPACKED, _FILES)
    raw_names = {kind: files.read(name) for kind, name in _NAMES.items()}
    classes = {kind: read_names(raw_names[kind], count) for kind, count in _CLASSES.items()}
    parts = []
    for part in PARTS:
        raw = files.read(f"{part}.bin")
        images, table = read_records(raw, list(_CLASSES.values()))
        labels = dict(zip(_CLASSES, table.T, strict=True))
        other = "coarse" if request.split == "fine" else "fine"
        parts.append(
            RawPart.from_arrays(
                part,
                images,
                labels[request.split],
                classes[request.split],
                files=(*(names.record() for names in raw_names.values()), raw.record()),
                columns={other: text_column(np.array(classes[other])[labels[other]].tolist())},
            )
        )
    return tuple(parts)


SOURCE = Source(
    name="cifar100",
    description="CIFAR-100, pictures of 100 classes (fine) or 20 (coarse), 32x32 RGB",
    splits=("fine", "coarse"),
    raw_files=True,
    plan=_plan,
    load=_load,
)
