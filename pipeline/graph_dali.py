"""The DALI backend: the one for GPUs, and the same graph on a CPU. The only module that imports DALI."""

from __future__ import annotations

import os

import numpy as np
import nvidia.dali.fn as fn
import nvidia.dali.types as types
import torch
from numpy.typing import NDArray
from nvidia.dali import Pipeline

from pipeline.graph import GraphSpec
from pipeline.resample import nearest_nudge

_INTERPOLATIONS = {
    "linear": types.INTERP_LINEAR,
    "cubic": types.INTERP_CUBIC,
    "nearest": types.INTERP_NN,
}
# A batch enters as packs of images (layout FHWC): handing over every 784-byte image on its own costs more
# than resizing it. Measured best between 8 and 128 on a CPU.
_PACK = 32


class DaliGraph:
    """See `pipeline.graph.Graph`. A pure function of its input: whatever is random comes in from outside."""

    def __init__(self, spec: GraphSpec, device: torch.device, batch_size: int) -> None:
        self._spec = spec
        self._pipeline = Pipeline(
            batch_size=-(-batch_size // _PACK),
            num_threads=_threads(),
            device_id=device.index or 0 if device.type == "cuda" else None,
            # One batch in flight: the loader runs ahead by itself.
            prefetch_queue_depth=1,
            exec_dynamic=True,
        )
        with self._pipeline:
            images = fn.external_source(
                name="images", batch=True, no_copy=True, layout="FHWC", dtype=types.UINT8, ndim=4
            )
            if device.type == "cuda":
                images = images.gpu()
            self._pipeline.set_outputs(_model_input(images, spec, batch_size))
        self._pipeline.build()

    def __call__(self, images: NDArray[np.uint8]) -> torch.Tensor:
        count = len(images)
        packs = -(-count // _PACK)
        pack = -(-count // packs)
        if packs * pack != count:
            # Round up to whole packs (fewer than `packs` blank images) and cut them off again below.
            padded = np.zeros((packs * pack, *images.shape[1:]), np.uint8)
            padded[:count] = images
            images = padded
        (output,) = self._pipeline.run(images=images.reshape(packs, pack, *images.shape[1:]))
        resized = torch.from_dlpack(output.as_tensor())  # [packs, pack, R, R, C], no copy
        return resized.flatten(0, 1)[:count].permute(0, 3, 1, 2)


def _model_input(images, spec: GraphSpec, batch_size: int):
    """The graph itself: raw packs uint8 [F, H, W, C] to normalised float32 [F, R, R, C]."""
    if spec.transposed:
        images = fn.transpose(images, perm=[0, 2, 1, 3], transpose_layout=False)
    if not spec.resizes:
        return _normalise(images, spec)
    if spec.enlarges:
        return _resize(_normalise(images, spec), spec, batch_size)
    return _normalise(_resize(images, spec, batch_size), spec)


def _normalise(images, spec: GraphSpec):
    return fn.crop_mirror_normalize(
        images,
        dtype=types.FLOAT,
        output_layout="FHWC",
        mean=[255 * mean for mean in spec.mean],
        std=[255 * std for std in spec.std],
    )


def _resize(images, spec: GraphSpec, batch_size: int):
    height, width, _ = spec.image_shape
    if spec.transposed:
        height, width = width, height
    region = {}
    if spec.interpolation == "nearest":
        nudge = nearest_nudge(spec.resolution)
        region = {"roi_start": [nudge, nudge], "roi_end": [height + nudge, width + nudge]}
    return fn.resize(
        images,
        size=[spec.resolution, spec.resolution],
        interp_type=_INTERPOLATIONS[spec.interpolation],
        dtype=types.FLOAT,
        minibatch_size=batch_size,
        **region,
    )


def _threads() -> int:
    """CPU threads for this process: the cores it may use, shared with the other ranks of this machine."""
    cores = len(os.sched_getaffinity(0))
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
