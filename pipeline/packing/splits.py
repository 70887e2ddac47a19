"""Make the splits of a packed set from those of a raw data set: split off test and val, and subsample train."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from pipeline.common.rng import PARTITION_STREAM, permutation
from pipeline.common.stratified import stratified_mask
from pipeline.readers.naming import TEST, TRAIN, warn
from pipeline.readers.raw_split import RawSplit
from shards.errors import UserError, quote
from shards.manifest import VALIDATION, check_several_classes

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
            chosen = _choose(train, f"--{name}-fraction", fraction, stratify, seed, _STREAMS[name])
            result[name] = train.select(np.flatnonzero(chosen), name)
            train = train.select(np.flatnonzero(~chosen))
    if subset != 1:
        train = train.select(np.flatnonzero(_choose(train, "--subset", subset, stratify, seed, _STREAMS[TRAIN])))
    check_several_classes(
        train.classes, np.bincount(train.labels, minlength=len(train.classes)).tolist(), "the raw files"
    )
    return (train, *(result[name] for name in (TEST, VALIDATION) if name in result))


def _choose(split: RawSplit, option: str, fraction: float, stratify: str, seed: int, stream: int) -> NDArray[np.bool_]:
    """A mask of images in proportion by label, and by the values of the column to stratify by.

    Raises:
        UserError: If it holds no image, or all of them.
    """
    # Classes in random order: otherwise, of many small classes, always the first would contribute one more image.
    classes = permutation(len(split.classes), seed, stream)[split.labels]
    groups = np.unique(split.columns[stratify], return_inverse=True)[1] if stratify else None
    if option == "--subset":
        # The images to remove are chosen, so that no class loses its last image.
        chosen = ~stratified_mask(classes, 1 - fraction, seed, stream, groups)
    else:
        chosen = stratified_mask(classes, fraction, seed, stream, groups)
    if not chosen.any() or (chosen.all() and option != "--subset"):
        raise UserError(
            found=f"{option} {fraction}, which is {'all' if chosen.any() else 'none'} of {len(chosen):,} images",
            expected="at least one image in each split",
            hint=f"{option} 0.2",
        )
    return chosen
