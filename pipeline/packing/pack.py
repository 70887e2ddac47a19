"""Pack the splits of a raw data set: permuted once, in blocks, all or nothing."""

from __future__ import annotations

import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from pipeline.common.bitmap import Bitmap
from pipeline.common.process_group import ProcessGroup
from pipeline.common.process_pool import default_workers, map_in_processes
from pipeline.common.rng import PACKING_STREAM, iterate_permutation
from pipeline.packing.journal import Journal, code_digest
from pipeline.packing.output import OutputLocation, open_output
from pipeline.readers.formats.csv import format_csv
from pipeline.readers.naming import TRAIN
from pipeline.readers.raw_split import RawSplit, UnreadableImages
from pipeline.transforms.build import has_dali
from shards.atomic import write_file
from shards.cli import plural
from shards.errors import UserError
from shards.manifest import LABELS, MAX_BLOCK_BYTES, ROWS, SPLITS, Manifest, RawFile, StoreKind, package_versions
from shards.stores.base import Block, Layout, WrittenShard
from shards.stores.create import make_writer
from shards.stores.sample_arrays import array_dtypes, map_array, open_array, pixel_statistics, write_blocks

SHARD_BYTES = 32 << 20  # pixels of one shard: large enough to stream, small enough to download again
DEFAULT_BLOCK_SIZE = 512  # the smallest power of two at which 28x28 images cost less than 1.04 times their pixels
ORIGINS = "origins.csv"
UNREADABLE = "unreadable.csv"
_PACKAGES = {"tar": ("numpy",), "zarr": ("numpy", "zarr", "numcodecs"), "records": ("pillow",)}
_RECORDS_PER_SHARD = 1024
_RECORDS_PER_READ = 32  # image files that are read before they are written
_LINES = 1 << 14  # of a table that are formatted at a time
_MAX_NAMED = 20  # unreadable images named in a message; the report lists all


T = TypeVar("T")


@dataclass(frozen=True)
class PackSettings:
    """The settings that determine the bytes of a pack, besides the images.

    Attributes:
        dataset: The name of the data set.
        variant: The variant of the data set, or empty.
        block_size: Images per block.
        seed: The seed of the order of images.
        store: `tar`, `zarr` or `records`.
        compression: `zstd` or `none`, for a zarr store.
        options: The options with which the images were selected and resized, for the manifest.
    """

    dataset: str
    variant: str = ""
    block_size: int = DEFAULT_BLOCK_SIZE
    seed: int = 0
    store: StoreKind = "tar"
    compression: str = "zstd"
    options: Mapping[str, str | int | float] = field(default_factory=dict)

    @classmethod
    def like(cls, manifest: Manifest, options: Mapping[str, str | int | float]) -> PackSettings:
        """Return settings to pack images of a pack again, with other options; store, size, fit and color are kept."""
        kept = {name: manifest.options[name] for name in ("size", "fit", "color") if name in manifest.options}
        return cls(
            *(manifest.dataset, manifest.variant, manifest.block_size, manifest.seed, manifest.store),
            compression=str(manifest.options.get("compression", cls.compression)),
            options=kept | dict(options),
        )

    @property
    def recorded_options(self) -> dict[str, str | int | float]:
        """The options as the manifest records them."""
        return {**self.options, **({"compression": self.compression} if self.store == "zarr" else {})}

    def check_same(self, manifest: Manifest, out: Path | str) -> None:
        """Raise `UserError` if the pack at `out` has other settings."""
        pairs = [
            ("data set", manifest.dataset, self.dataset),
            ("split", manifest.variant, self.variant),
            ("seed", manifest.seed, self.seed),
            ("store", manifest.store, self.store),
        ]
        if self.store != "records":
            pairs.append(("block size", manifest.block_size, self.block_size))
        options = self.recorded_options
        pairs += [(name, manifest.options.get(name), options.get(name)) for name in {**manifest.options, **options}]
        for what, packed, requested in pairs:
            if packed != requested:
                raise UserError(
                    found=f"{out}, packed with {what} {'not set' if packed is None else repr(packed)}",
                    expected=f"{what} {'not set' if requested is None else repr(requested)}, as requested",
                    hint="choose another --out, or add --force to replace it",
                )


@dataclass(frozen=True)
class Packed:
    """The result of `pack`.

    Attributes:
        manifests: The manifests of train, test and val (if any).
        is_new: Whether this call has packed them.
        skipped: The number of unreadable images that were skipped.
    """

    manifests: tuple[Manifest, ...]
    is_new: bool
    skipped: int = 0


