"""Write a packed set in another kind of store, sample for sample the same.

    python -m shards.convert SRC DST --store zarr|tar

SRC is a packed set (train, test, perhaps val) or one split of it, DST a new directory. The hashes of SRC are checked
before, and every image, label and row of DST is read again and compared with SRC after. DST appears whole or not at
all. From tar to zarr and back gives the same bytes. Naming the store that SRC already has rewrites it, for instance
with another --compression.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import cast

import numpy as np
from tqdm import tqdm

from shards.atomic import replace_directory
from shards.cli import program_name, run_command
from shards.create import make_writer
from shards.errors import CorruptError, UserError
from shards.manifest import MANIFEST_NAME, Manifest, RawFile, StoreKind, is_packed_dataset
from shards.open import open_files
from shards.stores.base import Block, ImageStore, Layout, block_key
from shards.stores.zarr_arrays import GROUP
from shards.verify.check import check_hashes, split_directories

STORES = ("tar", "zarr")
COMPRESSION = "compression"  # the option of a zarr store, as the manifest names it


def convert(
    source: Path, target: Path, store: StoreKind, compression: str = "zstd", force: bool = False
) -> list[tuple[Manifest, Manifest]]:
    """Convert a packed set, or one split; returns the manifest of each split before and after.

    compression: `zstd` or `none`; for zarr only. force: replace a complete pack that stands at the target.
    Holds a shard in memory. Raises `UserError`, and then leaves the target as it was.
    """
    _check_target(source, target, force)
    splits = split_directories(source)
    before = {split: Manifest.read(split) for split in splits}
    for split, manifest in before.items():
        if manifest.encoded:
            raise UserError(
                found=f"{split}, which holds picture files of differing sizes",
                expected="images of one size: blocks can hold no others",
                hint="pack it again with a size: python -m pipeline.shard ... --size N",
            )
    faults = [fault for split, manifest in before.items() for fault in check_hashes(split, manifest)]
    if faults:
        raise CorruptError(
            found="\n       ".join(faults),
            expected="a whole pack to convert",
            hint=f"see which blocks are damaged: python -m shards.verify {source}; then pack it again with --force",
        )
    with replace_directory(target) as replacement:
        _check_target(source, target, force)  # again under the lock: another writer may have finished meanwhile
        after = {}
        for split, manifest in before.items():
            # One split alone has no directory of its own in the target.
            directory = replacement.path / split.relative_to(source)
            directory.mkdir(exist_ok=True)
            after[directory] = _convert_split(split, manifest, directory, store, compression)
        for directory, manifest in after.items():
            manifest.write(directory)
        replacement.commit()
    return list(zip(before.values(), after.values(), strict=True))


def _check_target(source: Path, target: Path, force: bool) -> None:
    one, other = source.resolve(), target.resolve()
    if one == other or one in other.parents or other in one.parents:
        raise UserError(
            found=f"{target}, which is, holds or lies in what is to be converted",
            expected="a directory of its own",
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
    """Write the files of a split into a directory and compare them; returns their manifest, which is not written."""
    # A split in one shard may end inside its last block.
    shard_size = -(-manifest.shards[0].samples // manifest.block_size) * manifest.block_size
    layout = Layout(manifest.samples, manifest.image_shape, manifest.block_size, shard_size)
    # Held in memory is one block, besides the shard that is written.
    one_block = layout.block_size * manifest.image_bytes
    before = cast(ImageStore, open_files(split, manifest, one_block))
    writer = make_writer(store, directory, layout, compression)
    once = writer.start()
    written = []
    with _bar("converting", manifest) as bar:
        for number in range(layout.shards):
            written.append(writer.write_shard(number, _blocks(before, layout, layout.samples_of(number), bar)))
    others = _side_files(manifest)
    for file in others:
        (directory / file.name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(split / file.name, directory / file.name)
    options = {name: value for name, value in manifest.options.items() if name != COMPRESSION}
    fields = {
        **dict(manifest),
        "version": 2,
        "store": store,
        "options": {**options, COMPRESSION: compression} if store == "zarr" else options,
        "shards": tuple(shard for shard, _ in written),
        "files": (*(file for _, files in written for file in files), *once, *others),
    }
    converted = Manifest(**fields)
    if faults := list(check_hashes(directory, converted)):
        raise _differs("\n       ".join(faults))
    after = cast(ImageStore, open_files(directory, converted, one_block))
    with _bar("comparing", manifest) as bar:
        for block in _blocks(before, layout, range(layout.samples), bar):
            samples = np.arange(block.first, block.first + len(block.labels))
            there = (after.read(samples), after.labels[samples], after.rows[samples])
            if not all(map(np.array_equal, there, block[1:])):
                raise _differs(f"{directory}: block {block_key(block.first // layout.block_size)}")
    return converted


def _bar(doing: str, manifest: Manifest) -> tqdm:
    description = f"{doing} {manifest.split}"
    return tqdm(total=manifest.samples, desc=description, unit=" images", unit_scale=True, disable=None)


def _blocks(store: ImageStore, layout: Layout, samples: range, bar: tqdm) -> Iterator[Block]:
    """The blocks of some samples, the first of which begins a block."""
    for first in range(samples.start, samples.stop, layout.block_size):
        positions = np.arange(first, min(first + layout.block_size, samples.stop))
        yield Block(first, store.read(positions), store.labels[positions], store.rows[positions])
        bar.update(len(positions))


def _side_files(manifest: Manifest) -> tuple[RawFile, ...]:
    """The files that do not belong to the store, such as origins.csv."""
    of_tar = {str(PurePosixPath(shard.name).with_suffix(".idx")) for shard in manifest.shards}
    return tuple(file for file in manifest.files if not file.name.startswith(f"{GROUP}/") and file.name not in of_tar)


def _differs(place: str) -> CorruptError:
    return CorruptError(
        found=f"{place}, which is not what was written",
        expected="on the disk what was just written there",
        hint="check the disk and the memory of this machine (dmesg), then convert again",
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        prog=program_name("shards.convert"),
        description="Write a packed set in another kind of store, sample for sample the same; every one is compared.",
        epilog="Naming the store that SRC already has rewrites it, for instance with another --compression.",
    )
    parser.add_argument("source", type=Path, metavar="SRC", help="a packed set, or one split of it")
    parser.add_argument("target", type=Path, metavar="DST", help="the directory to make")
    parser.add_argument("--store", choices=STORES, required=True, help="tar: block records, mapped; zarr: compressed")
    parser.add_argument("--compression", choices=("zstd", "none"), help="of a zarr store (default zstd)")
    parser.add_argument("--force", action="store_true", help="replace a complete pack at DST")
    arguments = parser.parse_args()
    if arguments.compression and arguments.store != "zarr":
        print(f"warning: --compression has no effect on a store of {arguments.store}", file=sys.stderr)
    compression = arguments.compression or "zstd"
    converted = convert(arguments.source, arguments.target, arguments.store, compression, arguments.force)
    for before, after in converted:
        print(
            f"  {after.split:5}  {after.samples:,} images, each compared: {before.packed_bytes / 1e6:,.1f} MB of "
            f"{before.store} to {after.packed_bytes / 1e6:,.1f} MB of {after.store}"
        )
    print(f"  in     {arguments.target}")
    return 0


if __name__ == "__main__":
    run_command(main)
