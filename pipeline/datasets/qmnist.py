"""QMNIST: MNIST reconstructed from the NIST forms, with its 50,000 lost test digits (Yadav and Bottou 2019).

https://arxiv.org/abs/1905.10498, https://github.com/facebookresearch/qmnist. The training digits and the first 10,000
test digits correspond one by one to those of MNIST; `--split test10k` keeps only these for testing. The columns
`writer` and `series` hold the writer of a digit and the series of forms (0 and 1: employees, 4: students).
Sizes and hashes are those of the checksums of TensorFlow Datasets.
"""

from __future__ import annotations

import numpy as np

from pipeline.datasets.base import DatasetSource
from pipeline.datasets.mnist_family import DIGITS, published_in_gzip
from pipeline.readers.formats.idx import check_pair, decode, decode_table
from pipeline.readers.naming import text_column
from pipeline.readers.raw_split import RawSplit, SourceOptions
from shards.manifest import REQUIRED_SPLITS

_PUBLISHED = published_in_gzip("qmnist", torchvision="QMNIST")
_COLUMNS = 8  # class, series, writer, number of the digit of this writer, ... (section 2.2 of its page)
_SERIES, _WRITER = 1, 2
_MNIST_TEST_SIZE = 10_000


def _load(options: SourceOptions) -> tuple[RawSplit, ...]:
    files = _PUBLISHED.open(options.raw)
    splits = []
    for split in REQUIRED_SPLITS:
        raw_images = files.read(f"qmnist-{split}-images-idx3-ubyte")
        raw_labels = files.read(f"qmnist-{split}-labels-idx2-int")
        images, table = decode(raw_images, 3)[..., None], decode_table(raw_labels, _COLUMNS)
        labels = table[:, 0].astype(np.int64)
        check_pair(raw_images, len(images), raw_labels, labels, len(DIGITS))
        records = (raw_images.record(), raw_labels.record())
        columns = {
            name: text_column(map(str, table[:, column].tolist()))
            for name, column in (("writer", _WRITER), ("series", _SERIES))
        }
        splits.append(RawSplit.from_arrays(split, images, labels, DIGITS, files=records, columns=columns))
    train, test = splits
    if options.variant == "test10k":
        test = test.select(np.arange(len(test.labels))[:_MNIST_TEST_SIZE])
    return train, test


SOURCES = (
    DatasetSource(
        name="qmnist",
        description="QMNIST, MNIST with all its 60,000 test digits and their writers, 28x28 gray",
        variants=("test60k", "test10k"),
        plan=lambda options: _PUBLISHED.plan(options.raw),
        load=_load,
    ),
)