def find_pack(output: OutputLocation, settings: PackSettings, out: Path | str) -> tuple[Manifest, ...]:
    """Return the manifests of the complete pack at the output, empty if there is none.

    Raises:
        UserError: If the output holds a pack with other settings, or something else.
    """
    manifests = output.manifests()
    for manifest in manifests:
        settings.check_same(manifest, out)
    return manifests


def pack(
    load: Callable[[], tuple[RawSplit, ...]],
    out: Path | str,
    settings: PackSettings,
    *,
    skip_bad: bool = False,
    workers: int | None = None,
    group: ProcessGroup | None = None,
    force: bool = False,
) -> Packed:
    """Pack a data set, or leave a complete pack alone.

    The pack appears as a whole. If this process is killed, the previous output remains. The next call continues with
    the complete shards if the raw files (`RawSplit.files`), settings and code are the same and `out` is a directory.
    The bytes are the same for any number of workers and ranks.

    Args:
        load: Reads the raw splits. It is called only if they are needed.
        out: A directory, or an address that fsspec supports.
        settings: The settings of the pack.
        skip_bad: Whether unreadable images are skipped; by default they are an error that names all of them.
        workers: The number of processes of this rank; by default the number of CPUs.
        group: The ranks that share the work. Each calls this function with the same arguments.
        force: Whether a complete pack is replaced.

    Raises:
        UserError: If `out` holds something else, an image cannot be read, or the disk is full.
    """
    group = group or ProcessGroup()
    output = open_output(out)

    def find() -> tuple[Manifest, ...]:
        return () if force else find_pack(output, settings, out)

    if existing := group.run_on_main(lambda: () if output.needs_recovery() else find()):
        return Packed(existing, is_new=False)
    with output.staging(group) as (directory, journal):
        # Again, now under the lock: another writer may have finished, or the pack of a killed one been restored.
        if existing := group.run_on_main(find):
            return Packed(existing, is_new=False)
        if force:
            group.run_on_main(output.manifests)  # raises if it is not a pack
        splits = group.barrier_run(load)
        packing = _Packing(settings, directory, workers or default_workers(), group, journal, output.is_shared)
        journal.start(group, packing.identity(splits))
        manifests: dict[str, Manifest] = {}
        unreadable: dict[str, dict[int, str]] = {}
        for split in splits:
            try:
                manifests[split.name] = packing.write(split)
            except UnreadableImages as error:
                unreadable[split.name] = error.reasons
        all_unreadable = any(len(unreadable.get(split.name, ())) == len(split.labels) for split in splits)
        if unreadable and (all_unreadable or not skip_bad):
            group.run_on_main(journal.discard)  # the next call has other raw files or settings
        if unreadable and not skip_bad:
            raise group.run_on_main(lambda: _unreadable_error(unreadable, out))
        if unreadable:
            for split in splits:
                if split.name in unreadable:
                    manifests[split.name] = packing.write(_without(split, unreadable[split.name]))
            group.run_on_main(lambda: write_file(directory / UNREADABLE, _unreadable_report(unreadable)))
        in_order = tuple(manifests[split.name] for split in splits)
        output.complete(group, directory, in_order)
    return Packed(in_order, is_new=True, skipped=sum(map(len, unreadable.values())))


