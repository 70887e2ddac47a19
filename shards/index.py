"""Make tar shards that others have written, with one picture a record, a set that trains, without repacking them.

    python -m shards.index DIR [--classes FILE]

DIR holds train/*.tar and test/*.tar (and val/*.tar, if there is such a part), or is one split. The shards are ordinary
WebDataset: a picture (.jpg, .jpeg, .png, .webp or .bmp) and a class number (.cls) under each key; other components are
passed over. The shards stay as they are; written are an index (.idx) beside each and, at the end, a manifest a split.
"""

from __future__ import annotations

import argparse
import hashlib
import platform
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from shards.atomic import write_file
from shards.cli import program_name, run_command
from shards.cpus import available_cpus
from shards.errors import MismatchError, NotFoundError, UserError, as_user_error
from shards.manifest import MANIFEST_NAME, REQUIRED_SPLITS, SPLITS, Manifest, Shard
from shards.stores.base import INDEX_VERSION
from shards.stores.image_header import MAX_BYTES, read_image_header
from shards.stores.record_index import (
    NotANumber,
    bad_record,
    choose,
    index_content,
    index_file,
    index_line,
    index_name,
    name_in_index,
    read_numbers,
    read_places,
    read_records,
    same_places,
)

_MOST_CLASSES = 1_000_000
_MOST_HEADER = 16 << 20  # bytes of a picture in which its size must be found


class _Scan(NamedTuple):
    """A shard, its index, the int64 [n] labels of its records, and whether all its pictures are without colour."""

    shard: Shard
    index: bytes
    labels: NDArray[np.int64]
    with_rows: bool
    gray: bool


def index(directory: Path, class_names: tuple[str, ...] | None) -> tuple[Manifest, ...]:
    """Index a set or a split; its manifests. Raises `UserError`, and then nothing was written.

    class_names: in the order of the labels; None for the numbers themselves.
    """
    splits = _find_splits(directory)
    scans = {split: _scan_split(path, split) for split, path in splits.items()}
    everything = [scan for split in splits for scan in scans[split]]
    highest = max(int(scan.labels.max()) for scan in everything)
    classes = class_names or tuple(map(str, range(highest + 1)))
    if highest >= len(classes):
        raise UserError(
            found=f"label {highest} in {directory}",
            expected=f"0 .. {len(classes) - 1}, as there are names of {len(classes)} classes",
            hint="give a name for each class: --classes FILE, one a line",
        )
    # Pictures of all splits make one kind of model input.
    channels = 1 if all(scan.gray for scan in everything) else 3
    place = directory.absolute()
    dataset = place.parent.name if list(splits.values()) == [directory] and place.name in splits else place.name
    manifests = {split: _manifest(dataset, split, classes, channels, scans[split]) for split in splits}
    for split, path in splits.items():
        _check_manifest(path, manifests[split])
    for split, path in splits.items():
        for scan in scans[split]:
            _write(path / index_name(scan.shard), scan.index)
    for split, path in splits.items():
        _write(path / MANIFEST_NAME, manifests[split].to_json().encode())
    return tuple(manifests.values())


def read_classes(path: Path) -> tuple[str, ...]:
    """Names of classes from a text file, one a line; raises `UserError`."""
    try:
        names = path.read_text(encoding="utf-8").rstrip().split("\n")
        names = [name.strip() for name in names]
    except FileNotFoundError:
        raise NotFoundError(
            found=f"no such file: {path}",
            expected="a text file with the name of a class in each line",
            hint="name another",
        ) from None
    except UnicodeDecodeError as error:
        raise UserError(
            found=f"{path}, which is no UTF-8 text: {error}", expected="a class in each line", hint="convert it"
        ) from None
    seen: set[str] = set()
    for number, name in enumerate(names, start=1):
        if not name or name in seen:
            raise UserError(
                found=f"{path}: line {number} {'is empty' if not name else f'names {name!r} again'}",
                expected="another class in each line, in the order of the labels",
                hint="give each class a name of its own",
            )
        seen.add(name)
    return tuple(names)


def _find_splits(directory: Path) -> dict[str, Path]:
    """The splits by name: those in a set, or the directory itself."""
    if not directory.is_dir():
        raise NotFoundError(
            found=f"no such directory: {directory}",
            expected="a directory of tar shards",
            hint="name the one that holds them",
        )
    splits = {split: directory / split for split in SPLITS if (directory / split).is_dir()}
    missing = [split for split in REQUIRED_SPLITS if split not in splits]
    if splits and missing:
        raise UserError(
            found=f"{directory} with {' and '.join(splits)}, but without {' and '.join(missing)}",
            expected=f"the splits {' and '.join(REQUIRED_SPLITS)}, and val if there is one",
            hint=f"add or rename one: {directory / missing[0]}; or index one split alone: {directory / min(splits)}",
        )
    return splits or {
        directory.absolute().name if directory.absolute().name in SPLITS else REQUIRED_SPLITS[0]: directory
    }


def _scan_split(directory: Path, split: str) -> list[_Scan]:
    paths = sorted(path for path in directory.glob("*.tar") if not path.name.startswith("."))
    if not paths:
        compressed = next((path for kind in ("*.tar.*", "*.tgz") for path in sorted(directory.glob(kind))), None)
        raise UserError(
            found=f"{directory} without .tar files" + (f", but with {compressed.name}" if compressed else ""),
            expected="uncompressed tar shards, in which any picture can be read by its place",
            hint="uncompress them" if compressed else "name the directory that holds the shards, or train/ and test/",
        )
    # Reading and hashing run side by side.
    with ThreadPoolExecutor(available_cpus()) as pool:
        scans = list(tqdm(pool.map(_scan, paths), f"indexing {split}", len(paths), unit=" shards", disable=None))
    for scan in scans:
        if scan.with_rows != scans[0].with_rows:
            with_rows, without = (scan, scans[0]) if scan.with_rows else (scans[0], scan)
            raise UserError(
                found=f"{directory}: {with_rows.shard.name} with rows (.row), {without.shard.name} without",
                expected="a row in every record, or in none",
                hint="index shards of different origin as different sets",
            )
    return scans


