"""Quick, Draw!: 50,426,266 drawings of 345 classes as 28x28 bitmaps (Ha and Eck 2017).

https://arxiv.org/abs/1704.03477, https://github.com/googlecreativelab/quickdraw-dataset. A class is a file,
`numpy_bitmap/NAME.npy`, uint8 [N, 784]; there are no official splits. `--split all` downloads what is missing of all
classes (39.5 GB), `--split present` packs the classes whose files are in the directory. Drawings are read from the
files when they are packed, so they need not fit into memory. Sizes and hashes are those of the checksums of TensorFlow
Datasets.
"""

from __future__ import annotations

import urllib.parse
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from pipeline.common.process_pool import default_workers, map_in_processes
from pipeline.datasets.base import DatasetSource, published
from pipeline.readers.archives.files import CorruptFileError, corrupt_as_user_error, open_file
from pipeline.readers.download import Download
from pipeline.readers.formats.npz import read_header
from pipeline.readers.naming import TRAIN
from pipeline.readers.raw_dir import PublishedFiles
from pipeline.readers.raw_split import RawSplit, SourceOptions, computed_array
from shards.errors import UserError, quote
from shards.manifest import RawFile

_ADDRESS = "https://storage.googleapis.com/quickdraw_dataset/full/numpy_bitmap/"
_SIDE = 28
_PIXELS = _SIDE * _SIDE
_IMAGES_PER_READ = 8192  # with 512, opening up to 345 files takes most of the time


def _published(options: SourceOptions) -> PublishedFiles:
    """The files of all classes, or of those whose files are there."""
    files = {f"{name}.npy": content for name, content in published("quickdraw").items()}
    if options.variant == "present":
        files = {name: content for name, content in files.items() if (options.raw / name).is_file()}
    downloads = tuple(
        Download(_ADDRESS + urllib.parse.quote(name), name, size, sha256) for name, (size, sha256) in files.items()
    )
    return PublishedFiles(tuple(files), downloads, f"{len(files)} Quick, Draw!")


def _load(options: SourceOptions) -> tuple[RawSplit, ...]:
    files = _published(options)
    if not files.names:
        raise UserError(
            found=f"no file of Quick, Draw! in {options.raw}",
            expected="files of classes, named as published: airplane.npy, alarm clock.npy, ...",
            hint=f"download them from {_ADDRESS} and name their directory with --raw",
        )
    directory = files.open(options.raw)
    paths = [directory.path(name) for name in files.names]
    counts, offsets = zip(*map(_inspect, paths), strict=True)
    firsts = np.cumsum((0, *counts))
    read = partial(_read, paths, np.array(offsets), firsts)
    labels = computed_array(int(firsts[-1]), lambda numbers: np.searchsorted(firsts, numbers, side="right") - 1)
    classes = tuple(name.removesuffix(".npy") for name in files.names)
    with tqdm(total=int(firsts[-1]), desc="hashing", unit=" images", unit_scale=True, disable=None, leave=False) as bar:
        records = tuple(
            map_in_processes(lambda n: RawFile.of(paths[n].parent, paths[n].name), counts, default_workers(), bar)
        )
    shape = (_SIDE, _SIDE, 1)
    return (RawSplit(TRAIN, classes, labels, shape, False, read, records, images_per_read=_IMAGES_PER_READ),)


def _inspect(path: Path) -> tuple[int, int]:
    """The number of drawings in a file, and the offset of the first."""
    with _errors(path):
        stored = open_file(path)
        with stored.file as file:
            shape, fortran_order, dtype = read_header(file)
            offset = file.tell()
        if dtype != np.uint8 or len(shape) != 2 or shape[1] != _PIXELS or shape[0] < 1 or fortran_order:
            raise CorruptFileError(f"it holds {dtype} {list(shape)}, not uint8 [N, {_PIXELS}]")
        if stored.size != offset + shape[0] * _PIXELS:
            raise CorruptFileError(f"of {stored.size:,} bytes, where its header says {shape[0]:,} drawings")
    return shape[0], offset


def _read(
    paths: list[Path], offsets: NDArray[np.int64], firsts: NDArray[np.int64], numbers: NDArray[np.int64]
) -> NDArray[np.uint8]:
    """Read drawings. Files are opened one by one: a process may not be allowed to have hundreds open."""
    images = np.empty((len(numbers), _PIXELS), np.uint8)
    in_order = np.argsort(numbers)
    owners = np.searchsorted(firsts, numbers[in_order], side="right") - 1
    starts = offsets[owners] + (numbers[in_order] - firsts[owners]) * _PIXELS
    first_of_file = np.flatnonzero(np.diff(owners, prepend=-1))
    for begin, end in zip(first_of_file, (*first_of_file[1:], len(owners)), strict=True):
        path = paths[owners[begin]]
        stored = open_file(path)
        with _errors(path), stored.file:
            for row, start in zip(in_order[begin:end].tolist(), starts[begin:end].tolist(), strict=True):
                stored.read_into(start, images[row])
    return images.reshape(-1, _SIDE, _SIDE, 1)


def _errors(path: Path) -> AbstractContextManager[None]:
    return corrupt_as_user_error(
        path,
        expected=f"a complete npy file of drawings, uint8 [N, {_PIXELS}], as published",
        hint=f"remove it and run again to download it: rm {quote(path)}",
    )


SOURCES = (
    DatasetSource(
        name="quickdraw",
        description="Quick, Draw!, 50 million drawings of 345 classes, 28x28 gray, needs --test-fraction",
        variants=("all", "present"),
        plan=lambda options: _published(options).plan(options.raw),
        load=_load,
        has_test=False,
    ),
)
