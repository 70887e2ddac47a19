"""The DALI backend: the one for GPUs, and the same transform on a CPU. The only module that imports DALI."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import nvidia.dali.fn as fn
import nvidia.dali.types as types
import torch
from numpy.typing import NDArray
from nvidia.dali import Pipeline

from pipeline.common.process_pool import default_workers
from pipeline.transforms.augmentation import NO_AUGMENTATION, Augmentation, AugmentationParams
from pipeline.transforms.ops.resize import nearest_nudge
from pipeline.transforms.raw_ops import RawOps
from pipeline.transforms.spec import TransformSpec, UndecodableImage
from pipeline.transforms.warp import Warp, fill_to_mean_shifts
from shards.stores.image_header import decode, read_image_header

_INTERPOLATIONS = {
    "linear": types.INTERP_LINEAR,
    "cubic": types.INTERP_CUBIC,
    "lanczos": types.INTERP_LANCZOS3,
    "nearest": types.INTERP_NN,
}
# A batch enters as packs of images (layout FHWC): handing over every 784-byte image on its own costs more
# than resizing it. Measured best between 8 and 128 on a CPU.
_PACK = 32


# Of pictures that are decoded at once: 0.8 GB in RGB. Larger batches are taken in several runs.
_MOST_PIXELS = 1 << 28


class DaliTransform:
    """The `Transform` for raw images of one size. All randomness comes in through `params`."""

    max_fused_batch = 0

    def __init__(
        self,
        spec: TransformSpec,
        device: torch.device,
        batch_size: int,
        augmentation: Augmentation = NO_AUGMENTATION,
    ) -> None:
        self._raw_ops = RawOps(spec, augmentation)
        self._changes = DaliAugmentation(spec, augmentation, device, framed=True)
        self._pipeline = _empty_pipeline(device, -(-batch_size // _PACK))
        with self._pipeline:
            images = fn.external_source(
                name="images", batch=True, no_copy=True, layout="FHWC", dtype=types.UINT8, ndim=4
            )
            if device.type == "cuda":
                images = images.gpu()
            self._pipeline.set_outputs(_model_input(images, spec, batch_size, self._changes))
        self._pipeline.build()

    def __call__(self, images: NDArray[np.uint8], params: AugmentationParams | None = None) -> torch.Tensor:
        prepared = self._raw_ops(torch.from_numpy(images), params).numpy()
        count = len(images)
        packs = -(-count // _PACK)
        pack = -(-count // packs)
        inputs = {"images": prepared, **self._changes.arguments(params)}
        (output,) = self._pipeline.run(**{name: _packed(each, packs, pack) for name, each in inputs.items()})
        resized = torch.from_dlpack(output.as_tensor())  # [packs, pack, R, R, C], no copy
        return self._changes.warp_elastic(resized.flatten(0, 1)[:count].permute(0, 3, 1, 2), params)


def _packed(array: NDArray, packs: int, pack: int) -> NDArray:
    """[N, ...] as [packs, pack, ...], rounded up to whole packs with zeros: fewer than `packs` blank images."""
    if packs * pack != len(array):
        padded = np.zeros((packs * pack, *array.shape[1:]), array.dtype)
        padded[: len(array)] = array
        array = padded
    return array.reshape(packs, pack, *array.shape[1:])


class DaliEncodedTransform:
    """The `Transform` for image files of differing sizes: decoded on the device, EXIF orientation applied."""

    max_fused_batch = 0

    def __init__(
        self,
        spec: TransformSpec,
        device: torch.device,
        batch_size: int,
        augmentation: Augmentation = NO_AUGMENTATION,
    ) -> None:
        self._spec = spec
        self._device = device
        self._batch_size = batch_size
        self._changes = DaliAugmentation(spec, augmentation, device, framed=False)
        self._pipeline = self._build()

    def __call__(self, images: list[NDArray[np.uint8]], params: AugmentationParams | None = None) -> torch.Tensor:
        arguments = self._changes.arguments(params)
        parts = [
            self._run(images[run], {name: each[run] for name, each in arguments.items()}, run.start)
            for run in _runs([*map(_pixels, range(len(images)), images)])
        ]
        resized = parts[0] if len(parts) == 1 else torch.cat(parts)
        return self._changes.warp_elastic(resized.permute(0, 3, 1, 2), params)

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
            pipeline.set_outputs(_model_input_of_pictures(images, self._spec, self._batch_size, self._changes))
        pipeline.build()
        return pipeline

    def _run(self, images: list[NDArray[np.uint8]], arguments: dict[str, NDArray], start: int) -> torch.Tensor:
        try:
            (output,) = self._pipeline.run(images=images, **arguments)
        except RuntimeError:
            self._find_undecodable(images, arguments, start)
            raise
        return torch.from_dlpack(output.as_tensor())  # [n, R, R, C], no copy

    def _find_undecodable(self, images: list[NDArray[np.uint8]], arguments: dict[str, NDArray], start: int) -> None:
        """Raise `UndecodableImage` for the first picture that fails alone, too."""
        self._pipeline = self._build()  # after an error a pipeline is no longer valid
        for position, image in enumerate(images):
            try:
                self._pipeline.run(images=[image], **{name: each[position, None] for name, each in arguments.items()})
            except RuntimeError as error:
                raise UndecodableImage(
                    start + position, _what_is_wrong(image, self._spec.image_shape[2], error)
                ) from None


class DaliAugmentation:
    """An augmentation within a transform: the operators, and what the params of a batch become as their arguments.

    framed: whether a sample of the pipeline is a pack of images, each with arguments of its own.
    """

    def __init__(self, spec: TransformSpec, augmentation: Augmentation, device: torch.device, *, framed: bool) -> None:
        self._spec = spec
        self._augmentation = augmentation
        self._framed = framed
        self._on_gpu = device.type == "cuda"
        self._layout = "FHWC" if framed else "HWC"
        self.can_warp_raw = augmentation.has_warp and spec.can_warp_raw
        # DALI has no displacement of single pixels on CPUs. Its output is torch's without a copy, on both.
        self._warp = Warp(augmentation, spec, device) if augmentation.elastic else None

    def arguments(self, params: AugmentationParams | None) -> dict[str, NDArray[np.float32]]:
        """What to feed to the pipeline beside the images, each [B, ...]."""
        augmentation = self._augmentation
        assert (params is not None) == bool(augmentation)
        found = {}
        if params is not None and augmentation.has_color_jitter:
            channels = self._spec.image_shape[2]
            colours = augmentation.color_matrices(params, channels).swapaxes(1, 2)  # [B, C + 1, C]
            colours[:, channels] *= 255
            found["colours"] = np.ascontiguousarray(colours[:, None, None], np.float32)
        if params is not None and augmentation.has_warp and not self._warp:
            found["matrices"] = self._in_pixels(self._matrices(params)).astype(np.float32)
        return found

    def color_jitter(self, images):
        if not self._augmentation.has_color_jitter:
            return images
        every = (slice(None),) * (3 if self._framed else 2)
        colours = fn.external_source(name="colours", batch=True, dtype=types.FLOAT, ndim=len(every) + 2)
        if self._on_gpu:
            colours = colours.gpu()
        pixels = fn.cast(images, dtype=types.FLOAT)
        channels = self._spec.image_shape[2]
        mixed = colours[(*every, channels)]
        for channel in range(channels):
            mixed = mixed + pixels[(*every, slice(channel, channel + 1))] * colours[(*every, channel)]
        return fn.reshape(mixed, layout=self._layout)

    def normalize(self, images):
        """(x / 255 - fill_value) / std."""
        return fn.crop_mirror_normalize(
            images,
            dtype=types.FLOAT,
            output_layout=self._layout,
            mean=[255 * level for level in self._augmentation.fill_value(self._spec.mean)],
            std=[255 * std for std in self._spec.std],
        )

    def warp_affine(self, images):
        """Normalised images at the resolution, moved by the affine part, unless that is left to `distorted`."""
        augmentation = self._augmentation
        if not augmentation.has_warp or self._warp:
            return images
        matrices = fn.external_source(name="matrices", batch=True, dtype=types.FLOAT, ndim=3 if self._framed else 2)
        images = fn.warp_affine(
            images,
            matrix=fn.per_frame(matrices) if self._framed else matrices,
            size=[self._spec.resolution] * 2,
            interp_type=types.INTERP_LINEAR,
            inverse_map=True,
            dtype=types.FLOAT,
            **({} if augmentation.fill == "border" else {"fill_value": 0}),
        )
        shifts = fill_to_mean_shifts(augmentation, self._spec)
        if not shifts:
            return images
        less = [-shift for shift in shifts]
        return fn.crop_mirror_normalize(images, dtype=types.FLOAT, output_layout=self._layout, mean=less, std=1)

    def warp_elastic(self, images: torch.Tensor, params: AugmentationParams | None) -> torch.Tensor:
        """The pipeline's output float32 [B, C, H, W], with the elastic distortion and the affine part in one."""
        if self._warp is None or params is None:
            return images
        return self._warp(images, self._matrices(params), params)

    def _matrices(self, params: AugmentationParams) -> NDArray[np.float64]:
        spec = self._spec
        return self._augmentation.affine_matrices(params, (spec.resolution,) * 2 if spec.encoded else spec.upright_size)

    def _in_pixels(self, matrices: NDArray[np.float64]) -> NDArray[np.float64]:
        """As DALI takes them: from pixels of the output to pixels of the input, whose centres are at one half."""
        resolution = self._spec.resolution
        height, width = self._spec.upright_size if self.can_warp_raw else (resolution, resolution)
        half = np.array([width, height])[None, :, None] / 2
        pixels = matrices * half
        pixels[:, :, 2] += half[:, :, 0] - pixels[:, :, :2].sum(axis=2)
        pixels[:, :, :2] *= 2 / resolution
        return pixels


