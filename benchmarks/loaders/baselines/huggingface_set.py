"""Hugging Face datasets: Arrow files, read through torch's `DataLoader`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import datasets
import numpy as np
import torch
from torch.utils.data import DataLoader

from benchmarks.loaders.baselines.base import Batch, Epochs, Source, Task, Variant
from benchmarks.loaders.baselines.torch_dataloader import keep_batch
from benchmarks.loaders.baselines.transforms import (
    BatchTransform,
    apply_transform,
    loader_options,
    move_to_device,
    pil_transform,
    to_pil,
)


class ArrowBatches:
    """Complete batches of the Arrow table through `__getitems__`, which `DataLoader` calls if it exists."""

    def __init__(self, dataset: datasets.Dataset, image_shape: tuple[int, int, int]) -> None:
        self._dataset = dataset
        self._image_shape = image_shape

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitems__(self, indices: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        table = self._dataset[indices].combine_chunks()
        pixels = np.frombuffer(bytearray().join(table["pixels"].to_pylist()), np.uint8).reshape(-1, *self._image_shape)
        return torch.from_numpy(pixels), torch.from_numpy(table["row"].to_numpy().copy())


class HuggingFace:
    """`datasets.Dataset` on disk."""

    variants = (
        Variant(
            "documented",
            "png",
            "Image feature, set_transform with torchvision transforms image by image",
            tolerance_levels=1.5,
            uses_workers=True,
        ),
        Variant("best", "bytes", "binary feature, with_format('arrow'), F.interpolate on the batch", uses_workers=True),
    )

    def pack(self, source: Source, file_format: str, directory: Path, batch_size: int) -> Path:
        indices = np.arange(len(source))
        if file_format == "bytes":
            columns = {"pixels": [pixels.tobytes() for pixels in source.upright], "row": indices}
            dataset = datasets.Dataset.from_dict(columns)
        else:
            images = [to_pil(pixels) for pixels in source.upright]
            features = datasets.Features({"image": datasets.Image(), "row": datasets.Value("int64")})
            dataset = datasets.Dataset.from_dict({"image": images, "row": indices}, features=features)
        dataset.save_to_disk(str(directory / "arrow"))
        return directory / "arrow"

    def open(self, directory: Path, variant: str, task: Task) -> Epochs:
        dataset = datasets.load_from_disk(str(directory / "arrow"))
        documented = variant == "documented"
        if documented:
            transform_image = pil_transform(task)

            def transforms(examples: dict) -> dict:
                return {"image": [transform_image(image) for image in examples["image"]], "row": examples["row"]}

            dataset.set_transform(transforms)
        else:
            dataset = ArrowBatches(dataset.with_format("arrow"), task.image_shape)
        random = torch.Generator()
        loader = DataLoader(
            dataset,
            shuffle=True,
            generator=random,
            collate_fn=None if documented else keep_batch,
            **loader_options(task),
        )
        transform = BatchTransform(task)

        def epoch(number: int) -> Iterator[Batch]:
            random.manual_seed(task.seed + number)
            if not documented:
                return apply_transform(loader, transform)
            return move_to_device(((batch["image"], batch["row"]) for batch in loader), task)

        return epoch


LOADERS = {"huggingface-datasets": HuggingFace()}
