"""FFCV: a .beton file, read and transformed by compiled pipelines in threads."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from ffcv.fields import IntField, NDArrayField, RGBImageField
from ffcv.fields.basics import IntDecoder
from ffcv.fields.decoders import NDArrayDecoder, SimpleRGBImageDecoder
from ffcv.loader import Loader, OrderOption
from ffcv.transforms import Convert, Squeeze, ToDevice, ToTensor, ToTorchImage
from ffcv.writer import DatasetWriter
from torchvision.transforms import v2

from benchmarks.loaders.baselines.base import Batch, Epochs, Source, Task, Variant
from benchmarks.loaders.baselines.transforms import BatchTransform
from shards.limits import available_cpus


class IndexedSource:
    """Images for the writer, which needs a length and samples by index."""

    def __init__(self, source: Source, channels: int) -> None:
        # FFCV has no field for gray images; its documentation uses RGB.
        self._pixels = np.repeat(source.upright, channels // source.upright.shape[3], axis=3)

    def __len__(self) -> int:
        return len(self._pixels)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return self._pixels[index], index


class Ffcv:
    """`ffcv.loader.Loader` with `OrderOption.RANDOM`."""

    variants = (
        Variant("documented", "rgb", "RGBImageField (raw), torchvision modules in the pipeline, gray as RGB"),
        Variant("best", "arrays", "NDArrayField, F.interpolate on the batch as a module of the pipeline"),
    )

    def pack(self, source: Source, file_format: str, directory: Path, batch_size: int) -> Path:
        shape = source.upright.shape[1:]
        image = RGBImageField(write_mode="raw") if file_format == "rgb" else NDArrayField(np.dtype("uint8"), shape)
        writer = DatasetWriter(str(directory / "set.beton"), {"image": image, "row": IntField()}, num_workers=1)
        writer.from_indexed_dataset(IndexedSource(source, 3 if file_format == "rgb" else shape[2]))
        return directory / "set.beton"

    def open(self, directory: Path, variant: str, task: Task) -> Epochs:
        documented = variant == "documented"
        to_device = [ToDevice(task.device)] if task.device.type == "cuda" else []
        if documented:
            image = [SimpleRGBImageDecoder(), ToTensor(), *to_device, ToTorchImage(channels_last=False)]
            image += [Convert(torch.float32), *_torchvision(task)]
        else:
            image = [NDArrayDecoder(), ToTensor(), *to_device, BatchTransform(task)]
        loader = Loader(
            str(directory / "set.beton"),
            batch_size=task.batch_size,
            num_workers=available_cpus(),
            order=OrderOption.RANDOM,
            os_cache=True,
            seed=task.seed,
            drop_last=True,
            pipelines={"image": image, "row": [IntDecoder(), ToTensor(), Squeeze()]},
        )
        channels = task.image_shape[2]

        def epoch(number: int) -> Iterator[Batch]:
            batches = iter(loader)
            try:
                for images, indices in batches:
                    yield images[:, :channels], indices
            finally:
                batches.close()

        return epoch


def _torchvision(task: Task) -> list[torch.nn.Module]:
    """Return the modules of the CIFAR example of the documentation; gray images have three equal channels."""
    mean, std = ([255 * value for value in (values * 3)[:3]] for values in (task.mean, task.std))
    resize = [] if task.image_shape[:2] == (task.resolution,) * 2 else [v2.Resize((task.resolution,) * 2)]
    return [v2.Normalize(mean, std), *resize]


LOADERS = {"ffcv": Ffcv()}