@dataclass(frozen=True)
class _Packing:
    settings: PackSettings
    directory: Path
    workers: int
    group: ProcessGroup
    journal: Journal
    is_shared: bool
    """Whether all ranks write into one directory."""

    def identity(self, splits: tuple[RawSplit, ...]) -> dict[str, Any] | None:
        """Return what determines the bytes of the pack, besides labels and rows; None if the raw files are unknown."""
        if not all(split.files for split in splits):
            return None
        return {
            "settings": asdict(self.settings),
            "code": [code_digest(), self._versions(), version("pillow")],  # Pillow decodes and resizes image files
            "splits": [
                [asdict(self._layout(split)), split.name, split.classes, split.transposed, *map(dict, split.files)]
                for split in splits
            ],
        }

    def write(self, split: RawSplit) -> Manifest:
        """Write the files of a split, and return its manifest. Same result or `UnreadableImages` on every rank."""
        directory = self.directory / split.name
        layout = self._layout(split)
        journal = self.journal.attempt(directory, layout.samples)
        if reasons := self.group.run_on_main(journal.find_unreadable):
            raise UnreadableImages(reasons)
        writer = make_writer(self.settings.store, directory, layout, self.settings.compression)
        run_once = self.group.run_on_main if self.is_shared else self.group.barrier_run

        def start() -> tuple[RawFile, ...]:
            if journal.is_new:
                shutil.rmtree(directory, ignore_errors=True)  # an attempt in which images were unreadable
                directory.mkdir()
                journal.start()
            return (*writer.start(), *_write_origins(split, directory), *self._write_numbers(split, directory))

        files = run_once(start)  # where the directories of the ranks differ, the files do not
        numbers = range(self.group.rank, layout.shards, self.group.size)
        sizes = [len(layout.samples_of(number)) for number in numbers]

        def write_shard(item: int) -> tuple[int, WrittenShard | dict[int, str]]:
            number = numbers[item]
            samples = layout.samples_of(number)
            labels, rows = (
                map_array(directory / name)[samples.start : samples.stop].astype(np.int64) for name in (LABELS, ROWS)
            )
            if (written := journal.find(number, labels, rows, layout.block_size)) is not None:
                return number, written
            try:
                written = writer.write_shard(number, self._blocks(split, layout, samples.start, labels, rows))
            except UnreadableImages as error:
                return number, error.reasons
            journal.add(number, written)
            return number, written

        def write_shards() -> list[tuple[int, WrittenShard | dict[int, str]]]:
            title, is_hidden = f"packing {split.name}", True if self.group.rank else None
            with tqdm(total=sum(sizes), desc=title, unit=" images", unit_scale=True, disable=is_hidden) as bar:
                return map_in_processes(write_shard, sizes, self.workers, bar)

        shards = dict(shard for shards in self.group.all_gather(write_shards) for shard in shards)
        reasons = {index: why for shard in shards.values() if isinstance(shard, dict) for index, why in shard.items()}
        if reasons:
            reasons = dict(sorted(reasons.items()))
            self.group.run_on_main(lambda: journal.add_unreadable(reasons))
            raise UnreadableImages(reasons)
        written = [shard for _, shard in sorted(shards.items()) if not isinstance(shard, dict)]
        blocks = self.group.run_on_main(lambda: write_blocks(directory, [shard.blocks for shard in written]))
        if not (self.is_shared or self.group.is_main_process):
            for file in files:
                (directory / file.name).unlink()  # rank 0 uploads it
        return self._manifest(split, layout, written, (*files, blocks))

    def _write_numbers(self, split: RawSplit, directory: Path) -> tuple[RawFile, ...]:
        """Write labels and rows in packed order."""
        dtypes = array_dtypes(len(split.classes), int(np.max(split.source_index)))
        count, stream = len(split.labels), PACKING_STREAM + SPLITS.index(split.name)
        with (
            open_array(directory / LABELS, dtypes[0], count) as append_labels,
            open_array(directory / ROWS, dtypes[1], count) as append_rows,
        ):
            for positions in iterate_permutation(count, self.settings.seed, stream):
                append_labels(split.labels[positions])
                append_rows(split.source_index[positions])
        return RawFile.of(directory, LABELS), RawFile.of(directory, ROWS)

    def _layout(self, split: RawSplit) -> Layout:
        if split.encoded != (self.settings.store == "records"):
            raise UserError(
                found=f"--store {self.settings.store} for images of shape {list(split.image_shape)}",
                expected="records for image files of different sizes, tar or zarr for images of one size",
                hint="omit --store, or add --size 64",
            )
        if split.encoded:
            return Layout(len(split.labels), split.image_shape, 1, _RECORDS_PER_SHARD)
        block_size = self.settings.block_size
        height, width, channels = split.image_shape
        assert height is not None and width is not None
        block_bytes = block_size * height * width * channels
        if block_bytes > MAX_BLOCK_BYTES:
            raise UserError(
                found=f"images of {height}x{width}x{channels}, {block_bytes / 1e9:.1f} GB per block of {block_size}",
                expected=f"blocks of at most {MAX_BLOCK_BYTES / 1e9:.1f} GB, which are read as a whole",
                hint="store smaller images (--size 224) or smaller blocks (--block-size 32)"
                + (", or files (--store records)" if has_dali() else ""),
            )
        blocks = max(1, SHARD_BYTES // block_bytes)
        return Layout(len(split.labels), split.image_shape, block_size, blocks * block_size)

    def _blocks(
        self, split: RawSplit, layout: Layout, first: int, labels: NDArray[np.int64], rows: NDArray[np.int64]
    ) -> Iterator[Block]:
        """Read the blocks of a shard one by one; at the end raise `UnreadableImages` for all unreadable images.

        Args:
            split: The split.
            layout: Its layout.
            first: First sample of the shard.
            labels: Labels of its samples, int64 [n].
            rows: Their rows, int64 [n].
        """
        block_size = _RECORDS_PER_READ if split.encoded else layout.block_size
        size = max(1, split.images_per_read // block_size) * block_size
        unreadable: dict[int, str] = {}

        def read(start: int) -> tuple[list[Block], dict[int, str]]:
            end = min(start + size, len(rows))
            try:
                images = split.read(rows[start:end])
            except UnreadableImages as error:
                return [], error.reasons
            blocks = [slice(place, min(place + block_size, end)) for place in range(start, end, block_size)]
            return [
                Block(first + each.start, images[each.start - start : each.stop - start], labels[each], rows[each])
                for each in blocks
            ], {}

        # With fewer shards than workers, each worker decodes with several threads.
        threads = -(-self.workers // max(1, layout.shards // self.group.size))
        with ThreadPoolExecutor(threads) as pool:
            for blocks, reasons in _map_ahead(pool, read, range(0, len(rows), size), 2 * threads):
                unreadable |= reasons
                # After an unreadable image the shard is useless; reading continues only to find all of them.
                if not unreadable:
                    yield from blocks
        if unreadable:
            raise UnreadableImages(unreadable)

    def _versions(self) -> dict[str, str]:
        return package_versions(*_PACKAGES[self.settings.store])

    def _manifest(
        self, split: RawSplit, layout: Layout, written: list[WrittenShard], files: tuple[RawFile, ...]
    ) -> Manifest:
        settings = self.settings
        return Manifest(
            store=settings.store,
            dataset=settings.dataset,
            variant=settings.variant,
            split=split.name,
            classes=split.classes,
            counts=tuple(split.class_counts().tolist()),
            image_shape=split.image_shape,
            transposed=split.transposed,
            samples=layout.samples,
            block_size=layout.block_size,
            seed=settings.seed,
            options=settings.recorded_options,
            shards=tuple(each.shard for each in written),
            files=(*(file for each in written for file in each.files), *files),
            raw=split.files,
            versions=self._versions(),
            statistics=pixel_statistics(layout.samples, [each.pixel_sums for each in written]),
        )


def _map_ahead(pool: Executor, work: Callable[[int], T], items: Iterable[int], ahead: int) -> Iterator[T]:
    """`pool.map(work, items)`, with at most `ahead` results waiting."""
    waiting: deque[Future[T]] = deque()
    for item in items:
        waiting.append(pool.submit(work, item))
        if len(waiting) == ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _write_origins(split: RawSplit, directory: Path) -> tuple[RawFile, ...]:
    """Write the columns of a split as `origins.csv`, if it has any."""
    if not split.columns:
        return ()
    in_order = np.argsort(split.source_index)
    columns = (split.source_index, *split.columns.values())
    with open(directory / ORIGINS, "wb") as file:
        file.write(format_csv(["row", *split.columns], []).encode())
        for first in range(0, len(in_order), _LINES):
            piece = in_order[first : first + _LINES]
            lines = zip(*(values[piece].tolist() for values in columns), strict=True)
            file.write(format_csv(next(lines), lines).encode())
    return (RawFile.of(directory, ORIGINS),)


def _without(split: RawSplit, unreadable: Mapping[int, str]) -> RawSplit:
    """The split without the source indices that cannot be read."""
    readable = Bitmap([~np.isin(split.source_index, list(unreadable))])
    is_empty = not len(readable)
    if is_empty or (split.name == TRAIN and np.count_nonzero(split.select(readable).class_counts()) < 2):
        images = "no readable image" if is_empty else "only readable images of one class"
        raise UserError(
            found=f"{images} in the {split.name} split; an unreadable one: {next(iter(unreadable.values()))}",
            expected="at least one readable image, and training images of at least two classes",
            hint="check that the files are images (PNG, JPEG, WebP, BMP)",
        )
    return split.select(readable)


def _unreadable_report(unreadable: Mapping[str, Mapping[int, str]]) -> str:
    """The unreadable images as CSV: split, source index and reason."""
    rows = ((split, index, reason) for split, reasons in unreadable.items() for index, reason in reasons.items())
    return format_csv(["part", "row", "reason"], rows)


def _unreadable_error(unreadable: Mapping[str, Mapping[int, str]], out: Path | str) -> UserError:
    """The message that names the unreadable images; if there are many, a report beside `out` lists all."""
    reasons = [reason for reasons in unreadable.values() for reason in reasons.values()]
    named = "\n       ".join(reasons[:_MAX_NAMED])
    if len(reasons) > _MAX_NAMED:
        report = Path(f"{Path(str(out)).name}.{UNREADABLE}").absolute()
        write_file(report, _unreadable_report(unreadable))
        named += f"\n       and {len(reasons) - _MAX_NAMED:,} more, all listed in {report}"
    return UserError(
        found=f"{plural(len(reasons), 'unreadable image')}:\n       {named}",
        expected="images that can be decoded",
        hint="repair or remove them, or skip them with --skip-bad",
    )
