"""Arrays in npz files, as NumPy and Keras save them.

`--raw` names a file with x_train, y_train, x_test and y_test (and perhaps x_val, y_val), or with x and y, which is a
train part; or a directory with train.npz, test.npz and perhaps val.npz, each with x and y. Instead of x an array may be
called images, instead of y labels, and the part may come first (train_images). No pickled object is ever loaded.

Images: [N, H, W], [N, H, W, C] or [N, C, H, W], C being 1 or 3, whole numbers 0 .. 255 of any integer type. Floats are
refused: whether 1.0 is white or nearly black is for you to say.
Labels: [N] integers or texts, or one-hot [N, classes]. Class names are the texts, or those in an array `classes` (or
`class_names`) in the order of the numbers, or the numbers themselves.

Arrays are copied to a temporary file (TMPDIR), from which they are read as they are packed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.datasets.base import DatasetSource
from pipeline.readers.formats.npz import NpzFile
from pipeline.readers.naming import TRAIN, in_split_order, natural_order, number_labels, some_of, split_named
from pipeline.readers.raw_split import RawSplit, SourceOptions
from shards.errors import UserError

_KINDS = {"x": "images", "images": "images", "imgs": "images", "y": "labels", "labels": "labels"}
_CLASS_NAMES = ("classes", "class_names")
_CHANNELS = (1, 3)
_CHUNK_BYTES = 64 << 20
_EXPECTED = "x_train, y_train, x_test, y_test; or x and y; or images and labels"


@dataclass
class _Arrays:
    """The arrays of a part, by kind: the file they are in and their names."""

    file: NpzFile
    names: dict[str, str] = field(default_factory=dict)

    def place(self, kind: str) -> str:
        return self.file.place_of(self.names[kind])

    def get(self, kind: str) -> tuple[NDArray, str]:
        return self.file.array(self.names[kind]), self.place(kind)


def _plan(options: SourceOptions) -> str:
    return f"read the arrays in {options.raw}"


def _load(options: SourceOptions) -> tuple[RawSplit, ...]:
    found = _find_arrays(options.raw)
    names = _class_names(next(iter(found.values())).file)
    images = {part: _images(part, *arrays.get("images")) for part, arrays in found.items()}
    texts = {part: _labels(*arrays.get("labels"), names) for part, arrays in found.items()}
    classes, labels = number_labels(texts, options.raw, names)
    parts = []
    for part in in_split_order(found):
        shape, read, count = images[part]
        if count != len(labels[part]):
            arrays = found[part]
            raise UserError(
                found=f"{count:,} images in {arrays.place('images')} and {len(labels[part]):,} labels in "
                f"{arrays.place('labels')}",
                expected="as many labels as images",
                hint="save them again from arrays of one length",
            )
        parts.append(RawSplit(part, classes, labels[part], shape, False, read, found[part].file.records()))
    return tuple(parts)


def _find_arrays(raw: Path) -> dict[str, _Arrays]:
    """The arrays of each part, `train` among them."""
    found: dict[str, _Arrays] = {}
    for path, part_of_file in _files(raw):
        file = NpzFile(path)
        for name in file.names:
            part, kind = _meaning(name)
            if kind is None:
                continue
            arrays = found.setdefault(part or part_of_file, _Arrays(file))
            if kind in arrays.names:
                raise _unclear(raw, f"{name} and {arrays.names[kind]}, both {kind} of the {part or part_of_file} part")
            arrays.names[kind] = name
        if not found:
            raise _unclear(raw, f"the arrays {some_of(file.names)}" if file.names else "no array")
    for part, arrays in found.items():
        if len(arrays.names) < 2:
            raise _unclear(raw, f"only {', '.join(arrays.names.values())} for the {part} part")
    if TRAIN not in found:
        raise _unclear(raw, f"only {', '.join(found)} arrays")
    return found


def _files(raw: Path) -> list[tuple[Path, str]]:
    """The npz files, and the part that each holds unless its arrays say otherwise."""
    if not raw.is_dir():
        if not raw.exists():
            raise _unclear(raw, "nothing there")
        return [(raw, TRAIN)]
    paths = [raw / name for name in natural_order(path.name for path in raw.glob("*.npz"))]
    of_parts = [(path, part) for path in paths if (part := split_named(path.stem))]
    if len({part for _, part in of_parts}) < len(of_parts):
        raise _unclear(raw, f"{some_of([path.name for path, _ in of_parts])}, several for a part")
    if of_parts or len(paths) == 1:
        return of_parts or [(paths[0], TRAIN)]
    raise _unclear(raw, f"the npz files {some_of([path.name for path in paths])}" if paths else "no npz file")


def _meaning(name: str) -> tuple[str | None, str | None]:
    """The part that an array's name tells, if any, and its kind: x_train, train_images, labels, ..."""
    first, _, second = name.partition("_")
    if not second:
        return None, _KINDS.get(first.lower())
    if split_named(first):
        return split_named(first), _KINDS.get(second.lower())
    return (split_named(second), _KINDS.get(first.lower())) if split_named(second) else (None, None)


