"""Inputs of `trainer.predict`: image files, directories, glob patterns, CSV tables with labels and packed data sets."""

from __future__ import annotations

import glob
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.ink.adapter import InputAdapter
from pipeline.ink.geometry import NoInkError
from pipeline.readers.archives.file_trees import DirectoryTree
from pipeline.readers.archives.files import CorruptFileError, corrupt_as_user_error
from pipeline.readers.formats.csv import read_csv
from pipeline.readers.formats.image import EXTENSIONS
from pipeline.readers.layout import LABEL_COLUMNS, PATH_COLUMNS, is_image
from pipeline.readers.naming import composed, natural_key, some_of
from shards import UserError
from shards.atomic import read_file
from shards.errors import os_errors_as_user_errors, printable, quote
from shards.manifest import REQUIRED_SPLITS, has_split
from shards.open import open_dataset_or_split
from shards.remote.datasets import is_remote
from shards.stores.base import Store
from shards.stores.image_header import MAX_BYTES
from trainer.predict.predictor import Predictor, upright_images

_PATH_COLUMNS = (*PATH_COLUMNS, "picture")
_LABEL_COLUMNS = (*LABEL_COLUMNS, "truth", "character", "digit")
_TABLES = (".csv", ".tsv")
_KINDS = (
    "image files (PNG, JPEG, WebP, BMP, GIF, TIFF), directories of them, patterns, a CSV or TSV table, or a packed "
    "data set"
)


class ImageFile(NamedTuple):
    """An image file with its true class (None if unknown)."""

    path: Path
    label: int | None


class Sample(NamedTuple):
    """An image that has been read.

    Attributes:
        name: Path of the file, or split and row.
        label: True class, None if unknown.
        image: The image as `Predictor.predict` accepts it; None if it is unusable.
        note: Conversion of the image, or the reason why it is unusable.
    """

    name: str
    label: int | None
    image: NDArray[np.uint8] | None
    note: str


def is_packed(name: str) -> bool:
    """Whether an input is an address, or a directory with a packed data set or one of its splits."""
    return is_remote(name) or any(has_split(Path(name), split) for split in ("", *REQUIRED_SPLITS))


def find_inputs(names: Sequence[str], predictor: Predictor) -> list[ImageFile | Store]:
    """Find the image files and packed splits of the command line, files of a directory in natural order.

    Raises:
        UserError: An input does not exist, contains no image, or has classes other than the run's.
    """
    inputs: list[ImageFile | Store] = []
    for name in names:
        if not name:
            raise UserError(found="an empty name of an input", expected=_KINDS, hint="name a file or directory")
        path = Path(name)
        if is_packed(name):
            store = open_dataset_or_split(name, "test")
            predictor.check_store(store, name)
            inputs.append(store)
        elif path.is_dir():
            files = [path / file for file in DirectoryTree(path).names if is_image(file) and (path / file).is_file()]
            inputs += _image_files(files, f"no image in {path}", path)
        elif path.suffix.lower() in _TABLES:
            inputs += _table(path, predictor)
        elif path.exists():
            inputs.append(_image_file(path, None, name))
        else:
            files = [Path(file) for file in glob.glob(name, recursive=True) if Path(file).is_file()]
            kind = "no file that matches" if glob.has_magic(name) else "no such file:"
            inputs += _image_files(files, f"{kind} {name}", path.parent)
    return inputs


def read_samples(inputs: Sequence[ImageFile | Store], predictor: Predictor) -> Iterator[list[Sample]]:
    """Read the samples of all inputs in their order, up to `predictor.batch_size` at a time."""
    samples = chain.from_iterable(
        [_read(each, predictor.adapter)] if isinstance(each, ImageFile) else _read_split(each, predictor.batch_size)
        for each in inputs
    )
    while batch := list(islice(samples, predictor.batch_size)):
        yield batch


def _read_split(store: Store, batch_size: int) -> Iterator[Sample]:
    split = f"{store.manifest.name}/{store.manifest.split}"
    for start in range(0, len(store), batch_size):
        samples = np.arange(start, min(start + batch_size, len(store)))
        for sample, image in zip(samples.tolist(), upright_images(store, samples), strict=True):
            yield Sample(f"{split} row {store.rows[sample]}", int(store.labels[sample]), image, "as stored")


def _read(file: ImageFile, adapter: InputAdapter) -> Sample:
    name = printable(str(file.path))
    try:
        adapted = adapter.adapt(read_file(file.path, MAX_BYTES))
    except (CorruptFileError, NoInkError, OSError) as error:
        return Sample(name, file.label, None, getattr(error, "strerror", None) or str(error))
    except UserError as error:
        return Sample(name, file.label, None, printable(error.found.removeprefix(f"{file.path}: ")))
    return Sample(name, file.label, adapted.image, adapted.description)


def _image_file(path: Path, label: int | None, source: str) -> ImageFile:
    """Return an image file; raise `UserError` for what has no end or is a directory."""
    if path.exists() and not path.is_file():
        raise UserError(found=f"{source}: {path} is not a regular file", expected=_KINDS, hint=f"ls -l {quote(path)}")
    return ImageFile(path, label)


def _image_files(files: list[Path], missing: str, directory: Path) -> list[ImageFile]:
    if not files:
        raise UserError(found=missing, expected=_KINDS, hint=f"ls {quote(directory)}")
    return [ImageFile(file, None) for file in sorted(files, key=lambda file: natural_key(file.as_posix()))]


def _image_path(directory: Path, name: str) -> Path:
    """Return the path of an image in a table, which may omit the extension."""
    path = directory / name.replace("\\", "/")
    if path.exists():
        return path
    return next((found for end in sorted(EXTENSIONS) if (found := path.with_name(f"{path.name}.{end}")).exists()), path)


def _table(path: Path, predictor: Predictor) -> list[ImageFile]:
    """Read the files and classes of a CSV or TSV table; paths are relative to its directory.

    Without column names, a row is a path and a class.
    """
    expected = "a CSV or TSV file in UTF-8, with a path and a class per line; a first line of column names is optional"
    with os_errors_as_user_errors(path), corrupt_as_user_error(path, expected, "save the table again as CSV (UTF-8)"):
        table = read_csv(read_file(path, MAX_BYTES), str(path))
    if len(table.columns) > 1 and (path.parent / table.columns[0]).is_file():
        table = table.headed(("file", "label"))
    files, labels = (
        table.column(names, what, hint="write the names file,label into its first line, or name the images themselves")
        for names, what in ((_PATH_COLUMNS, "file names"), (_LABEL_COLUMNS, "true classes"))
    )
    numbers = {composed(name): number for number, name in enumerate(predictor.classes)}
    labels = list(map(composed, labels))
    for row, label in enumerate(labels):
        if label not in numbers:
            raise UserError(
                found=f"{table.line(row)}: class {printable(label)!r}",
                expected=f"a class of the run: {some_of(predictor.classes)}",
                hint="correct this line, or name the image files to predict them without labels",
            )
    images = [
        _image_file(_image_path(path.parent, file), numbers[label], table.line(row))
        for row, (file, label) in enumerate(zip(files, labels, strict=True))
    ]
    if not any(image.path.is_file() for image in images):
        raise UserError(
            found=f"{path}, none of whose image files exists ({images[0].path})",
            expected="paths relative to the directory of the table",
            hint="move the table to the directory of the images",
        )
    return images
