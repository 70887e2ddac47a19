"""DALI's own reader of webdataset tars: on records of one image, as documented, and on our block records."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import nvidia.dali.fn as fn
import nvidia.dali.types as types
from numpy.typing import NDArray
from nvidia.dali import pipeline_def
from nvidia.dali.plugin.base_iterator import LastBatchPolicy
from nvidia.dali.plugin.pytorch import DALIGenericIterator
from wds2idx import IndexCreator

from benchmarks.loaders.baselines.inkstream import pack_upright_blocks
from benchmarks.loaders.baselines.peer import Batch, Epochs, Source, Task, Variant
from benchmarks.loaders.baselines.records import record_paths, write_records
from shards.cpus import available_cpus

_FILL = 4096  # samples that the reader shuffles among
_BLOCKS_A_BATCH = 8  # at most; DALI shares out a batch's samples among its threads, and here a sample is a block


class DaliReader:
    variants = (
        Variant("documented", "records", f"a PNG a record, initial_fill={_FILL}, resize, then normalise", levels=1.0),
        Variant("best", "records", "the same, normalised before the resize"),
        Variant("blocks", "blocks", f"block records, {_BLOCKS_A_BATCH} a batch, decoders.numpy, all blocks shuffled"),
    )

    def pack(self, source: Source, form: str, directory: Path, batch_size: int) -> Path:
        if form == "blocks":
            return pack_upright_blocks(source, directory / "set", batch_size // _blocks_a_batch(batch_size))
        for path in write_records(source, directory):
            with IndexCreator(str(path), str(path.with_suffix(".idx")), verbose=False) as creator:
                creator.create_index()
        return directory

    def open(self, directory: Path, variant: str, task: Task) -> Epochs:
        blocks = variant == "blocks"
        paths = sorted((directory / "set" / "train").glob("*.tar")) if blocks else record_paths(directory)
        pipeline = _pipeline(
            paths,
            task,
            variant,
            batch_size=_blocks_a_batch(task.batch_size) if blocks else task.batch_size,
            num_threads=available_cpus(),
            device_id=task.device.index or 0 if task.device.type == "cuda" else None,
            seed=task.seed,
        )
        iterator = DALIGenericIterator(
            pipeline,
            ["images", "rows"],
            reader_name="Reader",
            auto_reset=True,
            last_batch_policy=LastBatchPolicy.DROP,
            prepare_first_batch=False,
        )

        def epoch(number: int) -> Iterator[Batch]:
            """The reader counts its epochs by itself; one that was left in the middle goes on there."""
            for (output,) in iterator:
                images, rows = output["images"], output["rows"].numpy()
                if blocks:
                    yield images.flatten(0, 1).permute(0, 3, 1, 2), rows.reshape(-1)
                else:
                    yield images, _numbers(rows)

        return epoch


@pipeline_def(exec_dynamic=True)
def _pipeline(paths: list[Path], task: Task, variant: str) -> tuple[Any, Any]:
    blocks = variant == "blocks"
    pixels, rows = fn.readers.webdataset(
        paths=[str(path) for path in paths],
        index_paths=[str(path.with_suffix(".idx")) for path in paths],
        ext=["images.npy", "rows.npy"] if blocks else ["png", "cls"],
        missing_component_behavior="error",
        random_shuffle=True,
        initial_fill=_FILL,
        pad_last_batch=True,  # or else epochs run into each other, and samples come twice in one
        name="Reader",
    )
    on_gpu = task.device.type == "cuda"
    if blocks:
        pixels = fn.reshape(fn.decoders.numpy(pixels), layout="FHWC")
        pixels = pixels.gpu() if on_gpu else pixels
        rows = fn.decoders.numpy(rows)
    else:
        gray = task.image_shape[2] == 1
        device = "mixed" if on_gpu else "cpu"
        pixels = fn.decoders.image(pixels, device=device, output_type=types.GRAY if gray else types.RGB)
        rows = fn.pad(rows, fill_value=0)
    if variant == "documented":
        return _normalised(_resized(pixels, task), task, "CHW"), rows
    # Resizing commutes with normalisation, and enlarging leaves fewer pixels to normalise before it.
    pixels = _resized(_normalised(pixels, task, "FHWC" if blocks else "HWC"), task)
    return (pixels if blocks else fn.transpose(pixels, perm=[2, 0, 1])), rows


def _resized(images: Any, task: Task) -> Any:
    if task.image_shape[:2] == (task.resolution, task.resolution):
        return images
    size = [task.resolution, task.resolution]
    return fn.resize(images, size=size, interp_type=types.INTERP_LINEAR, minibatch_size=task.batch_size)


def _normalised(images: Any, task: Task, layout: str) -> Any:
    mean, std = [255 * value for value in task.mean], [255 * value for value in task.std]
    return fn.crop_mirror_normalize(images, dtype=types.FLOAT, output_layout=layout, mean=mean, std=std)


def _numbers(text: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Decimal numbers as bytes [B, digits], padded with zeros at their ends, to int64 [B]."""
    return np.ascontiguousarray(text).view(f"S{text.shape[1]}")[:, 0].astype(np.int64)


def _blocks_a_batch(batch_size: int) -> int:
    return math.gcd(batch_size, _BLOCKS_A_BATCH)


PEERS = {"dali-webdataset": DaliReader()}
