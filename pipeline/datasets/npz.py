"""Arrays in npz files, as NumPy and Keras save them.

`--raw` names a file with x_train, y_train, x_test and y_test (and optionally x_val, y_val), or with x and y, which is
the train split; or a directory with train.npz, test.npz and optionally val.npz, each with x and y. x may be named
images, y may be named labels, and the split may come first (train_images). Pickled objects are never loaded.

Images: [N, H, W], [N, H, W, C] or [N, C, H, W], C being 1 or 3, integers 0 .. 255 of any type. Floats are refused,
because 1.0 may be white or nearly black.
Labels: [N] integers or texts, or one-hot [N, classes]. Class names are the texts, or an array `classes` (or
`class_names`) in the order of the numbers, or the numbers themselves.

Arrays are copied to a temporary file (TMPDIR), from which they are read during packing.
"""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.datasets.base import DatasetSource
from pipeline.readers.archives.file_trees import is_hidden
from pipeline.readers.formats.npz import NpzFile
from pipeline.readers.naming import TRAIN, class_name, in_split_order, natural_order, number_labels, some_of, warn
from pipeline.readers.raw_split import RawSplit
from shards.errors import UserError
from shards.manifest import split_named, splits_in

_KINDS = {"x": "images", "images": "images", "imgs": "images", "y": "labels", "labels": "labels"}
_CLASS_NAMES = ("classes", "class_names")
_CHANNELS = (1, 3)
_MAX_CHANNELS = 16  # a longer axis is one of pixels
_LABELS = "[N] integers or texts, or one-hot [N, classes] with a single 1 in each row"


class _Member(NamedTuple):
    """An array of a file."""

    file: NpzFile
    name: str

    def read(self) -> tuple[NDArray, str]:
        return self.file.array(self.name), self.file.path_of(self.name)


def read_npz(raw: Path, names: tuple[str, ...] = ()) -> tuple[RawSplit, ...]:
    """Read the splits of an npz file or of a directory of npz files.

    Args:
        raw: The file or directory.
        names: The class names in the order of the labels; by default those in the file.

    Raises:
        UserError: If the arrays are damaged, missing or of another kind.
    """
    arrays = _find_arrays(raw)
    files = {split: {member.file: None for member in of_split.values()} for split, of_split in arrays.items()}
    names = names or next(filter(None, (_class_names(file) for of_split in files.values() for file in of_split)), ())
    images = {split: _images(*of_split["images"].read()) for split, of_split in arrays.items()}
    labels_by_name = {split: _labels(*of_split["labels"].read(), names) for split, of_split in arrays.items()}
    classes, labels = number_labels(labels_by_name, raw, names)
    splits = []
    for split in in_split_order(arrays):
        pixels, path = images[split], arrays[split]["images"].file.path
        if len(pixels) != len(labels[split]):
            raise UserError(
                found=f"{len(pixels):,} images in {path} and {len(labels[split]):,} labels in the {split} split",
                expected="one label per image",
                hint="save them again from arrays of one length",
            )
        read = partial(_read, pixels)
        records = tuple(record for file in files[split] for record in file.records)
        splits.append(RawSplit(split, classes, labels[split], pixels.shape[1:], False, read, records))
    return tuple(splits)


def _find_arrays(raw: Path) -> dict[str, dict[str, _Member]]:
    """The arrays of each split, by kind; `train` is one of the splits."""
    arrays: dict[str, dict[str, _Member]] = {}
    unused: list[str] = []
    for path, split_of_file in _files(raw):
        file = NpzFile(path)
        for name in file.names:
            split, kind = _parse(name, split_of_file)
            if kind is None:
                unused += [name] if name.lower() not in _CLASS_NAMES else []
                continue
            of_split = arrays.setdefault(split, {})
            if kind in of_split:
                raise _unclear(raw, f"{name} and {of_split[kind].name}, both {kind} of the {split} split")
            of_split[kind] = _Member(file, name)
        if not arrays:
            raise _unclear(raw, f"the arrays {some_of(file.names)}" if file.names else "no array")
    for split, of_split in arrays.items():
        if len(of_split) < 2:
            raise _unclear(raw, f"only {', '.join(member.name for member in of_split.values())} for the {split} split")
    if TRAIN not in arrays:
        raise _unclear(raw, f"only {', '.join(arrays)} arrays")
    if unused:
        warn(f"not used: the arrays {some_of(unused)} in {raw}")
    return arrays


def _files(raw: Path) -> list[tuple[Path, str]]:
    """The npz files, and the split of each if its arrays name none."""
    if not raw.is_dir():
        if not raw.exists():
            raise _unclear(raw, "nothing")
        return [(raw, TRAIN)]
    names = natural_order(path.name for path in raw.glob("*.npz") if not is_hidden(path.name))
    splits = {name: splits_in(Path(name).stem) for name in names}
    named = [(raw / name, min(found)) for name, found in splits.items() if len(found) == 1]
    if len({split for _, split in named}) < len(named):
        raise _unclear(raw, f"{some_of([path.name for path, _ in named])}, several files of one split")
    if named and len(named) < len(names):
        unnamed = some_of([name for name in names if len(splits[name]) != 1])
        raise _unclear(raw, f"{unnamed}, which is named after no split or several, beside {named[0][0].name}")
    if not named and len(names) != 1:
        raise _unclear(raw, f"the npz files {some_of(names)}" if names else "no npz file")
    return named or [(raw / names[0], TRAIN)]


