"""Adopt WebDataset shards of other tools as a packed data set, without rewriting them.

    python -m shards.index DIR [--classes FILE]

DIR holds train/*.tar and test/*.tar (and optionally val/*.tar), or shards side by side that are named after their
splits (train-0000.tar, birds-validation-00.tar), or is one split. Splits may have the names that the Hugging Face Hub
knows (training, validation, valid, dev, eval, ...). Without a test split, val is the test split. Shards that are not in
the directory of their split (train/, test/, val/) are linked there. The shards are ordinary WebDataset:
an image (.jpg, .jpeg, .png, .webp or .bmp) and a class number (.cls) per key; other components are ignored. The shards
are not changed. The command writes an index (.idx) beside each shard, the arrays of labels, rows and byte ranges, and
then a manifest per split.
"""

from __future__ import annotations

import os
import re
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
from isal import isal_zlib
from numpy.typing import NDArray
from tqdm import tqdm

from shards.atomic import created_directory, detect_replacement, file_lock, read_file, write_file
from shards.cli import command_parser, plural, run_command
from shards.errors import MismatchError, NotFoundError, UserError, os_errors_as_user_errors, printable, quote
from shards.limits import available_cpus
from shards.manifest import (
    ARRAYS,
    MANIFEST_NAME,
    REQUIRED_SPLITS,
    SPLITS,
    VALIDATION,
    VERSION,
    Manifest,
    RawFile,
    Shard,
    has_split,
    is_file_name,
    is_packed_dataset,
    package_versions,
    split_named,
    splits_in,
)
from shards.remote.datasets import resolve_local
from shards.stores.base import INDEX_VERSION, read_at
from shards.stores.image_header import read_image_header
from shards.stores.record_index import (
    bad_record,
    index_content,
    index_line,
    index_name,
    is_index_of,
    parse_record,
    read_records,
)
from shards.stores.sample_arrays import BLOCK_DTYPE, array_dtypes, encode_array, records_crc32

_TAR_NAME = re.compile(r"^[^.].*\.(tar(\.[a-z0-9]+)?|t[gbx]z2?)$", re.IGNORECASE)
_MAX_CLASSES = 1_000_000
_MAX_CLASS_BYTES = 64 << 20  # of a file of class names


class _Scan(NamedTuple):
    """A shard.

    Attributes:
        shard: Its entry in the manifest.
        content: The content of its index.
        blocks: `BLOCK_DTYPE` [n], of its images.
        labels: int64 [n].
        rows: int64 [n], empty if it has none.
        gray: Whether all its images are gray.
    """

    shard: Shard
    content: bytes
    blocks: NDArray[np.void]
    labels: NDArray[np.int64]
    rows: NDArray[np.int64]
    gray: bool


def index(directory: Path, class_names: tuple[str, ...] | None) -> tuple[Manifest, ...]:
    """Index the shards of a data set or a split.

    Args:
        directory: The data set, or one split.
        class_names: Names in the order of the labels; None: the labels themselves.

    Returns:
        The manifests of the splits.

    Raises:
        UserError: If the shards cannot be used for training. Nothing is written then.
    """
    _check_not_packed(directory)
    shards = _find_splits(directory)
    is_one = len(shards) == 1  # a split, whose shards are in the directory itself
    splits = {split: directory if is_one else directory / split for split in sorted(shards, key=SPLITS.index)}
    scans = {split: _scan_split(shards[split], path, split) for split, path in splits.items()}
    all_scans = [scan for split in splits for scan in scans[split]]
    highest = max(int(scan.labels.max()) for scan in all_scans)
    classes = class_names or tuple(map(str, range(highest + 1)))
    if highest >= len(classes):
        raise MismatchError(
            found=f"label {highest} in {directory}",
            expected=f"0 .. {len(classes) - 1}, for {len(classes)} class names",
            hint="name every class: --classes FILE, one per line",
        )
    # All splits have the same number of channels, that of the model input.
    channels = 1 if all(scan.gray for scan in all_scans) else 3
    path = Path(os.path.abspath(directory))
    dataset = printable(path.parent.name if is_one and path.name in splits else path.name)
    contents = {split: _file_contents(len(classes), scans[split]) for split in splits}
    manifests = {split: _manifest(dataset, split, classes, channels, scans[split], contents[split]) for split in splits}
    with ExitStack() as stack:
        for split, path in splits.items():
            if not _is_complete(path, manifests[split]):  # otherwise nothing is written, and the disk may be read-only
                stack.enter_context(created_directory(path))
                stack.enter_context(file_lock(path / ".index.lock"))
        for split, path in splits.items():
            _check_existing_files(path, manifests[split], contents[split])
        for split, path in splits.items():
            with os_errors_as_user_errors(path):
                _link(shards[split], path)
                for name, content in contents[split].items():
                    if not (path / name).exists():  # an existing file has been checked: it is equivalent
                        write_file(path / name, content)
        for split, path in splits.items():
            if not (path / MANIFEST_NAME).exists() or Manifest.read(path).version < VERSION:
                with os_errors_as_user_errors(path):
                    manifests[split].write(path)
    return tuple(manifests.values())


