"""Convert a packed data set to another store, or upgrade it to format version 3 in place.

    python -m shards.convert SRC DST --store zarr|tar
    python -m shards.convert DIR

SRC is a packed data set (train, test, perhaps val) or one split of it, DST a new directory. The hashes of SRC are
checked first. After writing, every image, label and row of DST is read back and compared with SRC. DST appears
completely or not at all. Converting from tar to zarr and back gives identical bytes. If SRC already has the requested
store it is rewritten, for example with another --compression. Without DST, a data set of format version 1 or 2 gets
the arrays of version 3; its shards stay as they are.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from isal import isal_zlib
from numpy.typing import NDArray
from tqdm import tqdm

from shards.atomic import detect_replacement, file_lock, replace_directory
from shards.cli import command_parser, run_command
from shards.errors import CorruptError, UserError, os_errors_as_user_errors, quote
from shards.manifest import (
    ARRAYS,
    LABELS,
    MANIFEST_NAME,
    ROWS,
    VERSION,
    Manifest,
    RawFile,
    StoreKind,
    is_packed_dataset,
    manifest_paths,
)
from shards.open import open_files
from shards.remote.datasets import resolve_dataset, resolve_local
from shards.stores.base import Block, Layout, Store, block_key
from shards.stores.create import make_writer
from shards.stores.record_index import index_name
from shards.stores.sample_arrays import (
    PixelSums,
    array_dtypes,
    numbers_crc32,
    pixel_statistics,
    write_array,
    write_blocks,
)
from shards.stores.zarr_arrays import GROUP
from shards.verify.check import check_hashes, corrupt_files, split_directories

COMPRESSION = "compression"  # the option of a zarr store in the manifest
_ARRAY_PIECE = 1 << 20  # samples whose labels and rows are written at a time
_RECORDS = 32  # image files read at a time


def convert(
    source: Path, target: Path, store: StoreKind, compression: str = "zstd", force: bool = False
) -> list[tuple[Manifest, Manifest]]:
    """Convert a packed data set, or one split. Holds one shard in memory.

    Args:
        source: The data set or split.
        target: The directory to write.
        store: `tar` or `zarr`.
        compression: `zstd` or `none`, for zarr only.
        force: Whether to replace a complete data set at the target.

    Returns:
        The manifests of each split before and after.

    Raises:
        UserError: If the source is damaged or the target exists. The target is unchanged then.
    """
    _check_target(source, target, force)
    with replace_directory(target) as replacement:
        _check_target(source, target, force)  # again under the lock: another writer may have finished meanwhile
        with detect_replacement(*manifest_paths(source)):
            before = _read_source(source)
            after = {}
            for split, manifest in before.items():
                # A single split is written to the target itself.
                directory = replacement.path / split.relative_to(source)
                directory.mkdir(exist_ok=True)
                after[directory] = _convert_split(split, manifest, directory, store, compression)
        for directory, manifest in after.items():
            manifest.write(directory)
        replacement.commit()
    return list(zip(before.values(), after.values(), strict=True))


def _read_source(source: Path) -> dict[Path, Manifest]:
    """Return the manifests of the splits, the files of which have the right hashes."""
    manifests = {split: Manifest.read(split) for split in split_directories(source)}
    for split, manifest in manifests.items():
        manifest.check_one_size(split)
    faults = [fault for split, manifest in manifests.items() for fault in check_hashes(split, manifest)]
    if faults:
        raise corrupt_files(
            faults, f"list the damaged blocks: python -m shards.verify {quote(source)}; then pack again"
        )
    return manifests


def _check_target(source: Path, target: Path, force: bool) -> None:
    paths = {source.resolve(), target.resolve()}
    if len(paths) == 1 or any(path.parents and paths & set(path.parents) for path in paths):
        raise UserError(
            found=f"{target}, which is, contains or lies in what is to be converted",
            expected="a separate directory",
            hint="name another DST",
        )
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not (is_packed_dataset(target) or (target / MANIFEST_NAME).is_file()):
        raise UserError(
            found=f"{target}, which exists and is not a complete pack",
            expected="a new or empty directory, or a complete pack",
            hint="choose another DST, or remove it if nothing in it is needed",
        )
    if not force:
        raise UserError(
            found=f"{target}, a complete pack",
            expected="a new or empty directory",
            hint="add --force to replace it, or choose another DST",
        )


def _convert_split(split: Path, manifest: Manifest, directory: Path, store: StoreKind, compression: str) -> Manifest:
    """Write the files of a split into a directory and compare them. Returns their manifest, which is not written."""
    layout = Layout.of(manifest)
    one_block = layout.block_size * manifest.image_bytes
    before = open_files(split, manifest, one_block)
    writer = make_writer(store, directory, layout, compression)
    metadata = writer.start()
    written = [
        writer.write_shard(number, _blocks(before, layout, layout.samples_of(number)))
        for number in tqdm(range(layout.shards), f"converting {manifest.split}", unit=" shards", disable=None)
    ]
    arrays = _write_arrays(directory, before, [each.blocks for each in written])
    side_files = _side_files(manifest)
    for file in side_files:
        (directory / file.name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(split / file.name, directory / file.name)
    options = {name: value for name, value in manifest.options.items() if name != COMPRESSION}
    changes = {
        "version": VERSION,
        "store": store,
        "options": {**options, COMPRESSION: compression} if store == "zarr" else options,
        "shards": tuple(each.shard for each in written),
        "files": (*(file for each in written for file in each.files), *metadata, *side_files, *arrays),
        "statistics": pixel_statistics(layout.samples, [each.pixel_sums for each in written]),
    }
    converted = Manifest(**{**dict(manifest), **changes})
    if faults := list(check_hashes(directory, converted)):
        raise _differs(faults)
    after = open_files(directory, converted, one_block)
    blocks = zip(*(_blocks(store, layout, range(layout.samples)) for store in (before, after)), strict=True)
    count = -(-layout.samples // layout.block_size)
    for expected, block in tqdm(blocks, f"comparing {manifest.split}", count, unit=" blocks", disable=None):
        if not all(map(np.array_equal, block, expected)):
            raise _differs([f"{directory}: block {block_key(block.first // layout.block_size)}"])
    return converted


def _blocks(store: Store, layout: Layout, samples: range) -> Iterator[Block]:
    """Yield the blocks of a range of samples that starts at the start of a block."""
    for first in range(samples.start, samples.stop, layout.block_size):
        positions = np.arange(first, min(first + layout.block_size, samples.stop))
        images = cast(np.ndarray, store.read(positions))
        numbers = (array[positions].astype(np.int64) for array in (store.labels, store.rows))
        yield Block(first, images, *numbers)


def _side_files(manifest: Manifest) -> tuple[RawFile, ...]:
    """Return the files that do not belong to the store, such as origins.csv."""
    known = {*map(index_name, manifest.shards), *ARRAYS}
    return tuple(file for file in manifest.files if not file.name.startswith(f"{GROUP}/") and file.name not in known)


def _write_arrays(directory: Path, store: Store, blocks: Sequence[NDArray[np.void]]) -> tuple[RawFile, ...]:
    """Write the arrays of format version 3; returns their entries."""
    dtypes = array_dtypes(len(store.manifest.classes), int(store.rows.max()))
    pieces = [slice(first, first + _ARRAY_PIECE) for first in range(0, len(store), _ARRAY_PIECE)]
    return (
        write_array(directory / LABELS, dtypes[0], len(store), (store.labels[piece] for piece in pieces)),
        write_array(directory / ROWS, dtypes[1], len(store), (store.rows[piece] for piece in pieces)),
        write_blocks(directory, blocks),
    )


def upgrade(directory: Path) -> list[Manifest]:
    """Upgrade a packed data set, or one split, to the present format version in place.

    The shards stay as they are. Each is read once and compared with the manifest. The manifest is replaced last, so a
    split still has its earlier version if the process is killed.

    Returns:
        The manifests of the splits that were upgraded, empty if all have the present version.

    Raises:
        UserError: If a file is damaged. Its split is unchanged then.
    """
    busy = UserError(
        found=f"another process, which upgrades {directory}",
        expected="one process at a time",
        hint="wait for it to end",
    )
    outdated = [split for split in split_directories(directory) if Manifest.read(split).version < VERSION]
    upgraded = []
    for split in outdated:
        with os_errors_as_user_errors(split), file_lock(split / ".upgrade.lock", busy):
            if Manifest.read(split).version < VERSION:  # another process may just have upgraded it
                upgraded.append(_upgrade_split(split))
    return upgraded


def _upgrade_split(split: Path) -> Manifest:
    with detect_replacement(split / MANIFEST_NAME):
        manifest = Manifest.read(split)
        # A block at a time, or some image files.
        step = _RECORDS if manifest.encoded else manifest.block_size
        store: Any = open_files(split, manifest, None if manifest.encoded else step * manifest.image_bytes)
        for file in manifest.files:
            store.files.check_sha256(file.name)
        blocks, sums, first = store.arrays.blocks.copy(), PixelSums(), 0
        for shard in tqdm(manifest.shards, f"upgrading {manifest.split}", unit=" shards", disable=None):
            store.files.check_sha256(shard.name)
            for start in range(first, first + shard.samples, step):
                images = store.read(np.arange(start, min(start + step, first + shard.samples)))
                if not manifest.encoded:
                    sums.add(start, images)
                    images = [images]
                for block, content in enumerate(images, start=start // manifest.block_size):
                    samples = slice(block * manifest.block_size, (block + 1) * manifest.block_size)
                    blocks["crc32"][block] = isal_zlib.crc32(content)
                    blocks["numbers_crc32"][block] = numbers_crc32(store.labels[samples], store.rows[samples])
            first += shard.samples
        listed = {file.name for file in manifest.files}
        indices = {index_name(shard) for shard in manifest.shards if manifest.store != "zarr"}
        upgraded = Manifest(
            **{
                **dict(manifest),
                "version": VERSION,
                "shards": tuple(shard.model_copy(update={"blocks_crc32": ()}) for shard in manifest.shards),
                "files": (
                    *manifest.files,
                    *(RawFile.of(split, name) for name in sorted(indices - listed)),  # version 1 does not list them
                    *_write_arrays(split, store, [blocks]),
                ),
                "statistics": pixel_statistics(manifest.samples, [sums.total]),
            }
        )
    upgraded.write(split)
    return upgraded


def _differs(faults: list[str]) -> CorruptError:
    faults = [f"{fault}, read back with another content than was written" for fault in faults]
    return corrupt_files(faults, "check the disk and the memory of this machine (dmesg), then convert again")


def main() -> int:
    """Run the command. Returns the exit status."""
    parser = command_parser(
        "shards.convert",
        "Convert a packed data set to another store and compare every sample with SRC. Without DST, "
        f"upgrade SRC to format version {VERSION} in place.",
        epilog="If SRC already has the requested store it is rewritten, for example with another --compression.",
    )
    parser.add_argument("source", metavar="SRC", help="a packed data set or one split of it, a directory or an address")
    parser.add_argument("target", metavar="DST", nargs="?", help="directory to write; with --store")
    parser.add_argument("--store", choices=("tar", "zarr"), help="store of DST; tar: memory-mapped, zarr: compressed")
    parser.add_argument("--compression", choices=("zstd", "none"), help="of a zarr store (default zstd)")
    parser.add_argument("--force", action="store_true", help="replace a complete data set at DST")
    arguments = parser.parse_args()
    if (arguments.target is None) != (arguments.store is None):
        parser.error("DST and --store go together; without both, SRC is upgraded in place")
    if arguments.compression and arguments.store != "zarr":
        store = f"a store of {arguments.store}" if arguments.store else "an upgrade"
        print(f"warning: --compression has no effect on {store}", file=sys.stderr)
    if arguments.target is None:
        return _run_upgrade(arguments.source)
    compression = arguments.compression or "zstd"
    target = resolve_local(arguments.target)
    source = resolve_dataset(arguments.source, whole=True)
    converted = convert(source, target, arguments.store, compression, arguments.force)
    for before, after in converted:
        print(
            f"  {after.split:5}  {after.samples:,} images, each compared: {before.packed_bytes / 1e6:,.1f} MB of "
            f"{before.store} to {after.packed_bytes / 1e6:,.1f} MB of {after.store}"
        )
    print(f"  in     {target}")
    return 0


def _run_upgrade(source: str) -> int:
    upgraded = upgrade(resolve_local(source))
    for manifest in upgraded:
        print(f"  {manifest.split:5}  {manifest.samples:,} images, upgraded to format version {VERSION}")
    if not upgraded:
        print(f"  {source} has format version {VERSION} already")
    return 0


if __name__ == "__main__":
    run_command(main)
