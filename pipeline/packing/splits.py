"""The parts of a raw data set as a user wants them: test and val parts carved out of train, and train made smaller."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pipeline.common.rng import PARTITION_STREAM, permutation
from pipeline.common.stratified import stratified_mask
from pipeline.readers.raw_split import RawSplit
from shards.errors import UserError
from shards.manifest import REQUIRED_SPLITS, VALIDATION

# Independent of each other, and of the choices that are made when training.
_TEST_STREAM, _VAL_STREAM, _SUBSET_STREAM = (PARTITION_STREAM + number for number in (1, 2, 3))


def make_splits(
    parts: tuple[RawSplit, ...],
    *,
    test_fraction: float | None,
    val_fraction: float | None,
    subset: float,
    stratify: str,
    seed: int,
) -> tuple[RawSplit, ...]:
    """The parts train, test and perhaps val, in this order. A pure function of its arguments.

    test_fraction: share of a set without parts (only `train`) that becomes its test part. val_fraction: share of what
    then is the train part that becomes a val part. subset: share of the rest to keep for training; it changes neither
    test nor val. All are drawn by label; with stratify, the name of a column of the train part, also in proportion to
    its values within each label. Raises `UserError`.
    """
    by_name = {part.name: part for part in parts}
    train = by_name["train"]
    test, val = by_name.get(REQUIRED_SPLITS[1]), by_name.get(VALIDATION)
    if test is None and test_fraction is None:
        raise UserError(
            found="no test part in this data set",
            expected="a share of it to test on",
            hint="--test-fraction 0.2",
        )
    if test is not None and test_fraction is not None:
        raise UserError(
            found=f"--test-fraction {test_fraction} for a data set with a test part of {len(test.labels):,} images",
            expected="a data set without one",
            hint="leave --test-fraction out",
        )
    if val is not None and val_fraction is not None:
        raise UserError(
            found=f"--val-fraction {val_fraction} for a data set with a val part of {len(val.labels):,} images",
            expected="a data set without one",
            hint="leave --val-fraction out",
        )
    if stratify and stratify not in train.columns:
        raise UserError(
            found=f"--stratify {stratify}",
            expected=f"one of the columns {', '.join(train.columns)}"
            if train.columns
            else "no --stratify, as nothing but the labels is known of these images",
            hint=f"--stratify {next(iter(train.columns))}" if train.columns else "leave it out to choose by label",
        )
    if test_fraction is not None:
        train, test = _carve(train, REQUIRED_SPLITS[1], test_fraction, stratify, seed, _TEST_STREAM)
    if val_fraction is not None:
        train, val = _carve(train, VALIDATION, val_fraction, stratify, seed, _VAL_STREAM)
    if subset != 1:
        train = _keep(train, subset, stratify, seed)
    return tuple(part for part in (train, test, val) if part is not None)


def _carve(
    part: RawSplit, name: str, fraction: float, stratify: str, seed: int, stream: int
) -> tuple[RawSplit, RawSplit]:
    """What is left of a part, and the new one."""
    aside = _choose(part, fraction, stratify, seed, stream)
    if aside.all() or not aside.any():
        raise UserError(
            found=f"--{name}-fraction {fraction}, which is {'all' if aside.any() else 'none'} of {len(aside):,} images",
            expected="at least one image in each part",
            hint=f"--{name}-fraction 0.2",
        )
    return part.select(np.flatnonzero(~aside)), part.select(np.flatnonzero(aside), name)


def _keep(part: RawSplit, share: float, stratify: str, seed: int) -> RawSplit:
    """A part with a share of its images. What is chosen is to be left out, so that no class loses its last image."""
    left_out = _choose(part, 1 - share, stratify, seed, _SUBSET_STREAM)
    if left_out.all():
        raise UserError(
            found=f"--subset {share}, which is none of {len(left_out):,} images to train on",
            expected="at least one image",
            hint="--subset 0.1",
        )
    return part.select(np.flatnonzero(~left_out))


def _choose(part: RawSplit, fraction: float, stratify: str, seed: int, stream: int) -> NDArray[np.bool_]:
    """A mask of images in proportion by label, and by the values of the column to stratify by."""
    # Classes in random order: of many small ones not always the first give an image more.
    classes = permutation(len(part.classes), seed, stream)[part.labels]
    groups = np.unique(part.columns[stratify], return_inverse=True)[1] if stratify else None
    return stratified_mask(classes, fraction, seed, stream, groups)