def read_classes(path: Path) -> tuple[str, ...]:
    """Read class names from a text file, one per line; raise `UserError` if it is missing or invalid."""
    expected = "a UTF-8 text file with one class name per line, in the order of the labels"
    try:
        lines = read_file(path, _MAX_CLASS_BYTES).decode("utf-8-sig").rstrip().split("\n")
        names = [printable(name.strip()) for name in lines]
    except FileNotFoundError:
        raise NotFoundError(f"no such file: {path}", expected, "name another file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}, which is not UTF-8: {error}", expected, "convert it to UTF-8") from None
    seen: set[str] = set()
    for number, name in enumerate(names, start=1):
        if not name or name in seen:
            fault = f"repeats {name!r}" if name else "is empty"
            raise UserError(f"{path}: line {number} {fault}", expected, "give each class a different name")
        seen.add(name)
    return tuple(names)


def _find_splits(directory: Path) -> dict[str, list[Path]]:
    """Return the shards of each split: of directories named after splits, or side by side and named after splits."""
    if not directory.is_dir():
        raise NotFoundError(
            found=f"no such directory: {directory}",
            expected="a directory of tar shards",
            hint="name the directory that holds the shards",
        )
    shards = _shards_in(directory, directory)
    inside = {
        path: found for path in sorted(directory.iterdir()) if path.is_dir() and (found := _shards_in(path, directory))
    }
    if shards and inside:
        raise _unclear(f"{next(iter(inside))}, a directory of shards beside {shards[0].name}", directory)
    splits = _splits_by_name(directory, shards) if shards else {}
    if len(splits) == 1:
        return splits
    for path, found in inside.items():
        named = splits_in(path.name)
        split = next(iter(named)) if len(named) == 1 else None
        if split is None or split in splits:
            fault = f"a second {split} split" if split else "which is named after no split, or after several"
            raise _unclear(f"{path}, {fault}", directory)
        splits[split] = found
    if not splits:
        raise NotFoundError(
            found=f"{directory} without .tar files",
            expected="uncompressed tar shards, which allow random access",
            hint="name the directory that holds the shards, or train/ and test/",
        )
    train, test = REQUIRED_SPLITS
    # A directory `val` would remain a split of the packed set.
    if train in splits and test not in splits and VALIDATION in splits and directory / VALIDATION not in inside:
        splits[test] = splits.pop(VALIDATION)
    if missing := [split for split in REQUIRED_SPLITS if split not in splits]:
        alone = min(inside, default=directory / REQUIRED_SPLITS[0])
        raise NotFoundError(
            found=f"{directory} with {' and '.join(splits)}, but without {' and '.join(missing)}",
            expected=f"the splits {' and '.join(REQUIRED_SPLITS)}, and optionally val",
            hint=f"to test on the validation split: mv {quote(directory / VALIDATION)} {quote(directory / missing[0])}"
            if VALIDATION in splits
            else f"add {quote(directory / missing[0])}; or index one split: python -m shards.index {quote(alone)}",
        )
    return splits


