"""The DALI backend: the one for GPUs, and the same graph on a CPU. The only module that imports DALI."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import nvidia.dali.fn as fn
import nvidia.dali.types as types
import torch
from numpy.typing import NDArray
from nvidia.dali import Pipeline

from pipeline.graph import GraphSpec, UndecodableImage
from pipeline.resample import nearest_nudge
from shards.pictures import decode, read_header

_INTERPOLATIONS = {
    "linear": types.INTERP_LINEAR,
    "cubic": types.INTERP_CUBIC,
    "nearest": types.INTERP_NN,
}
# A batch enters as packs of images (layout FHWC): handing over every 784-byte image on its own costs more
# than resizing it. Measured best between 8 and 128 on a CPU.
_PACK = 32


# Of pictures that are decoded at once: 0.8 GB in RGB. Larger batches are taken in several runs.
_MOST_PIXELS = 1 << 28


class DaliGraph:
    """See `pipeline.graph.Graph`, of images of one size. A pure function of its input: whatever is random comes in from
    outside."""

    worth_joining = 0

    def __init__(self, spec: GraphSpec, device: torch.device, batch_size: int) -> None:
        self._pipeline = _empty_pipeline(device, -(-batch_size // _PACK))
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


class DaliPictureGraph:
    """See `pipeline.graph.Graph`, of picture files of differing sizes: decoded on the device, turned as EXIF asks."""

    worth_joining = 0

    def __init__(self, spec: GraphSpec, device: torch.device, batch_size: int) -> None:
        self._spec = spec
        self._device = device
        self._batch_size = batch_size
        self._pipeline = self._build()

    def __call__(self, images: list[NDArray[np.uint8]]) -> torch.Tensor:
        parts = [self._run(images[run], run.start) for run in _runs([*map(_pixels, range(len(images)), images)])]
        resized = parts[0] if len(parts) == 1 else torch.cat(parts)
        return resized.permute(0, 3, 1, 2)

    def _build(self) -> Pipeline:
        pipeline = _empty_pipeline(self._device, self._batch_size)
        with pipeline:
            files = fn.external_source(name="images", batch=True, dtype=types.UINT8, ndim=1)
            images = fn.decoders.image(
                files,
                device="mixed" if self._device.type == "cuda" else "cpu",
                output_type=types.GRAY if self._spec.image_shape[2] == 1 else types.RGB,
                jpeg_fancy_upsampling=True,  # on a GPU too, as libjpeg does it on a CPU
            )
            pipeline.set_outputs(_model_input_of_pictures(images, self._spec, self._batch_size))
        pipeline.build()
        return pipeline

    def _run(self, images: list[NDArray[np.uint8]], start: int) -> torch.Tensor:
        try:
            (output,) = self._pipeline.run(images=images)
        except RuntimeError:
            self._find_undecodable(images, start)
            raise
        return torch.from_dlpack(output.as_tensor())  # [n, R, R, C], no copy

    def _find_undecodable(self, images: list[NDArray[np.uint8]], start: int) -> None:
        """Raise `UndecodableImage` for the first picture that fails alone, too."""
        self._pipeline = self._build()  # after an error a pipeline is no longer valid
        for position, image in enumerate(images, start):
            try:
                self._pipeline.run(images=[image])
            except RuntimeError as error:
                raise UndecodableImage(position, _what_is_wrong(image, self._spec.image_shape[2], error)) from None


def _pixels(position: int, image: NDArray[np.uint8]) -> int:
    try:
        header = read_header(image)
    except ValueError as error:
        raise UndecodableImage(position, str(error)) from None
    return header.width * header.height


def _runs(pixels: list[int]) -> Iterator[slice]:
    """Cut a batch of pictures of so many pixels into runs of up to `_MOST_PIXELS`, or of one larger picture."""
    start, total = 0, 0
    for position, count in enumerate(pixels):
        if total + count > _MOST_PIXELS and position > start:
            yield slice(start, position)
            start, total = position, 0
        total += count
    yield slice(start, len(pixels))


def _what_is_wrong(image: NDArray[np.uint8], channels: int, error: RuntimeError) -> str:
    """Why a picture cannot be decoded: as Pillow says it, or, if it can, as DALI does."""
    try:
        decode(image.tobytes(), channels)
    except ValueError as reason:
        return str(reason)
    said = [line for line in str(error).splitlines() if line and "pipeline" not in line]
    return f"a picture that DALI cannot decode: {said[-1] if said else 'it does not say why'}"


def _empty_pipeline(device: torch.device, batch_size: int) -> Pipeline:
    return Pipeline(
        batch_size=batch_size,
        num_threads=_threads(),
        device_id=device.index or 0 if device.type == "cuda" else None,
        # One batch in flight: the loader runs ahead by itself.
        prefetch_queue_depth=1,
        exec_dynamic=True,
    )


def _model_input(images, spec: GraphSpec, batch_size: int):
    """The graph itself: raw packs uint8 [F, H, W, C] to normalised float32 [F, R, R, C]."""
    height, width, _ = spec.image_shape
    if spec.transposed:
        images = fn.transpose(images, perm=[0, 2, 1, 3], transpose_layout=False)
        height, width = width, height
    region = {}
    if spec.interpolation == "nearest":
        nudge = nearest_nudge(spec.resolution)
        region = {"roi_start": [nudge, nudge], "roi_end": [height + nudge, width + nudge]}
    if not spec.resizes:
        return _normalise(images, spec, "FHWC")
    if spec.enlarges:
        return _resize(_normalise(images, spec, "FHWC"), spec, batch_size, region)
    return _normalise(_resize(images, spec, batch_size, region), spec, "FHWC")


def _model_input_of_pictures(images, spec: GraphSpec, batch_size: int):
    """The graph behind the decoder: uint8 [H, W, C], each of its own size, to normalised float32 [R, R, C]."""
    if spec.transposed:
        images = fn.transpose(images, perm=[1, 0, 2], transpose_layout=False)
    region = {}
    if spec.interpolation == "nearest":
        nudge = nearest_nudge(spec.resolution)
        region = {"roi_start": [nudge, nudge], "roi_end": images.shape(dtype=types.FLOAT)[:2] + nudge}
    return _normalise(_resize(images, spec, batch_size, region), spec, "HWC")


def _normalise(images, spec: GraphSpec, layout: str):
    return fn.crop_mirror_normalize(
        images,
        dtype=types.FLOAT,
        output_layout=layout,
        mean=[255 * mean for mean in spec.mean],
        std=[255 * std for std in spec.std],
    )


def _resize(images, spec: GraphSpec, batch_size: int, region: dict[str, Any]):
    """region: the part of each image to take, if it is not the whole."""
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
