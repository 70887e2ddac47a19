"""Measure how one loader starts an epoch over N images; the growth benchmark runs this file in a fresh process.

    python -P growth_worker.py '{"loader": "grain", "samples": 1000000, "action": "measure", ...}'

The code under test may be that of an earlier revision, so this file imports nothing else of the benchmarks except the
loaders of other libraries. Each phase is printed as one line of JSON when it ends, so that the phases before a kill
are kept.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import json
import os
import shutil
import statistics
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

BATCH_SIZE = 512
MEAN, STD = (0.17,), (0.33,)
TEST_IMAGES = 10_000
_EPOCHS = 5
_LONG_WARM_UP = 20.0  # from 10^8 images on
_WARM_UP = 2.0  # CPU time before the rate of images is measured: blocks are read for the first time, windows fill
_SECONDS = 0.5  # CPU time after which a phase is not repeated


class Clock:
    """Wall time and CPU time since its creation, and peak memory in this time.

    Args:
        memory: Resident memory that is subtracted, in bytes.
    """

    def __init__(self, memory: int) -> None:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        self._memory = memory
        self._cpu = _cpu_seconds()
        self._start = time.perf_counter()

    def read(self) -> dict[str, float]:
        """Return seconds, cpu_seconds and memory_bytes."""
        seconds, cpu = time.perf_counter() - self._start, _cpu_seconds() - self._cpu
        return {"seconds": seconds, "cpu_seconds": cpu, "memory_bytes": max(0, _memory("VmHWM") - self._memory)}


def _cpu_seconds() -> float:
    """Return the CPU time of this process and of its children that ended."""
    return time.process_time() + sum(os.times()[2:4])


def _memory(name: str) -> int:
    status = Path("/proc/self/status").read_text()
    return int(status[status.index(name) :].split(maxsplit=2)[1]) * 1024


class Source:
    """Images of the benchmark, repeated as often as needed: pixels.npy uint8 [M, H, W, C] and labels.npy int64 [M]."""

    def __init__(self, directory: Path) -> None:
        self.pixels = np.load(directory / "pixels.npy", mmap_mode="r")
        self.labels = np.load(directory / "labels.npy")
        self.metadata = json.loads((directory / "metadata.json").read_text())

    def read(self, rows: Any) -> Any:
        """Return the images of rows int64 [n], or of one row."""
        return self.pixels[rows % len(self.pixels)]


class Repeated:
    """The upright images of a source, repeated to N, with the interface that the other loaders pack."""

    def __init__(self, source: Source, samples: int) -> None:
        self.labels = np.resize(source.labels, samples)
        pixels = np.asarray(source.pixels)
        self._pixels = np.ascontiguousarray(pixels.swapaxes(1, 2)) if source.metadata["transposed"] else pixels
        self.upright = self
        self.shape = (samples, *self._pixels.shape[1:])

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, row: int) -> Any:
        if row >= len(self):
            raise IndexError(row)  # ends an iteration
        return self._pixels[row % len(self._pixels)]


class Inkstream:
    """The training data of this project, opened as the trainer does.

    Args:
        directory: Packed data set.
        samples: Number of training images.
        cache_gb: Memory for images. If it is less than the images, samples are shuffled within a window.
    """

    def __init__(self, directory: Path, samples: int, source: Path, cache_gb: float = 1e6) -> None:
        self._directory = directory
        self._samples = samples
        self._source = source
        self._cache_gb = cache_gb

    def pack(self) -> None:
        """Pack the images."""
        from pipeline.packing.pack import PackSettings, pack
        from pipeline.readers.raw_split import RawSplit

        source = Source(self._source)

        def split(name: str, count: int) -> RawSplit:
            metadata, shape = source.metadata, source.pixels.shape[1:]
            classes = tuple(f"class {number}" for number in range(metadata["classes"]))
            labels = np.resize(source.labels, count)
            return RawSplit(name, classes, labels, shape, metadata["transposed"], source.read)

        def load() -> tuple[RawSplit, ...]:
            return split("train", self._samples), split("test", min(self._samples, TEST_IMAGES))

        pack(load, self._directory, PackSettings("growth"))

    def make(self) -> None:
        """Write a data set whose shards are one shard of real images under many names, by hard links."""
        from pipeline.packing.pack import DEFAULT_BLOCK_SIZE, SHARD_BYTES
        from shards.manifest import Manifest, RawFile, Shard

        count = self._samples
        image_bytes = Source(self._source).pixels[0].size
        self._samples = SHARD_BYTES // (DEFAULT_BLOCK_SIZE * image_bytes) * DEFAULT_BLOCK_SIZE
        self.pack()
        train = self._directory / "train"
        manifest = Manifest.read(train)
        (shard,) = manifest.shards
        index = next(file for file in manifest.files if file.name.endswith(".idx"))
        copies = -(-count // shard.samples)

        def link(file: Shard | RawFile, number: int) -> Any:
            name = f"shard-{number:05d}{Path(file.name).suffix}"
            if number:
                os.link(train / file.name, train / name)
            return file.model_copy(update={"name": name})

        files = tuple(link(index, number) for number in range(copies))
        if manifest.version > 2:
            from shards.stores.sample_arrays import write_array

            for name in ("labels.npy", "rows.npy", "blocks.npy"):
                values = np.load(train / name)
                pieces = itertools.repeat(values, copies)
                files += (write_array(train / name, values.dtype, copies * len(values), pieces),)
        changes = {
            "samples": copies * shard.samples,
            "counts": tuple(copies * number for number in manifest.counts),
            "shards": tuple(link(shard, number) for number in range(copies)),
            "files": files,
        }
        manifest.model_copy(update=changes).write(train)

    def load_code(self) -> None:
        """Import what the phases need, before a clock starts."""
        for name in ("trainer.config.load", "trainer.data.training_data"):
            importlib.import_module(name)

    def open(self) -> None:
        """Open the training split."""
        from shards import open_split

        self._store = open_split(self._directory, "train", int(self._cache_gb * 0.75e9))

    def prepare(self) -> None:
        """Open all splits, split off validation images and build the loader, as at the start of a training."""
        import trainer
        from trainer.config.load import load
        from trainer.data.training_data import open_data
        from trainer.runtime.distributed import World

        assert trainer.__file__
        recipe = Path(trainer.__file__).parents[1] / "configs" / "byclass_cpu.yaml"
        settings = {"data.shards": self._directory, "loader.cache_gb": self._cache_gb, "loader.batch_size": BATCH_SIZE}
        settings |= {"data.resolution": 28, "loader.backend": "torch"}
        config = load(recipe, [f"{name}={value}" for name, value in settings.items()])
        self._loader: Any = open_data(config, World()).train

    def indices(self, epoch: int) -> Iterator[Any]:
        """Iterate over the indices of the batches of an epoch."""
        return (step.samples for step in self._loader.sampler_at(epoch).steps(epoch, 0, 1))

    def images(self, epoch: int) -> Iterator[Any]:
        """Iterate over the model input of the batches of an epoch."""
        return (batch.images for batch in self._loader.batches(epoch))


class OtherLoader(ABC):
    """A loader of another library.

    Args:
        directory: Its files.
        samples: Number of images N.
        source: Directory of the images.
    """

    module: str
    file_format = ""
    variant = "best"

    def __init__(self, directory: Path, samples: int, source: Path) -> None:
        self._directory = directory
        self._samples = samples
        self._source = source

    def _baseline(self) -> Any:
        module = importlib.import_module(f"benchmarks.loaders.baselines.{self.module}")
        (baseline,) = module.LOADERS.values()
        return baseline

    def _task(self) -> Any:
        import torch

        from benchmarks.loaders.baselines.base import Task

        height, width, channels = Source(self._source).pixels.shape[1:]
        shape = (height, width, channels)
        return Task(shape, self._samples, max(shape), BATCH_SIZE, MEAN, STD, 0, torch.device("cpu"))

    def pack(self) -> None:
        """Pack the images as in the benchmark of loaders."""
        self._directory.mkdir(parents=True, exist_ok=True)
        source = Repeated(Source(self._source), self._samples)
        self._baseline().pack(source, self.file_format, self._directory, BATCH_SIZE)

    def make(self) -> None:
        """Write a data set of the images, whose index repeats them to N or more."""
        count, self._samples = self._samples, len(Source(self._source).pixels)
        self.pack()
        self._repeat(count)

    @abstractmethod
    def _repeat(self, count: int) -> None:
        """Change the index of packed images, so that it has at least `count` of them."""

    def load_code(self) -> None:
        """Import the library, before a clock starts."""
        self._baseline()

    def open(self) -> None:
        """Open the files."""
        self._epochs = self._baseline().open(self._directory, self.variant, self._task())

    def images(self, epoch: int) -> Iterator[Any]:
        """Iterate over the model input of the batches of an epoch."""
        return (images for images, _ in self._epochs(epoch))

    @abstractmethod
    def indices(self, epoch: int) -> Iterator[Any]:
        """Iterate over the indices of the batches of an epoch, without reading images."""


class _OneArray(OtherLoader):
    """Loaders over a memory-mapped array uint8 [N, H, W, C]."""

    def pack(self) -> None:
        self._directory.mkdir(parents=True, exist_ok=True)
        source = Repeated(Source(self._source), self._samples)
        array = np.lib.format.open_memmap(self._directory / "pixels.npy", "w+", np.uint8, source.shape)
        for start in range(0, len(source), len(source._pixels)):
            array[start : start + len(source._pixels)] = source._pixels[: len(source) - start]
        array.flush()

    def _repeat(self, count: int) -> None:
        self._samples = count  # `RepeatedRows` repeats them

    def _array(self) -> RepeatedRows:
        return RepeatedRows(np.load(self._directory / "pixels.npy", mmap_mode="r"), self._samples)


class RepeatedRows:
    """An array that is repeated to N rows; a dataset of torch that returns complete batches.

    Args:
        array: uint8 [M, H, W, C].
        samples: N.
    """

    def __init__(self, array: Any, samples: int) -> None:
        self._array = array
        self._samples = samples

    def __len__(self) -> int:
        return self._samples

    def __getitem__(self, rows: Any) -> Any:
        return self._array[np.asarray(rows) % len(self._array)]

    def __getitems__(self, rows: list[int]) -> tuple[Any, Any]:
        import torch

        return torch.from_numpy(self[rows]), torch.tensor(rows)


class Torch(_OneArray):
    """`RandomSampler` and `DataLoader`, batch by batch."""

    module = "torch_dataloader"

    def open(self) -> None:
        import torch

        from benchmarks.loaders.baselines.torch_dataloader import keep_batch
        from benchmarks.loaders.baselines.transforms import BatchTransform, apply_transform

        random = torch.Generator()
        dataset: Any = self._array()
        loader = torch.utils.data.DataLoader(dataset, BATCH_SIZE, shuffle=True, collate_fn=keep_batch, generator=random)
        transform = BatchTransform(self._task())

        def epoch(number: int) -> Any:
            random.manual_seed(number)
            return apply_transform(loader, transform)

        self._epochs = epoch

    def indices(self, epoch: int) -> Iterator[Any]:
        from torch import Generator
        from torch.utils.data import BatchSampler, RandomSampler

        generator = Generator().manual_seed(epoch)
        sampler = RandomSampler(range(self._samples), generator=generator)
        return iter(BatchSampler(sampler, BATCH_SIZE, drop_last=True))


class Spdl(_OneArray):
    """`DistributedRandomSampler` and a pipeline in threads."""

    module = "spdl_loader"

    def open(self) -> None:
        from benchmarks.loaders.baselines.spdl_loader import open_array

        array: Any = self._array()
        self._epochs = open_array(array, self.variant, self._task())

    def indices(self, epoch: int) -> Iterator[Any]:
        from spdl.source import DistributedRandomSampler

        sampler = DistributedRandomSampler(self._samples, rank=0, world_size=1)
        sampler.shuffle(seed=epoch)
        return _in_batches(iter(sampler))


class Streaming(OtherLoader):
    """`StreamingDataset` with the default shuffle, py1e."""

    module = "mosaic_stream"
    file_format = "bytes"

    def _repeat(self, count: int) -> None:
        _repeat_in_index(self._directory / "mds" / "index.json", "shards", "samples", count)

    def open(self) -> None:
        from streaming.base.util import clean_stale_shared_memory

        clean_stale_shared_memory()  # of a process that was killed
        super().open()

    def indices(self, epoch: int) -> Iterator[Any]:
        from streaming import StreamingDataset

        class Indices(StreamingDataset):
            def __getitem__(self, at: Any) -> Any:
                return at

        if not hasattr(self, "_indices"):
            options: dict[str, Any] = {"shuffle": True, "batch_size": BATCH_SIZE}
            self._indices = Indices(local=str(self._directory / "mds"), **options)
        return _in_batches(iter(self._indices))


class LitData(OtherLoader):
    """`StreamingDataset` of LitData: chunks in random order, shuffled within each."""

    module = "litdata_stream"
    file_format = "bytes"

    def _repeat(self, count: int) -> None:
        _repeat_in_index(self._directory / "chunks" / "index.json", "chunks", "chunk_size", count)

    def indices(self, epoch: int) -> Iterator[Any]:
        import litdata

        class Indices(litdata.StreamingDataset):
            def __getitem__(self, at: Any) -> Any:
                return at.index

        if not hasattr(self, "_indices"):
            self._indices = Indices(str(self._directory / "chunks"), shuffle=True, item_shuffle_window=0)
        return _in_batches(iter(self._indices))


class Grain(OtherLoader):
    """`MapDataset.shuffle` over ArrayRecord files."""

    module = "grain_loader"

    def _repeat(self, count: int) -> None:
        (self._directory / "copies").write_text(str(-(-count // self._samples)))

    def open(self) -> None:
        from benchmarks.loaders.baselines.grain_loader import open_files

        copies = self._directory / "copies"
        paths = [str(self._directory / "images.array_record")] * int(copies.read_text() if copies.exists() else 1)
        self._epochs = open_files(paths, self.variant, self._task())

    def indices(self, epoch: int) -> Iterator[Any]:
        import grain

        shuffled = grain.MapDataset.range(self._samples).shuffle(seed=epoch)
        return _in_batches(shuffled[number] for number in range(self._samples))


def _repeat_in_index(path: Path, name: str, size: str, count: int) -> None:
    """Repeat the files of a JSON index until they have at least `count` samples."""
    index = json.loads(path.read_text())
    files = itertools.cycle(index[name])
    repeated, total = [], 0
    while total < count:
        repeated.append(next(files))
        total += repeated[-1][size]
    index[name] = repeated
    path.write_text(json.dumps(index))


def _in_batches(indices: Iterator[Any]) -> Iterator[list[Any]]:
    while batch := list(itertools.islice(indices, BATCH_SIZE)):
        yield batch


LOADERS: dict[str, Callable[..., Any]] = {
    "inkstream": Inkstream,
    "torch": Torch,
    "mosaicml-streaming": Streaming,
    "litdata": LitData,
    "grain": Grain,
    "spdl": Spdl,
}


def measure(subject: Any) -> None:
    """Print the phases: import, open, prepare, indices, step, images."""
    warm_up = min(max(_WARM_UP, subject._samples * 2e-7), _LONG_WARM_UP)
    subject.load_code()
    imported = _memory("VmRSS")
    _print("import", {"private_bytes": _memory("RssAnon") + _memory("RssShmem")})
    for name in ("open", "prepare"):
        if hasattr(subject, name):
            _print(name)
            clock = Clock(imported)
            getattr(subject, name)()
            _print(name, clock.read() | _handles())
    for name, batches in (("indices", subject.indices), ("step", subject.images)):
        _print(name)
        _print(name, _first_batch(batches, imported))
    for name, batches, seconds in (("indices/s", subject.indices, 0.0), ("images/s", subject.images, warm_up)):
        _print(name)
        _print(name, _rate(batches, seconds))


def _first_batch(batches: Callable[[int], Iterator[Any]], memory: int) -> dict[str, float]:
    """Return the medians of the first batch of several epochs."""
    measured: list[dict[str, float]] = []
    spent = time.process_time() + _SECONDS
    # Epoch 0 is not measured unless it is slow, because it loads code.
    for epoch in range(_EPOCHS + 1):
        clock = Clock(memory)
        iterator = batches(epoch)
        next(iterator)
        measured.append(clock.read())
        if time.process_time() > spent:
            break
    measured = measured[1:] or measured
    return {name: statistics.median(one[name] for one in measured) for name in measured[0]}


def _rate(batches: Callable[[int], Iterator[Any]], warm_up: float) -> dict[str, float]:
    """Return items per second and per CPU second, after the first batch of an epoch, over several epochs if short."""
    items = itertools.chain.from_iterable(map(batches, itertools.count(1)))
    next(items)
    warm = time.process_time() + warm_up
    while time.process_time() < warm:
        next(items)
    cpu, start, count = time.process_time(), time.perf_counter(), 0
    while time.process_time() - cpu < _SECONDS:
        count += len(next(items))
    return {
        "per_second": count / (time.perf_counter() - start),
        "per_cpu_second": count / (time.process_time() - cpu),
    }


def _handles() -> dict[str, float]:
    maps = Path("/proc/self/maps").read_text().count("\n")
    return {"descriptors": len(os.listdir("/proc/self/fd")), "maps": maps}


def _print(phase: str, values: dict[str, float] | None = None) -> None:
    """Print a phase; without values when it starts."""
    print(json.dumps({"phase": phase} | (values or {})), flush=True)


def main() -> None:
    """Run the work of the command line."""
    work = json.loads(sys.argv[1])
    directory = Path(work["directory"])
    make = LOADERS[work["loader"]]
    subject = make(directory, work["samples"], Path(work["source"]), **work.get("options", {}))
    if work["action"] == "measure":
        measure(subject)
        return
    shutil.rmtree(directory, ignore_errors=True)
    _print(work["action"])
    clock = Clock(_memory("VmRSS"))
    getattr(subject, work["action"])()
    _print(work["action"], clock.read())


if __name__ == "__main__":
    main()
