"""Hugging Face datasets: Arrow files, read through torch's DataLoader."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import datasets
import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader

from benchmarks.loaders.baselines.peer import Batch, Epochs, Source, Task, Variant
from benchmarks.loaders.baselines.torch_dataloader import as_it_is
from benchmarks.loaders.baselines.transforms import BatchTransform, on_device, picture_transform, transformed


class Batches:
    """Whole batches of the Arrow table, through `__getitems__`, which DataLoader calls where a data set has it."""

    def __init__(self, dataset: datasets.Dataset, image_shape: tuple[int, int, int]) -> None:
        self._dataset = dataset
        self._image_shape = image_shape

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitems__(self, rows: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        table = self._dataset[rows].combine_chunks()
        pixels = np.frombuffer(bytearray().join(table["pixels"].to_pylist()), np.uint8).reshape(-1, *self._image_shape)
        return torch.from_numpy(pixels), torch.from_numpy(table["row"].to_numpy().copy())


class HuggingFace:
    variants = (
        Variant(
            "documented",
            "pictures",
            "Image feature, set_transform with torchvision transforms image by image",
            levels=1.5,
            processes=True,
        ),
        Variant("best", "bytes", "binary feature, with_format('arrow'), F.interpolate on the batch", processes=True),
    )

    def pack(self, source: Source, form: str, directory: Path, batch_size: int) -> Path:
        rows = np.arange(len(source))
        if form == "bytes":
            columns = {"pixels": [pixels.tobytes() for pixels in source.upright], "row": rows}
            dataset = datasets.Dataset.from_dict(columns)
        else:
            gray = source.upright.shape[3] == 1
            pictures = [Image.fromarray(pixels[..., 0] if gray else pixels) for pixels in source.upright]
            features = datasets.Features({"image": datasets.Image(), "row": datasets.Value("int64")})
            dataset = datasets.Dataset.from_dict({"image": pictures, "row": rows}, features=features)
        dataset.save_to_disk(str(directory / "arrow"))
        return directory / "arrow"

    def open(self, directory: Path, variant: str, task: Task) -> Epochs:
        dataset = datasets.load_from_disk(str(directory / "arrow"))
        documented = variant == "documented"
        if documented:
            picture = picture_transform(task)

            def transforms(examples: dict) -> dict:
                return {"image": [picture(image) for image in examples["image"]], "row": examples["row"]}

            dataset.set_transform(transforms)
        else:
            dataset = Batches(dataset.with_format("arrow"), task.image_shape)
        random = torch.Generator()
        loader = DataLoader(
            dataset,
            task.batch_size,
            shuffle=True,
            drop_last=True,
            num_workers=task.workers,
            persistent_workers=task.workers > 0,
            pin_memory=task.device.type == "cuda",
            generator=random,
            collate_fn=None if documented else as_it_is,
        )
        transform = BatchTransform(task)

        def epoch(number: int) -> Iterator[Batch]:
            random.manual_seed(task.seed + number)
            if not documented:
                return transformed(loader, transform)
            return on_device(((batch["image"], batch["row"]) for batch in loader), task)

        return epoch


PEERS = {"huggingface-datasets": HuggingFace()}