def _class_names(file: NpzFile) -> tuple[str, ...]:
    """Those that the file has, in the order of the numbers; none if it has none."""
    for name in file.names:
        if name.lower() in _CLASS_NAMES:
            array = file.array(name)
            if array.ndim != 1 or array.dtype.kind not in "US" or len(set(array.tolist())) < len(array):
                raise _wrong(file.place_of(name), array, "[classes] texts, all different")
            return tuple(_text(value) for value in array.tolist())
    return ()


def _labels(array: NDArray, place: str, names: tuple[str, ...]) -> list[str]:
    """The class of each image, by name."""
    if array.ndim == 2 and array.shape[1] > 1:
        array = _from_one_hot(array, place)
    if array.ndim == 2:
        array = array[:, 0]
    if array.ndim != 1 or array.dtype.kind not in "iuUS" or not len(array):
        raise _wrong(place, array, "[N] integers or texts, or one-hot [N, classes]")
    if array.dtype.kind in "US":
        texts = [_text(value) for value in array.tolist()]
        if names and (unknown := natural_order(set(texts) - set(names))):
            raise _wrong(place, array, f"names out of the array of classes, not {some_of(unknown)}")
        return texts
    if names and not 0 <= array.min() <= array.max() < len(names):
        raise _wrong(
            place, array, f"labels 0 .. {len(names) - 1}, as there are names, not {array.min()} .. {array.max()}"
        )
    return [names[value] if names else str(value) for value in array.tolist()]


def _from_one_hot(array: NDArray, place: str) -> NDArray[np.int64]:
    if array.dtype.kind not in "biuf" or not (((array == 0) | (array == 1)).all() and (array.sum(axis=1) == 1).all()):
        raise _wrong(place, array, "[N] integers or texts, or one-hot [N, classes]: a single 1 in each row")
    return array.argmax(axis=1)


def _images(part: str, array: NDArray, place: str):
    """Shape (H, W, C) of the images, what reads them, and how many they are."""
    if array.dtype.kind not in "iu":
        hint = "np.rint(x * 255).astype(np.uint8) if they are 0 .. 1, x.astype(np.uint8) if they are 0 .. 255"
        raise _wrong(place, array, "uint8 images 0 .. 255", hint)
    if array.ndim == 3:
        shape, planes = (*array.shape[1:], 1), False
    else:
        last, first = (array.ndim == 4 and array.shape[axis] in _CHANNELS for axis in (3, 1))
        if last == first:
            raise _wrong(place, array, "[N, H, W], [N, H, W, C] or [N, C, H, W], with C 1 or 3", "x.reshape(N, H, W)")
        shape, planes = (array.shape[1:], False) if last else ((*array.shape[2:], array.shape[1]), True)
    if array.dtype != np.uint8:
        _check_range(array, place)
    return shape, partial(_read, array, shape, planes), len(array)


def _read(array: NDArray, shape: tuple[int, int, int], planes: bool, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
    images = array[rows]
    if planes:
        images = images.transpose(0, 2, 3, 1)
    return np.ascontiguousarray(images, dtype=np.uint8).reshape(len(rows), *shape)


def _check_range(array: NDArray, place: str) -> None:
    step = max(1, _CHUNK_BYTES // max(1, array[:1].nbytes))
    for start in range(0, len(array), step):
        chunk = array[start : start + step]
        if chunk.size and not 0 <= chunk.min() <= chunk.max() <= 255:
            raise _wrong(place, array, f"values 0 .. 255, not {chunk.min()} .. {chunk.max()}", "scale them to 0 .. 255")


def _text(value: str | bytes) -> str:
    return value.decode("utf-8", errors="backslashreplace") if isinstance(value, bytes) else value


def _wrong(place: str, array: NDArray, expected: str, hint: str = "save the arrays again in that form") -> UserError:
    return UserError(found=f"{place}, {array.dtype} {list(array.shape)}", expected=expected, hint=hint)


def _unclear(raw: Path, found: str) -> UserError:
    return UserError(
        found=f"{found} in {raw}",
        expected=f"an npz file with {_EXPECTED}; or a directory with train.npz and test.npz",
        hint="np.savez(NAME, x_train=..., y_train=..., x_test=..., y_test=...)",
    )


SOURCES = (
    DatasetSource(
        name="npz",
        description="arrays of images and labels in npz files",
        plan=_plan,
        load=_load,
        generic=True,
    ),
)
