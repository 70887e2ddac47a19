"""Pack the parts of a raw data set into a packed set: permuted once, in blocks, all or nothing."""

from __future__ import annotations

import csv
import hashlib
import io
import platform
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from pipeline.common.process_pool import Advance, default_workers, map_in_processes
from pipeline.common.rng import PACKING_STREAM, permutation
from pipeline.packing.output import OutputLocation, open_output
from pipeline.packing.ranks import ProcessGroup
from pipeline.readers.raw_split import RawSplit, UnreadableImages
from shards.atomic import write_file
from shards.create import make_writer
from shards.errors import UserError
from shards.manifest import MOST_BLOCK_BYTES, SPLITS, Manifest, RawFile, Shard, StoreKind
from shards.stores.base import Block, Layout

SHARD_BYTES = 32 << 20  # pixels of one shard: large enough to stream, small enough to fetch again
DEFAULT_BLOCK_SIZE = 512  # the smallest power of two at which 28x28 images cost less than 1.03 times their pixels
ORIGINS = "origins.csv"
UNREADABLE = "unreadable.csv"
_WRITTEN_WITH = {"tar": ("numpy",), "zarr": ("numpy", "zarr", "numcodecs"), "records": ("pillow",)}
_RECORDS_PER_SHARD = 1024
_RECORDS_AT_ONCE = 32  # image files read before they are written
_NAMED = 20  # unreadable pictures named in a message; all of them are in the report


T = TypeVar("T")
Written: TypeAlias = tuple[Shard, tuple[RawFile, ...]]


@dataclass(frozen=True)
class PackSettings:
    """What decides the bytes of a pack besides the images; two packs of the same settings are the same pack.

    compression: `zstd` or `none`, of a zarr store. options: how the images were chosen and brought to size.
    """

    dataset: str
    split: str = ""
    block_size: int = DEFAULT_BLOCK_SIZE
    seed: int = 0
    store: StoreKind = "tar"
    compression: str = "zstd"
    options: Mapping[str, str | int | float] = field(default_factory=dict)

    @property
    def recorded_options(self) -> dict[str, str | int | float]:
        """The options as the manifest holds them."""
        return {**self.options, **({"compression": self.compression} if self.store == "zarr" else {})}

    def check_same(self, manifest: Manifest, out: Path | str) -> None:
        """Raise `UserError` if a pack that stands at `out` is another than these settings ask for."""
        pairs = [
            ("data set", manifest.dataset, self.dataset),
            ("split", manifest.variant, self.split),
            ("seed", manifest.seed, self.seed),
            ("store", manifest.store, self.store),
        ]
        if self.store != "records":
            pairs.append(("block size", manifest.block_size, self.block_size))
        asked = self.recorded_options
        pairs += [(name, manifest.options.get(name), asked.get(name)) for name in {**manifest.options, **asked}]
        for what, found, wanted in pairs:
            if wanted != found:
                raise UserError(
                    found=f"{out}, packed with {what} {'not set' if found is None else repr(found)}",
                    expected=f"{what} {'not set' if wanted is None else repr(wanted)}, as asked",
                    hint="add --force to replace it, or choose another --out",
                )


@dataclass(frozen=True)
class Packed:
    """What `pack` has done. manifests: of train, test and perhaps val; now: whether they were packed by this call;
    skipped: unreadable pictures that were left out."""

    manifests: tuple[Manifest, ...]
    now: bool
    skipped: int = 0


def find_pack(target: OutputLocation, settings: PackSettings, out: Path | str) -> tuple[Manifest, ...]:
    """The manifests of the complete pack that stands at the target, none if there is none.

    Raises `UserError` if what stands there is another pack than the one asked for, or no pack at all.
    """
    manifests = target.manifests()
    for manifest in manifests:
        settings.check_same(manifest, out)
    return manifests