def _splits_by_name(directory: Path, shards: list[Path]) -> dict[str, list[Path]]:
    """The splits of shards in one directory: that of the directory, or those in their names."""
    splits: dict[str, list[Path]] = {}
    for path in shards:
        named = splits_in(path.stem)
        if len(named) > 1:
            raise _unclear(f"{path}, named after the splits {' and '.join(sorted(named))}", directory)
        splits.setdefault(next(iter(named), ""), []).append(path)
    own = split_named(os.path.basename(os.path.abspath(directory)))
    others = splits.keys() - {"", own}
    if own and not (others if own == REQUIRED_SPLITS[0] else len(others) > 1):
        return {own: shards}
    if own or (len(splits) > 1 and "" in splits):
        odd = splits[""][0] if "" in splits else splits[min(others)][0]
        raise _unclear(f"{odd}, whose name says no split or another than that of other shards", directory)
    if list(splits) == [""]:
        return {REQUIRED_SPLITS[0]: shards}
    return splits


def _shards_in(directory: Path, root: Path) -> list[Path]:
    """The shards in a directory, without the links to shards below `root` that this command has made."""
    paths = [path for path in sorted(directory.iterdir()) if _TAR_NAME.search(path.name) and path.is_file()]
    paths = [path for path in paths if not _is_link(path, root)]
    if odd := next((path for path in paths if path.suffix != ".tar"), None):
        raise NotFoundError(
            found=f"{odd}, which is compressed, or named otherwise than .tar",
            expected="uncompressed tar shards, which allow random access",
            hint=f"uncompress it (gunzip {quote(odd)}), rename it to .tar, or move it elsewhere",
        )
    if odd := next((path for path in paths if not is_file_name(path.name)), None):
        raise UserError(
            found=f"{odd}, a name with a backslash, a drive or control characters",
            expected="a name that is valid on every system",
            hint="rename it: letters of all scripts, digits, spaces, '.', '-' and '_' are allowed",
        )
    return paths


def _is_link(path: Path, root: Path) -> bool:
    """Whether this command has linked a shard here: from the directory of a split to one below `root` that is none."""
    if path.is_symlink():
        return root.resolve() in path.resolve().parents
    if path.parent == root or path.parent.name not in SPLITS or path.stat().st_nlink == 1:
        return False
    directories = [root, *(each for each in root.iterdir() if each.name not in SPLITS)]
    others = [directory / path.name for directory in directories]
    return any(other.is_file() and other.samefile(path) for other in others)


def _unclear(found: str, directory: Path) -> MismatchError:
    return MismatchError(
        found=found,
        expected="one directory per split (train, test, val), or shards that are all named after their split, as "
        "train-0000.tar",
        hint=f"move the shards of each split into train/, test/ and val/ below {quote(directory)}",
    )


def _scan_split(paths: list[Path], directory: Path, split: str) -> list[_Scan]:
    """Read the shards of a split, whose indices are to be written into a directory."""
    # Reading and hashing run in parallel.
    with ThreadPoolExecutor(available_cpus()) as pool:
        scanned = pool.map(lambda path: _scan(path, directory), paths)
        scans = list(tqdm(scanned, f"indexing {split}", len(paths), unit=" shards", disable=None))
    with_rows = [scan.shard.name for scan in scans if len(scan.rows)]
    without = [scan.shard.name for scan in scans if not len(scan.rows)]
    if with_rows and without:
        raise MismatchError(
            found=f"{directory}: {with_rows[0]} with rows (.row), {without[0]} without",
            expected="a row in every record, or in none",
            hint="index shards of different origin as different data sets",
        )
    rows = np.sort(np.concatenate([scan.rows for scan in scans]))
    if len(repeated := rows[1:][rows[1:] == rows[:-1]]):
        raise MismatchError(
            found=f"{directory}: {repeated[0]} as the row (.row) of several records",
            expected="a different row for each record of a split",
            hint="give each image of the split its own number, or write the shards without .row files",
        )
    return scans


