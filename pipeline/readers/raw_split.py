"""A split of a raw data set, ready to be packed, and the options with which it is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shards.errors import UserError
from shards.manifest import RawFile
from shards.stores.base import EncodedImage


class UnreadableImages(Exception):
    """Images that cannot be decoded: for each raw row, the place of the file and what is wrong with it."""

    def __init__(self, reasons: dict[int, str]) -> None:
        super().__init__(reasons)
        self.reasons = reasons


@dataclass(frozen=True)
class RawSplit:
    """One part of a raw data set, ready to be packed.

    name: `train`, `test` or `val`.
    classes: names, in the order of the labels.
    labels: int64 [N], 0 .. len(classes) - 1.
    image_shape: (H, W, C) of every image, as stored; (None, None, C) for image files of differing sizes.
    transposed: the pixels are stored with rows and columns exchanged.
    read: given raw rows int64 [n], the images uint8 [n, H, W, C], or a list of `EncodedImage` where the shape is
    (None, None, C). Raises `UnreadableImages`. Called from several processes and threads.
    files: what it was read from, with hashes.
    rows: int64 [N], the raw row of each image, which `read` is asked for; 0 .. N-1 by default.
    columns: further facts of each image, by column name, N values each (its `path`, its original database, ...).
    """

    name: str
    classes: tuple[str, ...]
    labels: NDArray[np.int64]
    image_shape: tuple[int | None, int | None, int]
    transposed: bool
    read: Callable[[NDArray[np.int64]], NDArray[np.uint8] | list[EncodedImage]]
    files: tuple[RawFile, ...] = ()
    rows: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    columns: Mapping[str, NDArray[np.str_]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse what could be packed but not be loaded; raises `UserError`."""
        shape = self.image_shape
        faults = (
            (len(shape) != 3, f"images of shape {shape}", "height, width and channels"),
            (shape[-1] not in (1, 3), f"{shape[-1]} channels", "1 (gray) or 3 (RGB)"),
            (any(side is not None and side < 1 for side in shape), f"images of shape {shape}", "at least one pixel"),
            (self.labels.ndim != 1 or not len(self.labels), f"labels of shape {self.labels.shape}", "[N], not empty"),
        )
        for wrong, found, expected in faults:
            if wrong:
                raise _unfit(self.name, found, expected)
        low, high = int(self.labels.min()), int(self.labels.max())
        if low < 0 or high >= len(self.classes):
            raise _unfit(self.name, f"labels {low} .. {high}", f"0 .. {len(self.classes) - 1}, as there are classes")
        if not len(self.rows):
            object.__setattr__(self, "rows", np.arange(len(self.labels)))
        assert len(self.rows) == len(self.labels)
        assert all(len(values) == len(self.labels) for values in self.columns.values())

    @property
    def encoded(self) -> bool:
        """Whether `read` gives image files instead of pixels."""
        return self.image_shape[0] is None

    def select(self, positions: NDArray[np.int64], name: str | None = None) -> RawSplit:
        """The part that holds only the images at these positions (int64 [n], 0 .. N-1), perhaps under another name."""
        return replace(
            self,
            name=name or self.name,
            labels=self.labels[positions],
            rows=self.rows[positions],
            columns={column: values[positions] for column, values in self.columns.items()},
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
        """A part that lies in memory: images uint8 [N, H, W, C], labels [N], integers. Raises `UserError`."""
        if images.dtype != np.uint8 or images.ndim != 4:
            raise _unfit(name, f"images of {images.dtype} {list(images.shape)}", "uint8 [N, H, W, C]")
        if not np.issubdtype(labels.dtype, np.integer):
            raise _unfit(name, f"labels of {labels.dtype}", "integers")
        if len(images) != len(labels):
            raise _unfit(name, f"{len(images)} images and {len(labels)} labels", "as many labels as images")
        return cls(
            name=name,
            classes=classes,
            labels=labels.astype(np.int64, copy=False),
            image_shape=images.shape[1:],
            transposed=transposed,
            read=images.__getitem__,
            files=files,
            columns=columns or {},
        )


def _unfit(part: str, found: str, expected: str) -> UserError:
    return UserError(found=f"{found} in the {part} part", expected=expected, hint="convert them before packing")


@dataclass(frozen=True)
class SourceOptions:
    """What a user asks of a source.

    raw: the directory or file to read. split: one of the source's splits, or empty. The rest is for sources of
    picture files: size: store all at one size, (H, W), None for the size they have; fit: how to bring them there,
    `pad`, `crop` or `stretch`; color: `gray`, `rgb`, or `auto` for what the pictures are; encoded: keep the files as
    they are. image_column, label_column: of a table.
    """

    raw: Path
    split: str = ""
    size: tuple[int, int] | None = None
    fit: str = "pad"
    color: str = "auto"
    encoded: bool = False
    image_column: str = ""
    label_column: str = ""