def pack(
    load: Callable[[], tuple[RawSplit, ...]],
    out: Path | str,
    *,
    dataset: str,
    split: str = "",
    block_size: int = DEFAULT_BLOCK_SIZE,
    seed: int = 0,
    store: StoreKind = "tar",
    compression: str = "zstd",
    options: Mapping[str, str | int | float] | None = None,
    skip_bad: bool = False,
    workers: int | None = None,
    group: ProcessGroup | None = None,
    force: bool = False,
) -> Packed:
    """Pack a data set into `out` (a directory, or an address that fsspec knows), or leave a complete pack alone.

    load: reads the raw parts; called only if they are needed. skip_bad: leave unreadable pictures out, instead of
    failing with all their names. workers: processes of this rank, by default as many as it may use cores. group: the
    ranks that share the work; every one calls this with the same arguments. The bytes are the same for any number of
    workers and ranks.
    The pack appears whole; killed at any moment, this leaves what was there before, and the next call cleans up.
    """
    settings = PackSettings(dataset, split, block_size, seed, store, compression, options or {})
    group = group or ProcessGroup()
    target = open_output(out)

    def look() -> tuple[Manifest, ...]:
        if force or target.needs_recovery():
            return ()
        return find_pack(target, settings, out)

    found = group.rank0(look)
    if found:
        return Packed(found, now=False)
    with target.staging(group) as directory:
        # Under the lock now: another writer may have finished meanwhile, or a killed one's pack been put back.
        found = group.rank0(lambda: () if force else find_pack(target, settings, out))
        if found:
            return Packed(found, now=False)
        if force:
            group.rank0(target.manifests)  # refuses what is no pack
        parts = group.barrier_run(load)
        packing = _Packing(settings, directory, workers or default_workers(), group)
        outcomes = [packing.write(part) for part in parts]
        unreadable = {
            part.name: outcome for part, outcome in zip(parts, outcomes, strict=True) if isinstance(outcome, dict)
        }
        if unreadable and not skip_bad:
            raise group.rank0(lambda: _all_unreadable(unreadable, out))
        if unreadable:
            outcomes = [
                packing.write(_without(part, outcome)) if isinstance(outcome, dict) else outcome
                for part, outcome in zip(parts, outcomes, strict=True)
            ]
            group.rank0(lambda: write_file(directory / UNREADABLE, _unreadable_lines(unreadable)))
        manifests = tuple(outcome for outcome in outcomes if isinstance(outcome, Manifest))
        assert len(manifests) == len(parts), "pictures that could be read can no longer"
        if unreadable:
            group.barrier_run(lambda: _remove_others(directory, manifests))
        target.complete(group, directory, manifests)
    return Packed(manifests, now=True, skipped=sum(map(len, unreadable.values())))