def _scan(path: Path, directory: Path) -> _Scan:
    """Read a shard completely; raise `UserError` if it cannot be used for training.

    Args:
        path: The shard.
        directory: The directory of its split, where its index is.
    """
    lines: list[str] = []
    labels: list[int] = []
    rows: list[int] = []
    entries: list[tuple[int, int, int, int]] = []
    gray = True
    with detect_replacement(path), open(path, "rb", buffering=0) as file:
        for key, components in read_records(path):
            try:
                image, label, row = parse_record(file, key, components, _MAX_CLASSES)
            except ValueError as error:
                raise bad_record(path, error) from None
            content = read_at(file, image.offset, image.size)
            try:
                gray &= read_image_header(content).gray
            except ValueError as error:
                raise bad_record(path, f"{image.name!r} is {error}") from None
            if lines and (row is not None) != bool(rows):
                raise bad_record(path, f"{key!r} {'lacks' if rows else 'has'} a row, unlike the records before it")
            if row is not None:
                rows.append(row)
            lines.append(index_line(components))
            labels.append(label)
            entries.append((image.offset, image.size, isal_zlib.crc32(content), 0))
        entry = RawFile.of(path.parent, path.name)
    if not lines:
        raise UserError(f"{path} without any record", "images with labels", "remove it, or download it again")
    content = index_content(lines)
    return _Scan(
        Shard(samples=len(lines), **entry.model_dump()),
        _existing_index(directory / path.name, content) or content,
        np.array(entries, BLOCK_DTYPE),
        np.array(labels, np.int64),
        np.array(rows, np.int64),
        gray,
    )


def _existing_index(shard: Path, content: bytes) -> bytes | None:
    """Return the index beside a shard (perhaps of `wds2idx`) if it is equivalent to `content`; None if there is none.

    A different index raises `UserError`: it may be of use to its owner, so it is not overwritten.
    """
    path = shard.with_suffix(".idx")
    if not path.exists():
        return None
    if not is_index_of(path, content):
        raise MismatchError(
            found=f"{path}, which is not the {INDEX_VERSION} index of {shard.name}",
            expected="the index of this shard, or none",
            hint=f"remove it (the shard holds the same information): rm {quote(path)}",
        )
    return path.read_bytes()


def _file_contents(classes: int, scans: list[_Scan]) -> dict[str, bytes]:
    """Return the content of the indices and arrays of a split, by name. Without rows, they are positions."""
    labels, rows, blocks = (
        np.concatenate([getattr(scan, name) for scan in scans]) for name in ("labels", "rows", "blocks")
    )
    rows = rows if len(rows) else np.arange(len(labels))
    blocks["numbers_crc32"] = records_crc32(labels, rows)
    each = zip(ARRAYS, (labels, rows, blocks), array_dtypes(classes, int(rows.max())), strict=True)
    indices = {index_name(scan.shard): scan.content for scan in scans}
    return {**indices, **{name: encode_array(values, dtype) for name, values, dtype in each}}


def _check_not_packed(directory: Path) -> None:
    """Raise `UserError` for a data set or split in a tar or zarr store."""
    for split in (directory, *(directory / name for name in SPLITS)):
        if (split / MANIFEST_NAME).is_file() and Manifest.read(split).store != "records":
            data = directory.absolute().parent if split == directory else directory
            raise UserError(
                found=f"{split}, a split of a packed data set",
                expected="WebDataset shards written by another tool; a packed data set needs no index",
                hint=f"python -m trainer.run RECIPE {quote(f'data.shards={data}')}",
            )


def _manifest(
    dataset: str,
    split: str,
    classes: tuple[str, ...],
    channels: int,
    scans: list[_Scan],
    contents: dict[str, bytes],
) -> Manifest:
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
        files=tuple(RawFile.of_content(name, content) for name, content in contents.items()),
        raw=(),
        versions=package_versions("numpy"),
    )


