"""DALI's webdataset reader on records of one image, as documented, and on Inkstream's block records."""

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

from benchmarks.loaders.baselines.base import Batch, Epochs, Source, Task, Variant
from benchmarks.loaders.baselines.inkstream import pack_upright_blocks
from benchmarks.loaders.baselines.webdataset_reader import record_paths, write_records
from shards.limits import available_cpus

_SHUFFLE_BUFFER = 4096  # samples
_BLOCKS_PER_BATCH = 8  # maximum; DALI distributes samples over threads, and here a sample is a block


class DaliReader:
    """`fn.readers.webdataset` with resize and normalization in the pipeline."""

    variants = (
        Variant(
            "documented",
            "records",
            f"PNG records, initial_fill={_SHUFFLE_BUFFER}, resize, normalize",
            tolerance_levels=1.0,
        ),
        Variant("best", "records", "the same, normalized before the resize"),
        Variant("blocks", "blocks", f"block records, {_BLOCKS_PER_BATCH} per batch, decoders.numpy, shuffled"),
    )

    def pack(self, source: Source, file_format: str, directory: Path, batch_size: int) -> Path:
        if file_format == "blocks":
            return pack_upright_blocks(source, directory / "set", batch_size // _blocks_per_batch(batch_size))
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
            batch_size=_blocks_per_batch(task.batch_size) if blocks else task.batch_size,
            num_threads=available_cpus(),
            device_id=task.device.index or 0 if task.device.type == "cuda" else None,
            seed=task.seed,
        )
        iterator = DALIGenericIterator(
            pipeline,
            ["images", "indices"],
            reader_name="Reader",
            auto_reset=True,
            last_batch_policy=LastBatchPolicy.DROP,
            prepare_first_batch=False,
        )

        def epoch(number: int) -> Iterator[Batch]:
            """The reader counts epochs itself and continues an interrupted one."""
            for (output,) in iterator:
                images, indices = output["images"], output["indices"].numpy()
                if blocks:
                    yield images.flatten(0, 1).permute(0, 3, 1, 2), indices.reshape(-1)
                else:
                    yield images, _parse_numbers(indices)

        return epoch


@pipeline_def(exec_dynamic=True)
def _pipeline(paths: list[Path], task: Task, variant: str) -> tuple[Any, Any]:
    blocks = variant == "blocks"
    records: Any = fn.readers.webdataset(  # type information of DALI also allows None and single outputs
        paths=[str(path) for path in paths],
        index_paths=[str(path.with_suffix(".idx")) for path in paths],
        ext=["images.npy", "rows.npy"] if blocks else ["png", "cls"],
        missing_component_behavior="error",
        random_shuffle=True,
        initial_fill=_SHUFFLE_BUFFER,
        pad_last_batch=True,  # otherwise epochs overlap and repeat samples
        name="Reader",
    )
    pixels, indices = records
    on_gpu = task.device.type == "cuda"
    if blocks:
        pixels = fn.reshape(fn.decoders.numpy(pixels), layout="FHWC")
        pixels = pixels.gpu() if on_gpu else pixels
        indices = fn.decoders.numpy(indices)
    else:
        gray = task.image_shape[2] == 1
        device = "mixed" if on_gpu else "cpu"
        pixels = fn.decoders.image(pixels, device=device, output_type=types.GRAY if gray else types.RGB)
        indices = fn.pad(indices, fill_value=0)
    if variant == "documented":
        return _normalized(_resized(pixels, task), task, "CHW"), indices
    # Resize and normalization commute; before an enlargement there are fewer pixels to normalize.
    pixels = _resized(_normalized(pixels, task, "FHWC" if blocks else "HWC"), task)
    return (pixels if blocks else fn.transpose(pixels, perm=[2, 0, 1])), indices


def _resized(images: Any, task: Task) -> Any:
    if task.image_shape[:2] == (task.resolution, task.resolution):
        return images
    size = [task.resolution, task.resolution]
    return fn.resize(images, size=size, interp_type=types.INTERP_LINEAR, minibatch_size=task.batch_size)


def _normalized(images: Any, task: Task, layout: str) -> Any:
    mean, std = [255 * value for value in task.mean], [255 * value for value in task.std]
    return fn.crop_mirror_normalize(images, dtype=types.FLOAT, output_layout=layout, mean=mean, std=std)


def _parse_numbers(text: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Parse decimal numbers, bytes [B, digits] padded with zero bytes at the end, to int64 [B]."""
    return np.ascontiguousarray(text).view(f"S{text.shape[1]}")[:, 0].astype(np.int64)


def _blocks_per_batch(batch_size: int) -> int:
    return math.gcd(batch_size, _BLOCKS_PER_BATCH)


LOADERS = {"dali-webdataset": DaliReader()}