@dataclass(frozen=True)
class _Packing:
    settings: PackSettings
    directory: Path
    workers: int
    group: ProcessGroup

    def write(self, part: RawSplit) -> Manifest | dict[int, str]:
        """Write a part's files; its manifest, or why which raw rows cannot be read. The same on every rank."""
        directory = self.directory / part.name
        layout = self._layout(part)
        order = permutation(layout.samples, self.settings.seed, PACKING_STREAM + SPLITS.index(part.name))
        writer = make_writer(self.settings.store, directory, layout, self.settings.compression)

        def start() -> tuple[RawFile, ...]:
            directory.mkdir(exist_ok=True)
            return (*writer.start(), *_write_origins(part, directory))

        files = self.group.barrier_run(start)  # on every rank, as their directories may differ; the files do not
        mine = range(self.group.rank, layout.shards, self.group.size)
        total = sum(len(layout.samples_of(number)) for number in mine)
        bar = tqdm(
            total=total,
            desc=f"packing {part.name}",
            unit=" images",
            unit_scale=True,
            disable=True if self.group.rank else None,
        )

        def write_shard(number: int, advance: Advance) -> tuple[int, Written | dict[int, str]]:
            try:
                return number, writer.write_shard(number, self._blocks(part, order, layout, number, advance))
            except UnreadableImages as error:
                return number, error.reasons

        def write_mine() -> list[tuple[int, Written | dict[int, str]]]:
            with bar:
                return map_in_processes(write_shard, mine, self.workers, bar)

        shards = dict(shard for shards in self.group.all_gather(write_mine) for shard in shards)
        reasons = {row: why for shard in shards.values() if isinstance(shard, dict) for row, why in shard.items()}
        if reasons:
            return dict(sorted(reasons.items()))
        written = [shards[number] for number in range(layout.shards)]
        return self._manifest(part, layout, written, files)

    def _layout(self, part: RawSplit) -> Layout:
        if part.encoded != (self.settings.store == "records"):
            raise UserError(
                found=f"--store {self.settings.store} for images of shape {list(part.image_shape)}",
                expected="records for picture files of differing sizes, tar or zarr for images of one size",
                hint="leave --store out, or name a --size",
            )
        if part.encoded:
            return Layout(len(part.labels), part.image_shape, 1, _RECORDS_PER_SHARD)
        block_size = self.settings.block_size
        block_bytes = block_size * int(np.prod(part.image_shape))
        if block_bytes > MOST_BLOCK_BYTES:
            height, width, channels = part.image_shape
            raise UserError(
                found=f"images of {height}x{width}x{channels}, {block_bytes / 1e9:.1f} GB a block of {block_size}",
                expected=f"blocks of at most {MOST_BLOCK_BYTES / 1e9:.1f} GB, which are read whole",
                hint="store them smaller (--size 224), fewer together (--block-size 32), or as files (--store records)",
            )
        blocks = max(1, SHARD_BYTES // block_bytes)
        return Layout(len(part.labels), part.image_shape, block_size, blocks * block_size)

    def _blocks(
        self, part: RawSplit, order: NDArray[np.int64], layout: Layout, number: int, advance: Advance
    ) -> Iterator[Block]:
        """Read the blocks of a shard one by one; at its end raise `UnreadableImages` for all that could not be read."""
        samples = layout.samples_of(number)
        size = _RECORDS_AT_ONCE if part.encoded else layout.block_size
        unreadable: dict[int, str] = {}

        def read(first: int) -> tuple[Block | None, dict[int, str]]:
            positions = order[first : min(first + size, samples.stop)]
            rows = part.rows[positions]
            try:
                return Block(first, part.read(rows), part.labels[positions], rows), {}
            except UnreadableImages as error:
                return None, error.reasons
            finally:
                advance(len(positions))

        # With fewer shards than workers, the workers decode with several threads each.
        threads = -(-self.workers // max(1, layout.shards // self.group.size))
        with ThreadPoolExecutor(threads) as pool:
            for block, reasons in _in_order(pool, read, range(samples.start, samples.stop, size), 2 * threads):
                unreadable |= reasons
                # After a bad one the shard is of no use, and is only read on to find all of them.
                if block is not None and not unreadable:
                    yield block
        if unreadable:
            raise UnreadableImages(unreadable)

    def _manifest(self, part: RawSplit, layout: Layout, written: list[Written], files: tuple[RawFile, ...]) -> Manifest:
        settings = self.settings
        counts = np.bincount(part.labels, minlength=len(part.classes))
        return Manifest(
            store=settings.store,
            dataset=settings.dataset,
            variant=settings.split,
            split=part.name,
            classes=part.classes,
            counts=tuple(counts.tolist()),
            image_shape=part.image_shape,
            transposed=part.transposed,
            samples=layout.samples,
            block_size=layout.block_size,
            seed=settings.seed,
            options=settings.recorded_options,
            shards=tuple(shard for shard, _ in written),
            files=(*(file for _, files_of_shard in written for file in files_of_shard), *files),
            raw=part.files,
            versions={
                **{package: version(package) for package in ("inkstream", *_WRITTEN_WITH[settings.store])},
                "python": platform.python_version(),
            },
        )


def _in_order(pool: Executor, work: Callable[[int], T], items: Iterable[int], ahead: int) -> Iterator[T]:
    """`map(work, items)` by a pool, with no more than `ahead` results waiting."""
    waiting: deque[Future[T]] = deque()
    for item in items:
        waiting.append(pool.submit(work, item))
        if len(waiting) == ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _write_origins(part: RawSplit, directory: Path) -> tuple[RawFile, ...]:
    """Write `origins.csv`, where the images of a part came from, if the source tells."""
    if not part.columns:
        return ()
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(["row", *part.columns])
    columns = [part.rows.tolist(), *(values.tolist() for values in part.columns.values())]
    lines.writerows(sorted(zip(*columns, strict=True)))
    content = text.getvalue().encode()
    # Not by a rename: several ranks may write it at once, all with the same bytes.
    (directory / ORIGINS).write_bytes(content)
    return (RawFile(name=ORIGINS, bytes=len(content), sha256=hashlib.sha256(content).hexdigest()),)


def _without(part: RawSplit, unreadable: Mapping[int, str]) -> RawSplit:
    """The part without the raw rows that cannot be read."""
    readable = np.flatnonzero(~np.isin(part.rows, list(unreadable)))
    if not len(readable):
        raise UserError(
            found=f"no readable picture in the {part.name} part: {next(iter(unreadable.values()))}",
            expected="at least one",
            hint="look at the files: are they pictures (PNG, JPEG, WebP, BMP)?",
        )
    return part.select(readable)


def _remove_others(directory: Path, manifests: tuple[Manifest, ...]) -> None:
    """Remove files of the first attempt that the second, with fewer images, has not overwritten."""
    for manifest in manifests:
        part = directory / manifest.split
        named = {part / file.name for file in manifest.everything}
        for path in part.rglob("*"):
            if path.is_file() and path not in named:
                path.unlink(missing_ok=True)


def _unreadable_lines(unreadable: Mapping[str, Mapping[int, str]]) -> str:
    """The report of unreadable pictures: part, raw row and reason, as CSV."""
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(["part", "row", "reason"])
    lines.writerows((part, row, reason) for part, reasons in unreadable.items() for row, reason in reasons.items())
    return text.getvalue()


def _all_unreadable(unreadable: Mapping[str, Mapping[int, str]], out: Path | str) -> UserError:
    """The message that names the unreadable pictures; where they are many, a report beside `out` names the others."""
    reasons = [reason for part in unreadable.values() for reason in part.values()]
    named = "\n       ".join(reasons[:_NAMED])
    if len(reasons) > _NAMED:
        report = Path(f"{Path(str(out)).name}.{UNREADABLE}").absolute()
        write_file(report, _unreadable_lines(unreadable))
        named += f"\n           and {len(reasons) - _NAMED:,} more, all of them in {report}"
    return UserError(
        found=f"{len(reasons):,} unreadable pictures:\n           {named}",
        expected="pictures that can be decoded",
        hint="mend or remove them, or leave them out with --skip-bad",
    )
