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

from benchmarks.loaders.baselines.peer import Batch, Epochs, Source, Task, Variant
from benchmarks.loaders.baselines.transforms import BatchTransform
from shards.cpus import available_cpus


class Indexed:
    """What the writer asks for: a length and samples by index."""

    def __init__(self, source: Source, channels: int) -> None:
        # FFCV has no field for gray pictures: its documentation's way is RGB.
        self._pixels = np.repeat(source.upright, channels // source.upright.shape[3], axis=3)

    def __len__(self) -> int:
        return len(self._pixels)

    def __getitem__(self, row: int) -> tuple[np.ndarray, int]:
        return self._pixels[row], row


class Ffcv:
    variants = (
        Variant("documented", "rgb", "RGBImageField (raw), torchvision modules in the pipeline; gray kept three times"),
        Variant("best", "arrays", "NDArrayField, F.interpolate on the batch as a module of the pipeline"),
    )

    def pack(self, source: Source, form: str, directory: Path, batch_size: int) -> Path:
        shape = source.upright.shape[1:]
        image = RGBImageField(write_mode="raw") if form == "rgb" else NDArrayField(np.dtype("uint8"), shape)
        writer = DatasetWriter(str(directory / "set.beton"), {"image": image, "row": IntField()}, num_workers=1)
        writer.from_indexed_dataset(Indexed(source, 3 if form == "rgb" else shape[2]))
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
                for images, rows in batches:
                    yield images[:, :channels], rows
            finally:
                batches.close()

        return epoch


def _torchvision(task: Task) -> list[torch.nn.Module]:
    """Modules as in the documentation's CIFAR example, for the three channels, each the first one if it is gray."""
    mean, std = ([255 * value for value in (values * 3)[:3]] for values in (task.mean, task.std))
    resize = [] if task.image_shape[:2] == (task.resolution,) * 2 else [v2.Resize((task.resolution,) * 2)]
    return [v2.Normalize(mean, std), *resize]


PEERS = {"ffcv": Ffcv()}
