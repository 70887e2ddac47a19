"""How people name parts, classes and files, and the order in which such names count."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from shards.errors import UserError
from shards.manifest import REQUIRED_SPLITS, SPLITS, VALIDATION

TRAIN, TEST = REQUIRED_SPLITS
_PART_NAMES = {
    "train": TRAIN,
    "training": TRAIN,
    "test": TEST,
    "testing": TEST,
    "val": VALIDATION,
    "valid": VALIDATION,
    "validation": VALIDATION,
}
_NAMED = 5  # names listed in a message
_NUMBER = re.compile("[0-9]+")


def split_named(name: str) -> str | None:
    """The part (`train`, `test` or `val`) that a directory, file or array of this name holds, if any."""
    return _PART_NAMES.get(name.lower())


def natural_key(name: str) -> tuple[str, str]:
    """Sorts names as people do, numbers by value (`2` before `10`); the same on every machine.

    Directories of a path (`a/b`) are compared one by one.
    """
    # Made of text alone, as tuples of numbers would take a kilobyte a name: the length of a number, then its digits,
    # compare as its value does. Numbers come before letters, and the end of a directory's name before both.
    return _NUMBER.sub(_number_key, name.replace("/", "\0")), name


def natural_order(names: Iterable[str]) -> list[str]:
    return sorted(names, key=natural_key)


def _number_key(number: re.Match[str]) -> str:
    digits = number[0].lstrip("0")
    return f"\1{chr(len(digits))}{digits}"


def printable(text: str) -> str:
    """A name as one can print and store it: control characters and undecodable bytes escaped."""
    if text.isprintable():
        return text
    return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in text)


def some_of(names: Sequence[str]) -> str:
    """The first few of some names, for a message."""
    more = f" and {len(names) - _NAMED:,} more" if len(names) > _NAMED else ""
    return ", ".join(printable(name) for name in names[:_NAMED]) + more


def text_column(values: Iterable[str]) -> NDArray[np.str_]:
    """Texts as an array in which each takes the room it needs."""
    return np.array([printable(value) for value in values], dtype=np.dtypes.StringDType())


def in_split_order(parts: Iterable[str]) -> list[str]:
    return sorted(parts, key=SPLITS.index)


def number_labels(
    labels: Mapping[str, Sequence[str]], place: object, names: tuple[str, ...] = ()
) -> tuple[tuple[str, ...], dict[str, NDArray[np.int64]]]:
    """Class names, and the labels of each part as int64 [N], their places among them.

    labels: names of classes, N of each part, `train` among the parts. names: all classes in their order, where one is
    given; else they are put in natural order. Raises `UserError` for a class without training images.
    """
    found = {part: set(values) for part, values in labels.items()}
    for part, in_part in found.items():
        if extra := natural_order(in_part - found[TRAIN]):
            raise UserError(
                found=f"no training images of {some_of(extra)}, which the {part} part of {place} has",
                expected="every class in the train part",
                hint="check how the class is spelled there, or remove it from the other parts",
            )
    classes = names or tuple(natural_order(found[TRAIN]))
    number = {name: label for label, name in enumerate(classes)}
    return tuple(printable(name) for name in classes), {
        part: np.fromiter((number[value] for value in values), np.int64, len(values)) for part, values in labels.items()
    }
