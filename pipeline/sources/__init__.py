"""Which raw data sets are known? One module each, found by its name; a new data set is a new file here.

A module of this package defines `SOURCE`, a `Source`. Importing it must load neither torch nor DALI.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shards.errors import UserError
from shards.manifest import RawFile


@dataclass(frozen=True)
class RawPart:
    """One part of a raw data set, ready to be packed.

    name: `train` or `test`.
    classes: names, in the order of the labels.
    labels: int64 [N], 0 .. len(classes) - 1.
    image_shape: (H, W, C) of every image, as stored.
    transposed: the pixels are stored with rows and columns exchanged.
    read: given source rows int64 [n], the images uint8 [n, H, W, C]. Called from several threads.
    files: what it was read from, with hashes.
    """

    name: str
    classes: tuple[str, ...]
    labels: NDArray[np.int64]
    image_shape: tuple[int, int, int]
    transposed: bool
    read: Callable[[NDArray[np.int64]], NDArray[np.uint8]]
    files: tuple[RawFile, ...] = ()

    def __post_init__(self) -> None:
        """Refuse what could be packed but not be loaded; raises `UserError`."""
        faults = (
            (len(self.image_shape) != 3, f"images of shape {self.image_shape}", "height, width and channels"),
            (self.image_shape[-1] not in (1, 3), f"{self.image_shape[-1]} channels", "1 (gray) or 3 (RGB)"),
            (min(self.image_shape) < 1, f"images of shape {self.image_shape}", "at least one pixel"),
            (self.labels.ndim != 1 or not len(self.labels), f"labels of shape {self.labels.shape}", "[N], not empty"),
        )
        for wrong, found, expected in faults:
            if wrong:
                raise _unfit(self.name, found, expected)
        low, high = int(self.labels.min()), int(self.labels.max())
        if low < 0 or high >= len(self.classes):
            raise _unfit(self.name, f"labels {low} .. {high}", f"0 .. {len(self.classes) - 1}, as there are classes")

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
    ) -> RawPart:
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
        )


def _unfit(part: str, found: str, expected: str) -> UserError:
    return UserError(found=f"{found} in the {part} part", expected=expected, hint="convert them before packing")


@dataclass(frozen=True)
class Source:
    """A data set that can be packed.

    name: as on the command line; splits: the names `--split` accepts (none: the set has no splits), the
    first is the default; raw_files: whether it reads files from a directory (`--raw`).
    plan: given the raw directory and the split, a line that says what would be read or downloaded.
    load: given the raw directory and the split, both parts, read (and downloaded) and checked.
    """

    name: str
    description: str
    splits: tuple[str, ...]
    raw_files: bool
    plan: Callable[[Path, str], str]
    load: Callable[[Path, str], tuple[RawPart, ...]]


def source_names() -> list[str]:
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def find_source(name: str) -> Source:
    """The source of a name out of `source_names()`."""
    return importlib.import_module(f"{__name__}.{name}").SOURCE