def _pixels(position: int, image: NDArray[np.uint8]) -> int:
    try:
        header = read_image_header(image)
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
        num_threads=default_workers(),
        device_id=device.index or 0 if device.type == "cuda" else None,
        # One batch in flight: the loader runs ahead by itself.
        prefetch_queue_depth=1,
        exec_dynamic=True,
    )


def _model_input(images, spec: TransformSpec, batch_size: int, changes: DaliAugmentation):
    """The transform itself: raw packs uint8 [F, H, W, C] to normalised float32 [F, R, R, C]."""
    height, width = spec.upright_size
    if spec.transposed:
        images = fn.transpose(images, perm=[0, 2, 1, 3], transpose_layout=False)
    images = changes.color_jitter(images)
    region = {}
    if spec.interpolation == "nearest":
        nudge = nearest_nudge(spec.resolution)
        region = {"roi_start": [nudge, nudge], "roi_end": [height + nudge, width + nudge]}
    if not spec.needs_resize or changes.can_warp_raw:
        images = changes.normalize(images)
    elif spec.upsamples:
        images = _resize(changes.normalize(images), spec, batch_size, region)
    else:
        images = changes.normalize(_resize(images, spec, batch_size, region))
    return changes.warp_affine(images)


def _model_input_of_pictures(images, spec: TransformSpec, batch_size: int, changes: DaliAugmentation):
    """The transform behind the decoder: uint8 [H, W, C], each of its own size, to normalised float32 [R, R, C]."""
    if spec.transposed:
        images = fn.transpose(images, perm=[1, 0, 2], transpose_layout=False)
    region = {}
    if spec.interpolation == "nearest":
        nudge = nearest_nudge(spec.resolution)
        region = {"roi_start": [nudge, nudge], "roi_end": images.shape(dtype=types.FLOAT)[:2] + nudge}
    # Colours after resizing, which leaves fewer pixels; they commute.
    resized = changes.color_jitter(_resize(images, spec, batch_size, region))
    return changes.warp_affine(changes.normalize(resized))


def _resize(images, spec: TransformSpec, batch_size: int, region: dict[str, Any]):
    """region: the part of each image to take, if it is not the whole."""
    return fn.resize(
        images,
        size=[spec.resolution, spec.resolution],
        interp_type=_INTERPOLATIONS[spec.interpolation],
        dtype=types.FLOAT,
        minibatch_size=batch_size,
        **region,
    )