def _parse(name: str, default: str) -> tuple[str, str | None]:
    """The split and kind in an array's name: x_train, train_images, labels, ...; None if it is another array."""
    first, _, second = name.lower().partition("_")
    if split_named(first):
        first, second = second, first
    split = split_named(second) if second else default
    return (split, _KINDS.get(first)) if split else (default, None)


def _class_names(file: NpzFile) -> tuple[str, ...]:
    """The class names in the file in the order of their numbers; empty if it has none."""
    for name in file.names:
        if name.lower() in _CLASS_NAMES:
            array = file.array(name)
            if array.ndim != 1 or array.dtype.kind not in "US" or len(set(array.tolist())) < len(array):
                raise _wrong(file.path_of(name), array, "[classes] texts, all different")
            return tuple(str(_text(value)) for value in array.tolist())
    return ()


def _labels(array: NDArray, path: str, names: tuple[str, ...]) -> list[str]:
    """The class name of each image."""
    values = array
    if array.ndim == 2 and array.shape[1] > 1:
        is_number = array.dtype.kind in "biuf"
        if not (is_number and ((array == 0) | (array == 1)).all() and (array.sum(axis=1) == 1).all()):
            raise _wrong(path, array, _LABELS)
        values = array.argmax(axis=1)
    elif array.ndim == 2:
        values = array[:, 0]
    if values.ndim != 1 or values.dtype.kind not in "iuUS" or not len(values):
        raise _wrong(path, array, _LABELS)
    try:
        return [class_name(_text(value), names) for value in values.tolist()]
    except ValueError as error:
        raise _wrong(path, array, f"only labels of the array of classes: {error}") from None


def _images(array: NDArray, path: str) -> NDArray:
    """The images [N, H, W, C], integers 0 .. 255."""
    if array.dtype.kind not in "iu":
        hint = "np.rint(x * 255).astype(np.uint8) if they are 0 .. 1, x.astype(np.uint8) if they are 0 .. 255"
        raise _wrong(path, array, "uint8 images 0 .. 255", hint)
    pixels = array[..., None] if array.ndim == 3 else array
    if array.ndim != 3:
        is_last, is_first = (array.ndim == 4 and array.shape[axis] in _CHANNELS for axis in (3, 1))
        if is_last == is_first:
            raise _wrong(path, array, "[N, H, W], [N, H, W, C] or [N, C, H, W], with C 1 or 3", _shape_hint(array))
        pixels = array if is_last else array.transpose(0, 2, 3, 1)
    if array.dtype != np.uint8 and array.size and not 0 <= array.min() <= array.max() <= 255:
        raise _wrong(path, array, f"values 0 .. 255, not {array.min()} .. {array.max()}", "scale them to 0 .. 255")
    return pixels


def _shape_hint(array: NDArray) -> str:
    """How an array of images gets a shape that is accepted."""
    side = math.isqrt(array.shape[1]) if array.ndim == 2 else 0
    if side and side * side == array.shape[1]:
        return f"x.reshape(-1, {side}, {side})"
    if array.ndim == 4 and array.shape[3] <= _MAX_CHANNELS:
        return f"keep 1 or 3 of the {array.shape[3]} channels: x[..., :{3 if array.shape[3] > 3 else 1}]"
    if array.ndim == 4 and array.shape[1] <= _MAX_CHANNELS:
        return f"keep 1 or 3 of the {array.shape[1]} channels: x[:, :{3 if array.shape[1] > 3 else 1}]"
    return "x.reshape(-1, HEIGHT, WIDTH) or x.reshape(-1, HEIGHT, WIDTH, 3)"


def _read(array: NDArray, numbers: NDArray[np.int64]) -> NDArray[np.uint8]:
    return np.ascontiguousarray(array[numbers], dtype=np.uint8)


def _text(value: str | bytes | int) -> str | int:
    return value.decode("utf-8", errors="backslashreplace") if isinstance(value, bytes) else value


def _wrong(path: str, array: NDArray, expected: str, hint: str = "save the arrays again in that form") -> UserError:
    return UserError(found=f"{path}, {array.dtype} {list(array.shape)}", expected=expected, hint=hint)


def _unclear(raw: Path, found: str) -> UserError:
    return UserError(
        found=f"{found} in {raw}",
        expected="an npz file with x_train, y_train, x_test, y_test, or x and y, or images and labels; or a directory "
        "with train.npz and test.npz",
        hint="np.savez(NAME, x_train=..., y_train=..., x_test=..., y_test=...)",
    )


SOURCES = (
    DatasetSource(
        name="npz",
        description="arrays of images and labels in npz files",
        plan=lambda options: f"read the arrays in {options.raw}",
        load=lambda options: read_npz(options.raw),
        generic=True,
    ),
)
