"""A split of a raw data set, ready for packing, and the options with which it is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from pipeline.common.bitmap import Bitmap
from shards.errors import UserError
from shards.manifest import RawFile
from shards.stores.base import EncodedImage


class UnreadableImages(Exception):
    """Images that cannot be decoded.

    Args:
        reasons: The path and the error of each image, by its source index.
    """

    def __init__(self, reasons: dict[int, str]) -> None:
        super().__init__(reasons)
        self.reasons = reasons


_PIECE = 1 << 16  # labels at a time


class _ComputedArray(np.lib.mixins.NDArrayOperatorsMixin):
    """See `computed_array`."""

    def __init__(self, count: int, compute: Callable[[NDArray[np.int64]], NDArray[np.int64]]) -> None:
        self.shape = (count,)
        self.ndim = 1
        self._compute = compute

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, slice):
            return self._compute(np.arange(*key.indices(len(self))))
        positions = np.asarray(key)
        if positions.dtype == bool:
            positions = np.flatnonzero(positions)
        if not positions.ndim and not 0 <= positions < len(self):
            raise IndexError(f"{positions} outside 0 .. {len(self) - 1}")
        return self._compute(positions) if positions.ndim else self._compute(positions[None])[0]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[np.int64]:
        return np.asarray(self[:], dtype)

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **options: Any) -> Any:
        arrays = (np.asarray(each) if isinstance(each, _ComputedArray) else each for each in inputs)
        return getattr(ufunc, method)(*arrays, **options)

    def max(self, **options: Any) -> Any:
        return max(self[first : first + _PIECE].max() for first in range(0, len(self), _PIECE))

    def tolist(self) -> list[int]:
        return self[:].tolist()


def computed_array(count: int, compute: Callable[[NDArray[np.int64]], NDArray[np.int64]]) -> NDArray[np.int64]:
    """Return an array of integers that are computed when they are read, and so take no memory.

    Slices and indices return arrays; arithmetic and the functions of NumPy compute all values.

    Args:
        count: The number of values.
        compute: Returns the values at positions int64 [n], int64 [n].
    """
    return cast(NDArray[np.int64], _ComputedArray(count, compute))


@dataclass(frozen=True)
class RawSplit:
    """One split of a raw data set, ready for packing.

    Attributes:
        name: `train`, `test` or `val`.
        classes: The class names in the order of the labels.
        labels: Integers [N], 0 .. len(classes) - 1. Labels and indices may be computed (`computed_array`).
        image_shape: (H, W, C) of every image as stored; (None, None, C) for image files of different sizes.
        transposed: Whether the pixels are stored with rows and columns exchanged.
        read: Returns the images of source indices int64 [n]: uint8 [n, H, W, C], or a list of `EncodedImage` if the
            shape is (None, None, C). Raises `UnreadableImages`. Several processes and threads call it.
        files: The raw files with their hashes.
        source_index: Integers [N], the index of each image in the raw data; 0 .. N-1 by default.
        columns: Further values of each image, N per column (`path`, `database`, ...).
        images_per_read: Images that `read` is called for at a time, if they are more than a block.

    Raises:
        UserError: If the images or labels could not be loaded once packed.
    """

    name: str
    classes: tuple[str, ...]
    labels: NDArray[np.int64]
    image_shape: tuple[int | None, int | None, int]
    transposed: bool
    read: Callable[[NDArray[np.int64]], NDArray[np.uint8] | list[EncodedImage]]
    files: tuple[RawFile, ...] = ()
    source_index: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    columns: Mapping[str, NDArray[np.str_]] = field(default_factory=dict)
    images_per_read: int = 1

    def __post_init__(self) -> None:
        shape, labels, last = self.image_shape, self.labels, len(self.classes) - 1
        _require(len(shape) == 3, self.name, f"images of shape {shape}", "height, width and channels")
        _require(shape[-1] in (1, 3), self.name, f"{shape[-1]} channels", "1 (gray) or 3 (RGB)")
        _require(all(side != 0 for side in shape), self.name, f"images of shape {shape}", "at least one pixel")
        _require(labels.ndim == 1 and len(labels) > 0, self.name, f"labels of shape {labels.shape}", "[N], not empty")
        if isinstance(labels, np.ndarray):
            low, high = int(labels.min()), int(labels.max())
            _require(low >= 0 and high <= last, self.name, f"labels {low} .. {high}", f"0 .. {last}, one per class")
        if not len(self.source_index):
            object.__setattr__(self, "source_index", computed_array(len(labels), np.positive))
        assert len(self.source_index) == len(labels)
        assert all(len(values) == len(labels) for values in self.columns.values())

    @property
    def encoded(self) -> bool:
        """Whether `read` returns image files instead of pixels."""
        return self.image_shape[0] is None

    def class_counts(self) -> NDArray[np.int64]:
        """Count the images of each class, int64 [classes]."""
        counts = np.zeros(len(self.classes), np.int64)
        for first in range(0, len(self.labels), _PIECE):
            counts += np.bincount(self.labels[first : first + _PIECE], minlength=len(counts))
        return counts

    def select(self, positions: NDArray[np.int64] | Bitmap, name: str | None = None) -> RawSplit:
        """Return the split with only the images at some positions.

        Args:
            positions: int64 [n], 0 .. N-1. With a bitmap, labels and source indices are computed when they are read.
            name: A new name of the split.
        """
        return replace(
            self,
            name=name or self.name,
            labels=_select(self.labels, positions),
            source_index=_select(self.source_index, positions),
            columns={column: _select(values, positions)[:] for column, values in self.columns.items()},
        )

    @classmethod
    def from_arrays(
        cls,
        name: str,
        images: NDArray[np.uint8],
        labels: NDArray[np.int64],
        classes: tuple[str, ...],
        *,
        transposed: bool = False,
        files: tuple[RawFile, ...] = (),
        columns: Mapping[str, NDArray[np.str_]] | None = None,
    ) -> RawSplit:
        """Return a split of images in memory.

        Args:
            name: `train`, `test` or `val`.
            images: uint8 [N, H, W, C].
            labels: Integers [N], 0 .. len(classes) - 1.
            classes: The class names.
            transposed: Whether the pixels are stored with rows and columns exchanged.
            files: The raw files with their hashes.
            columns: Further values of each image, N per column.

        Raises:
            UserError: If the arrays have other types or shapes.
        """
        is_image_array, is_integer = images.dtype == np.uint8 and images.ndim == 4, labels.dtype.kind in "iu"
        _require(is_image_array, name, f"images of {images.dtype} {list(images.shape)}", "uint8 [N, H, W, C]")
        _require(is_integer, name, f"labels of {labels.dtype}", "integers")
        counts = f"{len(images)} images and {len(labels)} labels"
        _require(len(images) == len(labels), name, counts, "one label per image")
        return cls(
            name=name,
            classes=classes,
            labels=labels.astype(np.int64, copy=False) if labels.dtype.itemsize == 8 else labels,
            image_shape=images.shape[1:],
            transposed=transposed,
            read=images.__getitem__,
            files=files,
            columns=columns or {},
        )


def _select(values: NDArray, positions: NDArray[np.int64] | Bitmap) -> NDArray:
    if not isinstance(positions, Bitmap):
        return values[positions]
    return computed_array(len(positions), lambda ranks: values[positions[ranks]])


def _require(is_right: bool, split: str, found: str, expected: str) -> None:
    if not is_right:
        raise UserError(found=f"{found} in the {split} split", expected=expected, hint="convert them before packing")


@dataclass(frozen=True)
class SourceOptions:
    """The options with which a data set is read.

    Attributes:
        raw: The directory or file to read.
        variant: One of the variants of the data set, or empty.
        size: Size (H, W) at which image files are stored; None for their own size.
        fit: How image files are resized: `pad`, `crop` or `stretch`.
        color: `gray`, `rgb`, or `auto` for the channels of the image files.
        encoded: Whether image files are stored as they are.
        image_column: The column of paths or images in a table; empty to detect it.
        label_column: The column of labels in a table; empty to detect it.
        skip_bad: Whether rows of a table and files that cannot be used are skipped with a warning.
        out: The directory that is written; it is not read if it is inside `raw`.
    """

    raw: Path
    variant: str = ""
    size: tuple[int, int] | None = None
    fit: str = "pad"
    color: str = "auto"
    encoded: bool = False
    image_column: str = ""
    label_column: str = ""
    skip_bad: bool = False
    out: Path | None = None
