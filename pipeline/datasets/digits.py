"""The handwritten digits of scikit-learn: 1,797 images, 8x8, without download.

They are a subset of Optical Recognition of Handwritten Digits (Alpaydin and Kaynak 1998,
https://doi.org/10.24432/C50P49) without official splits. The test split is a fixed stratified fifth.
"""

from __future__ import annotations

import numpy as np

from pipeline.common.stratified import stratified_mask
from pipeline.datasets.base import DatasetSource
from pipeline.readers.raw_split import RawSplit, SourceOptions
from shards.manifest import RawFile

_TEST_FRACTION = 0.2
_TEST_SEED = 0
_INK_LEVELS = 16  # a pixel counts the dark points of a 4x4 cell


def _load(options: SourceOptions) -> tuple[RawSplit, ...]:
    from sklearn.datasets import load_digits  # the import takes a second

    digits = load_digits()
    images = np.rint(digits.images * (255 / _INK_LEVELS)).astype(np.uint8)[..., None]
    labels = digits.target.astype(np.int64)
    content = images.tobytes() + labels.tobytes()
    record = RawFile.of_content("sklearn.datasets.load_digits", content)
    test = stratified_mask(labels, _TEST_FRACTION, _TEST_SEED)
    classes = tuple(str(name) for name in digits.target_names)
    return tuple(
        RawSplit.from_arrays(name, images[mask], labels[mask], classes, files=(record,))
        for name, mask in (("train", ~test), ("test", test))
    )


SOURCES = (
    DatasetSource(
        name="digits",
        description="the digits of scikit-learn, 8x8 gray, no download",
        raw_files=False,
        plan=lambda options: "read the digits of scikit-learn",
        load=_load,
    ),
)
