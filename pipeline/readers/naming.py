"""Names of splits, classes and files: natural order, class numbers, columns of text, and names in messages."""

from __future__ import annotations

import re
import sys
import unicodedata
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from shards.errors import UserError, printable
from shards.manifest import REQUIRED_SPLITS, SPLITS

TRAIN, TEST = REQUIRED_SPLITS
SPLIT_COLUMN = "split"  # of a table, in any case
_MAX_NAMES = 5  # in a message
_NUMBER = re.compile("[0-9]+")


def natural_key(name: str) -> tuple[str, str]:
    """Return a sort key for natural order: numbers by value (`2` before `10`), the directories of a path one by one."""
    # A key of text alone: tuples of numbers would take a kilobyte per name. The length of a number followed by its
    # digits compares as its value does. Numbers come before letters, the end of a directory's name before both.
    return _NUMBER.sub(_number_key, name.replace("/", "\0")), name


def natural_order(names: Iterable[str]) -> list[str]:
    """Return names sorted by `natural_key`."""
    return sorted(names, key=natural_key)


def _number_key(number: re.Match[str]) -> str:
    digits = number[0].lstrip("0")
    return f"\1{chr(len(digits))}{digits}"


def composed(name: str) -> str:
    """Return a name in Unicode NFC. File names from macOS may be decomposed: `e` and a combining accent, not `é`."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def some_of(names: Sequence[str]) -> str:
    """Return the first few names, for a message."""
    more = f" and {len(names) - _MAX_NAMES:,} more" if len(names) > _MAX_NAMES else ""
    return ", ".join(printable(name) for name in names[:_MAX_NAMES]) + more


def warn(text: str) -> None:
    """Print a warning."""
    print(f"warning: {text}", file=sys.stderr)


def text_column(values: Iterable[str]) -> NDArray[np.str_]:
    """Return texts as an array of variable-length strings."""
    return np.array([printable(value) for value in values], dtype=np.dtypes.StringDType())


def in_split_order(splits: Iterable[str]) -> list[str]:
    """Return split names in the order train, test, val."""
    return sorted(splits, key=SPLITS.index)


def class_name(label: int | str | None, names: tuple[str, ...]) -> str:
    """Return the name of a class.

    Args:
        label: The name, or the number of the class.
        names: The names of all classes in the order of their numbers; empty if they have only numbers.

    Raises:
        ValueError: If the label is None or not in the names.
    """
    if isinstance(label, int) and (not names or 0 <= label < len(names)):
        return names[label] if names else str(label)
    if isinstance(label, str) and (not names or label in names):
        return label
    raise ValueError(f"label {label}" + (f", not one of the {len(names)} classes {some_of(names)}" if names else ""))


def number_labels(
    labels: Mapping[str, Sequence[str]], source: object, names: tuple[str, ...] = ()
) -> tuple[tuple[str, ...], dict[str, NDArray[np.int64]]]:
    """Number the classes of a data set.

    Without `names`, labels that differ only in their Unicode normal form are one class.

    Args:
        labels: Class names of the images of each split; `train` is one of the splits.
        source: The directory or file, for messages.
        names: All classes in the order of their numbers; by default the classes in natural order.

    Returns:
        The class names, and the labels of each split as int64 [N].

    Raises:
        UserError: If a class has no training images.
    """
    if not names:
        labels = {split: list(map(composed, values)) for split, values in labels.items()}
    classes_of = {split: set(values) for split, values in labels.items()}
    for split, classes in classes_of.items():
        if extra := natural_order(classes - classes_of[TRAIN]):
            raise UserError(
                found=f"no training images of {some_of(extra)}, a class of the {split} split of {source}",
                expected="every class in the train split",
                hint="check the spelling of the class, or remove it from the other splits",
            )
    all_names = names or tuple(natural_order(classes_of[TRAIN]))
    numbers = {name: number for number, name in enumerate(all_names)}
    return tuple(printable(name) for name in all_names), {
        split: np.fromiter((numbers[value] for value in values), np.int64, len(values))
        for split, values in labels.items()
    }