def _scan(path: Path) -> _Scan:
    """Read through a shard; raises `UserError` for whatever could not be trained on."""
    with open(path, "rb", buffering=0) as file:
        lines, with_rows, gray = _read_through(file, path)
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        size = file.tell()
    content = index_content(lines)
    places = read_places(content)
    data = np.memmap(path, np.uint8, mode="r")
    try:
        labels = read_numbers(data, places.labels)
        if places.rows is not None:
            read_numbers(data, places.rows)
    except NotANumber as fault:
        name = name_in_index(content, fault.record)
        raise bad_record(path, name, f"has the label or row {fault.text!r}, which is no number") from None
    too_high = np.flatnonzero(labels >= _MOST_CLASSES)
    if len(too_high):
        name = name_in_index(content, int(too_high[0]))
        raise bad_record(path, name, f"has the label {labels[too_high[0]]}, {_MOST_CLASSES:,} or more")
    shard = Shard(name=path.name, samples=len(lines), bytes=size, sha256=digest, blocks_crc32=())
    return _Scan(shard, _settled_index(path, content), labels, with_rows, gray)


def _read_through(file: BinaryIO, path: Path) -> tuple[list[str], bool, bool]:
    """The lines of a shard's index, whether its records have rows, and whether all pictures are without colour."""
    lines: list[str] = []
    with_rows, gray = False, True
    for key, components in read_records(path):
        try:
            choice = choose(tuple(components))
        except ValueError as error:
            raise bad_record(path, key, f"has {error}") from None
        if lines and (choice.row is not None) != with_rows:
            raise bad_record(path, key, f"{'lacks' if with_rows else 'has'} a row, unlike others")
        with_rows = choice.row is not None
        picture = list(components.values())[choice.picture]
        if picture.size > MAX_BYTES:
            raise bad_record(path, picture.name, f"is of {picture.size:,} bytes, more than {MAX_BYTES:,}")
        file.seek(picture.offset)
        try:
            gray &= read_image_header(file.read(min(picture.size, _MOST_HEADER))).gray
        except ValueError as error:
            raise bad_record(path, picture.name, f"is {error}") from None
        lines.append(index_line(components))
    if not lines:
        raise UserError(
            found=f"{path} without any record", expected="pictures with labels", hint="remove it, or fetch it again"
        )
    return lines, with_rows, gray


def _settled_index(shard: Path, content: bytes) -> bytes:
    """The index that stands beside a shard, by `wds2idx` perhaps, if it says what ours (`content`) says; or else ours.

    Raises `UserError` if it says something else, which may be of use to someone.
    """
    path = shard.with_suffix(".idx")
    if not path.exists():
        return content
    found = path.read_bytes() if path.stat().st_size < 4 * len(content) else b""
    if not same_places(content, found):
        raise MismatchError(
            found=f"{path}, which is not the {INDEX_VERSION} index of {shard.name} as it is now",
            expected="that index, or none",
            hint=f"remove it (what an index says is in the shard, too): rm {path}",
        )
    return found


def _manifest(dataset: str, split: str, classes: tuple[str, ...], channels: int, scans: list[_Scan]) -> Manifest:
    labels = np.concatenate([scan.labels for scan in scans])
    return Manifest(
        store="records",
        dataset=dataset,
        variant="",
        split=split,
        classes=classes,
        counts=tuple(np.bincount(labels, minlength=len(classes)).tolist()),
        image_shape=(None, None, channels),
        transposed=False,
        samples=len(labels),
        block_size=1,
        seed=0,
        shards=tuple(scan.shard for scan in scans),
        files=tuple(index_file(scan.shard, scan.index) for scan in scans),
        raw=(),
        versions={"inkstream": version("inkstream"), "numpy": np.__version__, "python": platform.python_version()},
    )


def _check_manifest(directory: Path, manifest: Manifest) -> None:
    """Raise `UserError` if another manifest than this one stands in a split."""
    path = directory / MANIFEST_NAME
    if path.exists() and Manifest.read(directory).digest() != manifest.digest():
        raise MismatchError(
            found=f"{path}, which tells of something else than the shards that are there",
            expected="the manifest of these shards (and classes), or none",
            hint=f"if they are to be indexed as they are: rm {path}",
        )


def _write(path: Path, content: bytes) -> None:
    if path.exists():
        return  # and was found to say the same
    try:
        write_file(path, content)
    except OSError as error:
        raise as_user_error(error, path) from None


def main() -> int:
    parser = argparse.ArgumentParser(
        prog=program_name("shards.index"),
        description="Make WebDataset shards that others have written a set that trains, without repacking them.",
    )
    parser.add_argument("directory", type=Path, metavar="DIR", help="holds train/*.tar and test/*.tar, or is one split")
    parser.add_argument("--classes", type=Path, metavar="FILE", help="names of the classes, one a line (else: numbers)")
    arguments = parser.parse_args()
    for manifest in index(arguments.directory, read_classes(arguments.classes) if arguments.classes else None):
        print(
            f"{manifest.split}: {manifest.samples:,} pictures of {len(manifest.classes)} classes in "
            f"{len(manifest.shards)} shards, {manifest.packed_bytes:,} bytes, "
            f"{'gray' if manifest.image_shape[2] == 1 else 'in colour'}"
        )
    print(f"train on them with data.shards={arguments.directory}")
    return 0


if __name__ == "__main__":
    run_command(main)