def _check_existing_files(directory: Path, manifest: Manifest, contents: dict[str, bytes]) -> None:
    """Raise `UserError` for a manifest or an array of other shards. A manifest of an older version is replaced."""
    path = directory / MANIFEST_NAME
    if path.exists():
        old = Manifest.read(directory)
        same = old.classes == manifest.classes and _identities(old) == _identities(manifest)
        if not same or (old.version == VERSION and old.digest() != manifest.digest()):
            raise MismatchError(
                found=f"{path}, which does not describe the shards beside it",
                expected="the manifest of these shards and classes, or none",
                hint=f"to index the shards as they are: {_removal(path)}",
            )
    for name in ARRAYS:
        path = directory / name
        if path.exists() and not (path.stat().st_size == len(contents[name]) and path.read_bytes() == contents[name]):
            raise MismatchError(
                found=f"{path}, which is not an array of the shards beside it",
                expected="no such file, because the command writes one of this name",
                hint=f"rename it, or remove it if it is of an earlier index: {_removal(path)}",
            )


def _is_complete(directory: Path, manifest: Manifest) -> bool:
    """Whether a split has a manifest of the current version and all files of `manifest`."""
    if not all((directory / name).exists() for name in (MANIFEST_NAME, *(file.name for file in manifest.everything))):
        return False
    return Manifest.read(directory).version == VERSION


def _identities(manifest: Manifest) -> list[tuple[str, str]]:
    return [(shard.name, shard.sha256) for shard in manifest.shards]


def _removal(path: Path) -> str:
    """Return the command that removes the manifest and the arrays beside a file."""
    files = [path.with_name(name) for name in (MANIFEST_NAME, *ARRAYS)]
    return " ".join(["rm", *(quote(file) for file in files if file.exists())])


def _link(shards: list[Path], directory: Path) -> None:
    """Make shards available in the directory of their split."""
    for path in shards:
        if path.parent != directory and not (link := directory / path.name).exists():
            try:
                link.symlink_to(os.path.relpath(path.resolve(), directory.resolve()))
            except OSError:  # Windows requires a privilege, but none for hard links
                with suppress(OSError):
                    os.link(path.resolve(), link)
                if not link.exists():
                    raise


def main() -> int:
    """Run the command. Returns the exit status."""
    parser = command_parser("shards.index", __doc__)
    parser.add_argument("directory", metavar="DIR", help="holds train/*.tar and test/*.tar, or is one split")
    parser.add_argument("--classes", type=Path, metavar="FILE", help="class names, one per line (default: the labels)")
    arguments = parser.parse_args()
    dataset = resolve_local(arguments.directory)
    for manifest in index(dataset, read_classes(arguments.classes) if arguments.classes else None):
        print(
            f"{manifest.split}: {plural(manifest.samples, 'image')} of {plural(len(manifest.classes), 'class', 'es')} "
            f"in {plural(len(manifest.shards), 'shard')}, {manifest.packed_bytes:,} bytes, "
            f"{'gray' if manifest.image_shape[2] == 1 else 'color'}"
        )
    if not is_packed_dataset(dataset):
        dataset = Path(os.path.abspath(dataset)).parent
    if is_packed_dataset(dataset):
        splits = {dataset / split: Manifest.read(dataset / split) for split in SPLITS if has_split(dataset, split)}
        if len({(manifest.classes, manifest.image_shape) for manifest in splits.values()}) > 1:
            commands = " && ".join(_removal(split / MANIFEST_NAME) for split in splits)
            print("its splits differ in classes or channels; index them together:")
            print(f"{commands} && python -m shards.index {quote(dataset)}")
            return 0
        print(f"train on them with {quote(f'data.shards={dataset}')}")
    else:
        print(f"this is one split; training needs {' and '.join(REQUIRED_SPLITS)}: move the shards of each into")
        print(f"{dataset}/{f' and {dataset}/'.join(REQUIRED_SPLITS)}, then: python -m shards.index {quote(dataset)}")
    return 0


if __name__ == "__main__":
    run_command(main)
