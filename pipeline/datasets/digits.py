"""Handwritten digits that scikit-learn carries inside its package: 1,797 images, 8x8, no download.

Part of the Optical Recognition of Handwritten Digits set (Alpaydin and Kaynak 1998,
https://doi.org/10.24432/C50P49). It has no official parts; ours are a fixed stratified fifth for testing.
"""

from __future__ import annotations

import hashlib

import numpy as np

from pipeline.common.stratified import stratified_mask
from pipeline.datasets.base import DatasetSource
from pipeline.readers.raw_split import RawSplit, SourceOptions
from shards.manifest import RawFile

_TEST_FRACTION = 0.2
_TEST_SEED = 0
_INK_LEVELS = 16  # the pixels count the dark points of a 4x4 cell


def _plan(options: SourceOptions) -> str:
    return "read the digits inside scikit-learn"


def _load(options: SourceOptions) -> tuple[RawSplit, ...]:
    from sklearn.datasets import load_digits  # takes a second, so only when needed

    digits = load_digits()
    images = np.rint(digits.images * (255 / _INK_LEVELS)).astype(np.uint8)[..., None]
    labels = digits.target.astype(np.int64)
    content = images.tobytes() + labels.tobytes()
    record = RawFile(
        name="sklearn.datasets.load_digits", bytes=len(content), sha256=hashlib.sha256(content).hexdigest()
    )
    test = stratified_mask(labels, _TEST_FRACTION, _TEST_SEED)
    classes = tuple(str(name) for name in digits.target_names)
    return tuple(
        RawSplit.from_arrays(name, images[mask], labels[mask], classes, files=(record,))
        for name, mask in (("train", ~test), ("test", test))
    )


SOURCES = (
    DatasetSource(
        name="digits",
        description="the digits inside scikit-learn, 8x8 gray, no download",
        raw_files=False,
        plan=_plan,
        load=_load,
    ),
)
