"""What a person names to be predicted: picture files, directories, patterns, tables of truth and packed sets."""

from __future__ import annotations

import glob
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.ink.adapter import InputAdapter, UnusableImageError
from pipeline.readers.formats.csv import read_csv
from pipeline.readers.formats.image import EXTENSIONS
from pipeline.readers.naming import natural_key, printable, some_of
from shards import UserError
from shards.errors import as_user_error
from shards.manifest import MANIFEST_NAME, REQUIRED_SPLITS
from shards.open import open_dataset_or_split
from shards.remote.sets import is_remote
from shards.stores.base import Store
from shards.stores.image_header import MAX_BYTES
from trainer.inference.predictor import Predictor, upright_images

_FILE_COLUMNS = ("file", "path", "filename", "image", "picture")
_LABEL_COLUMNS = ("label", "class", "target", "truth", "character", "digit")
_KINDS = "picture files (PNG, JPEG, WebP, BMP, GIF), directories of them, patterns, a CSV table or a packed set"


class PictureFile(NamedTuple):
    """A picture to be read. label: its true class, None if nobody told."""

    path: Path
    label: int | None


class Sample(NamedTuple):
    """A picture as it was read. image: as the model takes it, None if it cannot be used, for which `note` says why.

    note: else what was done to it. label: its true class, None if nobody told.
    """

    name: str
    label: int | None
    image: NDArray[np.uint8] | None
    note: str


def find_inputs(names: Sequence[str], predictor: Predictor) -> list[PictureFile | Store]:
    """The pictures and packed parts behind what was named, those of a directory in natural order.

    Raises `UserError` for what is not there, holds no picture, or tells classes that the run does not know.
    """
    found: list[PictureFile | Store] = []
    for name in names:
        path = Path(name)
        if is_remote(name) or _is_packed(path):
            store = open_dataset_or_split(name, "test")
            predictor.check_store(store, name)
            found.append(store)
        elif path.is_dir():
            found += _directory(path)
        elif path.suffix.lower() == ".csv":
            found += _table(path, predictor)
        elif path.exists():
            found.append(PictureFile(path, None))
        else:
            found += _pattern(name)
    return found


def read_samples(inputs: Sequence[PictureFile | Store], predictor: Predictor) -> Iterator[list[Sample]]:
    """The samples of all inputs in their order, up to `predictor.batch_size` at a time."""
    batch: list[Sample] = []
    for one in inputs:
        for sample in [_read(one, predictor.adapter)] if isinstance(one, PictureFile) else _samples_of(one, predictor):
            batch.append(sample)
            if len(batch) == predictor.batch_size:
                yield batch
                batch = []
    if batch:
        yield batch


def _samples_of(store: Store, predictor: Predictor) -> Iterator[Sample]:
    part = f"{store.manifest.name}/{store.manifest.split}"
    for start in range(0, len(store), predictor.batch_size):
        samples = np.arange(start, min(start + predictor.batch_size, len(store)))
        for sample, image in zip(samples.tolist(), upright_images(store, samples), strict=True):
            yield Sample(f"{part} row {store.rows[sample]}", int(store.labels[sample]), image, "as it is stored")


def _read(one: PictureFile, adapter: InputAdapter) -> Sample:
    name = printable(str(one.path))
    try:
        if one.path.stat().st_size > MAX_BYTES:
            raise UnusableImageError(f"of more than {MAX_BYTES:,} bytes")
        taken = adapter.adapt(one.path.read_bytes())
    except UnusableImageError as error:
        return Sample(name, one.label, None, str(error))
    except OSError as error:
        return Sample(name, one.label, None, error.strerror or str(error))
    return Sample(name, one.label, taken.image, taken.description)


def _is_packed(path: Path) -> bool:
    return any((path / part / MANIFEST_NAME).is_file() for part in ("", *REQUIRED_SPLITS))


def _directory(path: Path) -> list[PictureFile]:
    files = sorted(
        (file for file in path.rglob("*") if file.suffix.lower()[1:] in EXTENSIONS and file.is_file()),
        key=lambda file: natural_key(file.as_posix()),
    )
    if not files:
        raise UserError(
            found=f"{path}, in which there is no picture",
            expected=_KINDS,
            hint=f"ls {path} shows what is there",
        )
    return [PictureFile(file, None) for file in files]


def _pattern(name: str) -> list[PictureFile]:
    files = sorted((Path(file) for file in glob.glob(name, recursive=True)), key=lambda file: natural_key(str(file)))
    files = [file for file in files if file.is_file()]
    if not files:
        kind = "no file that matches" if glob.has_magic(name) else "no"
        raise UserError(found=f"{kind} {name}", expected=_KINDS, hint=f"ls {Path(name).parent} shows what is there")
    return [PictureFile(file, None) for file in files]


def _table(path: Path, predictor: Predictor) -> list[PictureFile]:
    """The pictures that a table names, by paths from its directory, with their classes.

    Without a line of column names a row is a path and a class.
    """
    try:
        table = read_csv(path.read_bytes(), str(path))
    except OSError as error:
        raise as_user_error(error, path) from None
    if (path.parent / table.columns[0]).is_file():
        table = replace(table, columns=("file", "label"), rows=[list(table.columns[:2]), *table.rows])
        table = replace(table, lines=[1, *table.lines])
    files, labels = table.column(_FILE_COLUMNS, "file names"), table.column(_LABEL_COLUMNS, "true classes")
    numbers = {name: number for number, name in enumerate(predictor.classes)}
    for row, label in enumerate(labels):
        if label not in numbers:
            raise UserError(
                found=f"{table.place_of(row)}: class {printable(label)!r}",
                expected=f"a class of the run: {some_of(predictor.classes)}",
                hint="mend that line, or name the pictures alone to predict them without truth",
            )
    pictures = [PictureFile(path.parent / file, numbers[label]) for file, label in zip(files, labels, strict=True)]
    if not any(picture.path.is_file() for picture in pictures):
        raise UserError(
            found=f"{path}, of whose pictures none is there (no {pictures[0].path})",
            expected="paths from the directory of the table",
            hint="put the table where its paths lead to pictures",
        )
    return pictures
