"""Made-up pictures of differing sizes and formats, packed by us and written by webdataset's own writer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

import pipeline.packing.pack
from pipeline.packing.pack import PackSettings, pack
from pipeline.readers.raw_split import RawSplit
from shards.manifest import RawFile
from shards.stores.base import EncodedImage
from support.raw_files import picture

FORMATS = {"png": ("PNG", {}), "jpg": ("JPEG", {"quality": 95}), "webp": ("WEBP", {}), "bmp": ("BMP", {})}


def synthetic_image(seed: int, label: int, channels: int = 3) -> NDArray[np.uint8]:
    """A random image of a random size, uint8 [H, W, C]; bright at the top for label 0, at the bottom for others."""
    random = np.random.default_rng([seed, label])
    height, width = random.integers(8, 48, 2)
    image = random.integers(0, 60, (height, width, channels), dtype=np.uint8)
    half = slice(0, height // 2) if label == 0 else slice(height // 2, None)
    image[half] += 180
    return image


def synthetic_file(seed: int, label: int) -> EncodedImage:
    extension = [*FORMATS][seed % len(FORMATS)]
    kind, options = FORMATS[extension]
    return EncodedImage(picture(synthetic_image(seed, label), kind, **options), extension)


def image_splits(train: int = 120, test: int = 40, classes: int = 2) -> tuple[RawSplit, ...]:
    """Picture files in four formats, sorted by class."""
    parts = []
    for name, count in (("train", train), ("test", test)):
        labels = np.sort(np.arange(count) % classes)
        files = [synthetic_file(count + number, int(label)) for number, label in enumerate(labels)]
        parts.append(
            RawSplit(
                name=name,
                classes=tuple(f"class {number}" for number in range(classes)),
                labels=labels,
                image_shape=(None, None, 3),
                transposed=False,
                read=lambda rows, files=files: [files[row] for row in rows],
                files=(RawFile(name=f"synthetic {name}", bytes=count, sha256="0" * 64),),
            )
        )
    return tuple(parts)


def pack_pictures(out: Path, records_per_shard: int = 50, workers: int = 1, **counts: int) -> Path:
    """Pack synthetic pictures; three shards of train and one of test unless told otherwise."""
    before = pipeline.packing.pack._RECORDS_PER_SHARD
    pipeline.packing.pack._RECORDS_PER_SHARD = records_per_shard
    try:
        pack(lambda: image_splits(**counts), out, PackSettings("synthetic", store="records"), workers=workers)
    finally:
        pipeline.packing.pack._RECORDS_PER_SHARD = before
    return out


def write_foreign(directory: Path, samples: list[dict], shard_size: int = 1000, **options: object) -> Path:
    """Write samples as webdataset does, `s-00000.tar` and so on."""
    webdataset = pytest.importorskip("webdataset")  # which a GPU machine may lack
    directory.mkdir(parents=True, exist_ok=True)
    with webdataset.ShardWriter(str(directory / "s-%05d.tar"), maxcount=shard_size, verbose=0, **options) as writer:
        for sample in samples:
            writer.write(sample)
    return directory


def foreign_samples(count: int, classes: int = 2) -> list[dict]:
    """Samples as others write them: keys with directories, more components than are needed."""
    samples = []
    for number in range(count):
        label = number * classes // count
        file = synthetic_file(number, label)
        samples.append(
            {
                "__key__": f"n{label:02d}/picture_{number:04d}",
                file.extension: file.content,
                "cls": label,
                "json": {"caption": "a picture", "number": number},
            }
        )
    return samples


def foreign_set(directory: Path, train: int = 60, test: int = 20, shard_size: int = 25) -> Path:
    """A set as others have written it, not indexed."""
    for part, count in (("train", train), ("test", test)):
        write_foreign(directory / part, foreign_samples(count), shard_size)
    return directory
