"""DALI backend, on GPUs and CPUs. The only module that imports DALI."""

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
# Images of a pack. A batch is fed as packs (layout FHWC), because feeding each 784-byte image separately costs more
# than its resize. 32 was the fastest of 8 .. 128 on a CPU.
_PACK = 32
# Pixels decoded in one run of the pipeline: 0.8 GB in RGB. Larger batches are split into several runs.
_MAX_PIXELS = 1 << 28


class DaliTransform:
    """The `Transform` for raw images of one size. All randomness is in `params`."""

    max_fused_batch = 0

    def __init__(
        self,
        spec: TransformSpec,
        device: torch.device,
        batch_size: int,
        augmentation: Augmentation = NO_AUGMENTATION,
    ) -> None:
        self._raw_ops = RawOps(spec, augmentation)
        self._augmentation = DaliAugmentation(spec, augmentation, device, has_packs=True)
        self._pipeline = _empty_pipeline(device, -(-batch_size // _PACK))
        with self._pipeline:
            images = fn.external_source(
                name="images", batch=True, no_copy=True, layout="FHWC", dtype=types.UINT8, ndim=4
            )
            if device.type == "cuda":
                images = images.gpu()
            self._pipeline.set_outputs(_model_input(images, spec, batch_size, self._augmentation))
        self._pipeline.build()

    def __call__(self, images: NDArray[np.uint8], params: AugmentationParams | None = None) -> torch.Tensor:
        prepared = self._raw_ops(torch.from_numpy(images), params).numpy()
        count = len(images)
        packs = -(-count // _PACK)
        pack = -(-count // packs)
        inputs = {"images": prepared, **self._augmentation.arguments(params)}
        (output,) = self._pipeline.run(**{name: _packed(each, packs, pack) for name, each in inputs.items()})
        resized = torch.from_dlpack(output.as_tensor())  # [packs, pack, R, R, C], no copy
        return self._augmentation.warp_elastic(resized.flatten(0, 1)[:count].permute(0, 3, 1, 2), params)


def _packed(array: NDArray, packs: int, pack: int) -> NDArray:
    """Reshape [N, ...] to [packs, pack, ...], padded with zeros."""
    if packs * pack != len(array):
        padded = np.zeros((packs * pack, *array.shape[1:]), array.dtype)
        padded[: len(array)] = array
        array = padded
    return array.reshape(packs, pack, *array.shape[1:])


class DaliEncodedTransform:
    """The `Transform` for image files of different sizes. Decodes on the device and applies the EXIF orientation."""

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
        self._augmentation = DaliAugmentation(spec, augmentation, device, has_packs=False)
        self._pipeline = self._build()

    def __call__(self, images: list[NDArray[np.uint8]], params: AugmentationParams | None = None) -> torch.Tensor:
        arguments = self._augmentation.arguments(params)
        outputs = [
            self._run(images[run], {name: each[run] for name, each in arguments.items()}, run.start)
            for run in _runs([*map(_pixel_count, range(len(images)), images)])
        ]
        resized = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        return self._augmentation.warp_elastic(resized.permute(0, 3, 1, 2), params)

    def _build(self) -> Pipeline:
        pipeline = _empty_pipeline(self._device, self._batch_size)
        with pipeline:
            files = fn.external_source(name="images", batch=True, dtype=types.UINT8, ndim=1)
            images = fn.decoders.image(
                files,
                device="mixed" if self._device.type == "cuda" else "cpu",
                output_type=types.GRAY if self._spec.image_shape[2] == 1 else types.RGB,
                jpeg_fancy_upsampling=True,  # on GPUs too, as libjpeg on CPUs
            )
            pipeline.set_outputs(_decoded_model_input(images, self._spec, self._batch_size, self._augmentation))
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
        """Raise `UndecodableImage` for the first image that fails when decoded alone."""
        self._pipeline = self._build()  # a pipeline is unusable after an error
        for position, image in enumerate(images):
            try:
                self._pipeline.run(images=[image], **{name: each[position, None] for name, each in arguments.items()})
            except RuntimeError as error:
                raise UndecodableImage(
                    start + position, _describe_defect(image, self._spec.image_shape[2], error)
                ) from None


class DaliAugmentation:
    """The operators of an augmentation in a DALI pipeline, and their arguments for a batch.

    Args:
        spec: Specification of the transform.
        augmentation: Augmentation of training images.
        device: Device of the pipeline.
        has_packs: Whether a sample of the pipeline is a pack of images, each with its own arguments.
    """

    def __init__(
        self, spec: TransformSpec, augmentation: Augmentation, device: torch.device, *, has_packs: bool
    ) -> None:
        self._spec = spec
        self._augmentation = augmentation
        self._has_packs = has_packs
        self._on_gpu = device.type == "cuda"
        self._layout = "FHWC" if has_packs else "HWC"
        self.can_warp_raw = augmentation.has_warp and spec.can_warp_raw
        # DALI cannot displace single pixels on CPUs. Its output becomes a torch tensor without a copy.
        self._warp = Warp(augmentation, spec, device) if augmentation.elastic else None

    def arguments(self, params: AugmentationParams | None) -> dict[str, NDArray[np.float32]]:
        """Return the inputs of the pipeline besides the images, each [B, ...]."""
        augmentation = self._augmentation
        assert (params is not None) == bool(augmentation)
        arguments = {}
        if params is not None and augmentation.has_color_jitter:
            channels = self._spec.image_shape[2]
            colours = augmentation.color_matrices(params, channels).swapaxes(1, 2)  # [B, C + 1, C]
            colours[:, channels] *= 255
            arguments["colours"] = np.ascontiguousarray(colours[:, None, None], np.float32)
        if params is not None and augmentation.has_warp and not self._warp:
            arguments["matrices"] = self._in_pixels(self._matrices(params)).astype(np.float32)
        return arguments

    def color_jitter(self, images):
        """Apply the affine map of each image's colours."""
        if not self._augmentation.has_color_jitter:
            return images
        pixel_axes = (slice(None),) * (3 if self._has_packs else 2)
        colours = fn.external_source(name="colours", batch=True, dtype=types.FLOAT, ndim=len(pixel_axes) + 2)
        if self._on_gpu:
            colours = colours.gpu()
        pixels = fn.cast(images, dtype=types.FLOAT)
        channels = self._spec.image_shape[2]
        recolored = colours[(*pixel_axes, channels)]
        for channel in range(channels):
            recolored = recolored + pixels[(*pixel_axes, slice(channel, channel + 1))] * colours[(*pixel_axes, channel)]
        return fn.reshape(recolored, layout=self._layout)

    def normalize(self, images):
        """Return (x / 255 - fill_value) / std."""
        return fn.crop_mirror_normalize(
            images,
            dtype=types.FLOAT,
            output_layout=self._layout,
            mean=[255 * level for level in self._augmentation.fill_value(self._spec.mean)],
            std=[255 * std for std in self._spec.std],
        )

    def warp_affine(self, images):
        """Apply the affine warp to normalized images; with elastic distortion, `warp_elastic` applies it."""
        augmentation = self._augmentation
        if not augmentation.has_warp or self._warp:
            return images
        matrices = fn.external_source(name="matrices", batch=True, dtype=types.FLOAT, ndim=3 if self._has_packs else 2)
        fill: dict[str, Any] = {} if augmentation.fill == "border" else {"fill_value": 0}
        images = fn.warp_affine(
            images,
            matrix=fn.per_frame(matrices) if self._has_packs else matrices,
            size=[self._spec.resolution] * 2,
            interp_type=types.INTERP_LINEAR,
            inverse_map=True,
            dtype=types.FLOAT,
            **fill,
        )
        shifts = fill_to_mean_shifts(augmentation, self._spec)
        if not shifts:
            return images
        mean = [-shift for shift in shifts]
        return fn.crop_mirror_normalize(images, dtype=types.FLOAT, output_layout=self._layout, mean=mean, std=1)

    def warp_elastic(self, images: torch.Tensor, params: AugmentationParams | None) -> torch.Tensor:
        """Apply the elastic distortion and the affine warp to the pipeline's output, float32 [B, C, H, W]."""
        if self._warp is None or params is None:
            return images
        return self._warp(images, self._matrices(params), params)

    def _matrices(self, params: AugmentationParams) -> NDArray[np.float64]:
        spec = self._spec
        return self._augmentation.affine_matrices(params, (spec.resolution,) * 2 if spec.encoded else spec.upright_size)

    def _in_pixels(self, matrices: NDArray[np.float64]) -> NDArray[np.float64]:
        """Convert to DALI's convention: pixels of the output to pixels of the input, with centres at one half."""
        resolution = self._spec.resolution
        height, width = self._spec.upright_size if self.can_warp_raw else (resolution, resolution)
        half = np.array([width, height])[None, :, None] / 2
        matrices = matrices * half
        matrices[:, :, 2] += half[:, :, 0] - matrices[:, :, :2].sum(axis=2)
        matrices[:, :, :2] *= 2 / resolution
        return matrices


def _pixel_count(position: int, image: NDArray[np.uint8]) -> int:
    try:
        header = read_image_header(image)
    except ValueError as error:
        raise UndecodableImage(position, str(error)) from None
    return header.width * header.height


def _runs(pixels: list[int]) -> Iterator[slice]:
    """Split a batch into runs of up to `_MAX_PIXELS`, or of one larger image. pixels: of each image."""
    start, total = 0, 0
    for position, count in enumerate(pixels):
        if total + count > _MAX_PIXELS and position > start:
            yield slice(start, position)
            start, total = position, 0
        total += count
    yield slice(start, len(pixels))


def _describe_defect(image: NDArray[np.uint8], channels: int, error: RuntimeError) -> str:
    """Describe why an image cannot be decoded: Pillow's message, or DALI's if Pillow can decode it."""
    try:
        decode(image.tobytes(), channels)
    except ValueError as reason:
        return str(reason)
    lines = [line for line in str(error).splitlines() if line and "pipeline" not in line]
    return f"DALI cannot decode the image: {lines[-1] if lines else 'no reason reported'}"


def _empty_pipeline(device: torch.device, batch_size: int) -> Pipeline:
    return Pipeline(
        batch_size=batch_size,
        num_threads=default_workers(),
        device_id=device.index or 0 if device.type == "cuda" else None,
        # One batch in flight: the loader prefetches.
        prefetch_queue_depth=1,
        exec_dynamic=True,
    )


def _model_input(images, spec: TransformSpec, batch_size: int, augmentation: DaliAugmentation):
    """Build the transform of packs: raw uint8 [F, H, W, C] to normalized float32 [F, R, R, C]."""
    height, width = spec.upright_size
    if spec.transposed:
        images = fn.transpose(images, perm=[0, 2, 1, 3], transpose_layout=False)
    images = augmentation.color_jitter(images)
    region = {}
    if spec.interpolation == "nearest":
        nudge = nearest_nudge(spec.resolution)
        region = {"roi_start": [nudge, nudge], "roi_end": [height + nudge, width + nudge]}
    if not spec.needs_resize or augmentation.can_warp_raw:
        images = augmentation.normalize(images)
    elif spec.upsamples:
        images = _resize(augmentation.normalize(images), spec, batch_size, region)
    else:
        images = augmentation.normalize(_resize(images, spec, batch_size, region))
    return augmentation.warp_affine(images)


def _decoded_model_input(images, spec: TransformSpec, batch_size: int, augmentation: DaliAugmentation):
    """Build the transform of decoded images uint8 [H, W, C] of different sizes to normalized float32 [R, R, C]."""
    if spec.transposed:
        images = fn.transpose(images, perm=[1, 0, 2], transpose_layout=False)
    region = {}
    if spec.interpolation == "nearest":
        nudge = nearest_nudge(spec.resolution)
        region = {"roi_start": [nudge, nudge], "roi_end": images.shape(dtype=types.FLOAT)[:2] + nudge}
    # The colour map commutes with the resize; after it there are fewer pixels.
    resized = augmentation.color_jitter(_resize(images, spec, batch_size, region))
    return augmentation.warp_affine(augmentation.normalize(resized))


def _resize(images, spec: TransformSpec, batch_size: int, region: dict[str, Any]):
    """Build the resize. region: arguments of the region of each image that is resized; empty for the whole image."""
    return fn.resize(
        images,
        size=[spec.resolution, spec.resolution],
        interp_type=_INTERPOLATIONS[spec.interpolation],
        dtype=types.FLOAT,
        minibatch_size=batch_size,
        **region,
    )
