"""The webdataset library on records of one image, and on Inkstream's blocks, which are webdataset records as well."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import webdataset

from benchmarks.loaders.baselines.base import Batch, Epochs, Source, Task, Variant
from benchmarks.loaders.baselines.inkstream import pack_upright_blocks
from benchmarks.loaders.baselines.transforms import (
    BatchTransform,
    apply_transform,
    move_to_device,
    pil_transform,
    to_pil,
)

_DOCUMENTED_SHUFFLE = 1000  # samples in the buffer, as in the examples of the documentation
_BEST_SHUFFLE = 4096
_SHARDS = 8  # at least one per worker, for up to eight workers


def write_records(source: Source, directory: Path) -> list[Path]:
    """Write tar shards of records `00000042.png`, `00000042.cls` (the source index as text) and return their paths."""
    paths = []
    for number, indices in enumerate(np.array_split(np.arange(len(source)), min(_SHARDS, len(source)))):
        path = directory / f"records-{number:02d}.tar"
        # The default is a fractional time, which costs two more tar blocks per member.
        with webdataset.TarWriter(str(path), mtime=0) as writer:
            for index in indices.tolist():
                png = io.BytesIO()
                to_pil(source.upright[index]).save(png, "PNG")
                writer.write({"__key__": f"{index:08d}", "png": png.getvalue(), "cls": str(index).encode()})
        paths.append(path)
    return paths


def record_paths(directory: Path) -> list[Path]:
    """Return the shards of `write_records`."""
    return sorted(directory.glob("records-*.tar"))


def stack_samples(samples: list[tuple[np.ndarray, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Stack decoded images and their source indices to tensors uint8 [B, H, W, C] and int64 [B]."""
    pixels = torch.from_numpy(np.stack([image for image, _ in samples]))
    return pixels if pixels.ndim == 4 else pixels.unsqueeze(3), torch.tensor([index for _, index in samples])


class WebDatasetReader:
    """`WebDataset` with shuffled shards and a shuffle buffer."""

    variants = (
        Variant(
            "documented",
            "records",
            f"shuffle({_DOCUMENTED_SHUFFLE}), decode to PIL, torchvision transforms image by image",
            tolerance_levels=1.5,
            uses_workers=True,
        ),
        Variant(
            "best",
            "records",
            f"shuffle({_BEST_SHUFFLE}), decode to arrays, F.interpolate per batch",
            uses_workers=True,
        ),
        Variant("blocks", "blocks", "Inkstream's block records: a block is a batch, only their order is random"),
    )

    def pack(self, source: Source, file_format: str, directory: Path, batch_size: int) -> Path:
        if file_format == "blocks":
            return pack_upright_blocks(source, directory / "set", batch_size)
        write_records(source, directory)
        return directory

    def open(self, directory: Path, variant: str, task: Task) -> Epochs:
        transform = BatchTransform(task)
        if variant == "blocks":
            return lambda number: apply_transform(self._blocks(directory, task, number), transform)
        if variant == "best":
            return lambda number: apply_transform(self._array_batches(directory, task, number), transform)
        return lambda number: move_to_device(self._pil_batches(directory, task, number), task)

    def _loader(self, dataset: webdataset.WebDataset, task: Task) -> webdataset.WebLoader:
        return webdataset.WebLoader(
            dataset, batch_size=None, num_workers=task.workers, pin_memory=task.device.type == "cuda"
        )

    def _pil_batches(self, directory: Path, task: Task, number: int) -> webdataset.WebLoader:
        dataset = (
            self._shards(record_paths(directory), task, number)
            .shuffle(_DOCUMENTED_SHUFFLE)
            .decode("pil" if task.image_shape[2] == 3 else "pill")
            .to_tuple("png", "cls")
            .map_tuple(pil_transform(task))
            .batched(task.batch_size, partial=False)
        )
        return self._loader(dataset, task)

    def _array_batches(self, directory: Path, task: Task, number: int) -> webdataset.WebLoader:
        dataset = (
            self._shards(record_paths(directory), task, number)
            .shuffle(_BEST_SHUFFLE)
            .decode("rgb8" if task.image_shape[2] == 3 else "l8")
            .to_tuple("png", "cls")
            .batched(task.batch_size, collation_fn=stack_samples, partial=False)
        )
        return self._loader(dataset, task)

    def _blocks(self, directory: Path, task: Task, number: int) -> Iterator[Batch]:
        paths = sorted((directory / "set" / "train").glob("*.tar"))
        dataset = self._shards(paths, task, number).shuffle(_BEST_SHUFFLE).decode().to_tuple("images.npy", "rows.npy")
        for pixels, indices in dataset:
            yield torch.from_numpy(pixels), indices

    def _shards(self, paths: list[Path], task: Task, number: int) -> webdataset.WebDataset:
        return webdataset.WebDataset(
            [str(path) for path in paths], shardshuffle=len(paths), detshuffle=True, seed=task.seed + number
        )


LOADERS = {"webdataset": WebDatasetReader()}
