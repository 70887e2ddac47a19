"""DALI backend, on GPUs and CPUs. The only module that imports DALI."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np
import nvidia.dali.fn as fn
import nvidia.dali.types as types
import torch
from numpy.typing import NDArray
from nvidia.dali import Pipeline
from nvidia.dali.plugin.pytorch import feed_ndarray

from pipeline.common.device import with_index
from pipeline.common.process_pool import default_workers
from pipeline.transforms.augmentation import NO_AUGMENTATION, Augmentation, AugmentationParams
from pipeline.transforms.ops.resize import nearest_nudge
from pipeline.transforms.shared_ops import OpParams, SharedOps
from pipeline.transforms.spec import TransformSpec, UndecodableImage
from shards.stores.image_header import ImageHeader, decode, read_image_header

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


class _DaliPipeline(ABC):
    """A DALI pipeline from images to upright, resized pixels float32 [..., R, S, C], (x / 255 - fill_value) / std.

    Attributes:
        max_fused_batch: See `Transform`.
    """

    max_fused_batch = 0
    _layout: str
    _pack: int  # images of a sample of the pipeline

    def __init__(
        self,
        spec: TransformSpec,
        device: torch.device,
        batch_size: int,
        augmentation: Augmentation = NO_AUGMENTATION,
    ) -> None:
        self._spec = spec
        self._device = with_index(device)
        self._batch_size = batch_size
        self._augmentation = augmentation
        self._fill_value = augmentation.fill_value(spec.mean)
        self._ops = SharedOps(spec, augmentation, self._device)
        self.op_params = self._ops.op_params
        self._dtype = torch.uint8 if self._ops.quantizes else torch.float32  # of the output
        shifts, scales = -np.array(self._fill_value) / spec.std, 1 / (255 * np.array(spec.std))
        self._shifts, self._scales = (torch.from_numpy(each).float().to(self._device) for each in (shifts, scales))
        self._unread: deque[tuple[object, torch.cuda.Event]] = deque()  # outputs, and the end of their copies
        self._pipeline = self.define_pipeline()
        self._pipeline.build()

    def define_pipeline(self) -> Pipeline:
        """Return a new pipeline with its operators and outputs, before `Pipeline.build`, which needs the device."""
        pipeline = Pipeline(
            batch_size=-(-self._batch_size // self._pack),
            num_threads=default_workers(),
            device_id=self._device.index if self._device.type == "cuda" else None,
            # One batch in flight: the loader prefetches.
            prefetch_queue_depth=1,
            exec_dynamic=True,
        )
        with pipeline:
            pipeline.set_outputs(self._define())
        return pipeline

    @abstractmethod
    def _define(self):
        """Return the output of the pipeline as a graph of operators."""

    def _run(self, **inputs) -> torch.Tensor:
        """Run the pipeline on a batch; the output is ready in the order of torch's current stream."""
        if self._device.type == "cpu":
            (output,) = self._pipeline.run(**inputs)
            return torch.from_dlpack(output.as_tensor())  # no copy
        stream = torch.cuda.current_stream(self._device)
        for name, batch in inputs.items():
            self._pipeline.feed_input(name, batch, cuda_stream=stream)
        (output,) = self._pipeline.run(stream)
        # A copy, because memory of DALI that torch lets go of makes DALI wait for the whole device. The memory of the
        # output is kept until it is copied, as DALI does not know when that is.
        output = output.as_tensor()
        pixels = torch.empty(output.shape(), dtype=self._dtype, device=self._device)
        feed_ndarray(output, pixels, cuda_stream=stream)
        self._unread.append((output, stream.record_event()))
        while self._unread and self._unread[0][1].query():
            self._unread.popleft()
        return pixels

    def _normalize(self, images):
        return fn.crop_mirror_normalize(
            images,
            dtype=types.FLOAT,
            output_layout=self._layout,
            mean=[255 * level for level in self._fill_value],
            std=[255 * std for std in self._spec.std],
        )

    def _resize(self, images, height, width):
        size, region = self._spec.input_size, {}
        if self._spec.interpolation == "nearest":
            down, right = map(nearest_nudge, size)
            region = {"roi_start": [down, right], "roi_end": fn.stack(height + down, width + right)}
        return fn.resize(
            images,
            size=list(size),
            interp_type=_INTERPOLATIONS[self._spec.interpolation],
            dtype=types.UINT8 if self._ops.quantizes else types.FLOAT,
            minibatch_size=self._batch_size,
            **region,
        )

    def _augment(self, pixels: torch.Tensor, params: OpParams) -> torch.Tensor:
        """Return model input [B, C, R, S] from the pipeline's output [B, R, S, C]."""
        return self._ops.apply_warp(self._ops.apply_color_ops(pixels.permute(0, 3, 1, 2), params), params)


class DaliTransform(_DaliPipeline):
    """The `Transform` for raw images of one size."""

    _layout = "FHWC"
    _pack = _PACK

    def __call__(
        self, images: NDArray[np.uint8] | torch.Tensor, params: AugmentationParams | OpParams | None = None
    ) -> torch.Tensor:
        raw, params = self._ops.to_device(images, params)
        prepared = self._ops.apply_raw_ops(raw, params)
        count, *shape = prepared.shape
        packs = -(-count // _PACK)
        pack = -(-count // packs)
        if packs * pack != count:
            prepared = torch.cat([prepared, prepared.new_zeros(packs * pack - count, *shape)])
        packed = prepared.reshape(packs, pack, *shape).contiguous()
        # For a tensor DALI asks for the current CUDA stream, even on a CPU.
        pixels = self._run(images=packed if packed.is_cuda else packed.numpy())  # [packs, pack, R, S, C]
        return self._augment(pixels.flatten(0, 1)[:count], params)

    def _define(self):
        spec, on_cpu = self._spec, self._device.type == "cpu"
        images = fn.external_source(
            name="images",
            device="cpu" if on_cpu else "gpu",
            batch=True,
            no_copy=on_cpu,  # on a GPU, DALI copies in the order of torch's stream and does not keep the tensor
            layout=self._layout,
            dtype=types.UINT8,
            ndim=4,
        )
        if spec.transposed:
            images = fn.transpose(images, perm=[0, 2, 1, 3], transpose_layout=False)
        if not self._ops.resizes:
            return self._normalize(images)
        if spec.upsamples:
            return self._resize(self._normalize(images), *spec.upright_size)
        return self._normalize(self._resize(images, *spec.upright_size))


class DaliEncodedTransform(_DaliPipeline):
    """The `Transform` for image files of different sizes. Decodes on the device and applies the EXIF orientation.

    A random-resized crop is part of the pipeline. It depends on the sizes of the images and thus needs the augmentation
    parameters on the host.
    """

    _layout = "HWC"
    _pack = 1

    def __call__(
        self, images: list[NDArray[np.uint8]], params: AugmentationParams | OpParams | None = None
    ) -> torch.Tensor:
        headers = list(map(_header, range(len(images)), images))
        sizes = np.array([[header.height, header.width] for header in headers], np.int64)
        boxes = None
        if self._augmentation.random_resized_crop:
            assert isinstance(params, AugmentationParams)
            upright_sizes = sizes[:, ::-1] if self._spec.transposed else sizes
            boxes = self._augmentation.crop_boxes(params, upright_sizes).astype(np.int32)
        runs = _runs(sizes.prod(axis=1).tolist())
        outputs = [self._decode(images, headers, boxes, run) for run in runs]
        pixels, params = self._ops.to_device(outputs[0] if len(outputs) == 1 else torch.cat(outputs), params)
        if self._ops.quantizes:
            pixels = self._ops.apply_raw_ops(pixels, params)
            pixels = torch.addcmul(self._shifts, pixels.float(), self._scales)
        return self._augment(pixels, params)

    def _define(self):
        files = fn.external_source(name="images", batch=True, dtype=types.UINT8, ndim=1)
        images = fn.decoders.image(
            files,
            device="mixed" if self._device.type == "cuda" else "cpu",
            output_type=types.GRAY if self._spec.image_shape[2] == 1 else types.RGB,
            jpeg_fancy_upsampling=True,  # on GPUs too, as libjpeg on CPUs
        )
        if self._spec.transposed:
            images = fn.transpose(images, perm=[1, 0, 2], transpose_layout=False)
        if self._augmentation.random_resized_crop:
            boxes = fn.external_source(name="boxes", batch=True, dtype=types.INT32, ndim=1)
            images = fn.slice(images, start=boxes[0:2], shape=boxes[2:4], axes=[0, 1])
        size = images.shape(dtype=types.FLOAT)
        resized = self._resize(images, size[0], size[1])
        return resized if self._ops.quantizes else self._normalize(resized)

    def _decode(
        self,
        images: list[NDArray[np.uint8]],
        headers: list[ImageHeader],
        boxes: NDArray[np.int32] | None,
        run: slice,
    ) -> torch.Tensor:
        """Decode and resize some images of a batch: [n, R, S, C]."""
        channels = self._spec.image_shape[2]
        plain = [
            images[position] if headers[position].plain else _as_pnm(position, images[position], channels)
            for position in range(run.start, run.stop)
        ]
        inputs = {"images": plain} if boxes is None else {"images": plain, "boxes": boxes[run]}
        try:
            return self._run(**inputs)
        except torch.cuda.OutOfMemoryError:  # a RuntimeError that is no image's fault
            raise
        except RuntimeError:
            self._find_undecodable(inputs, run.start)
            raise

    def _find_undecodable(self, inputs: dict[str, Any], start: int) -> None:
        """Raise `UndecodableImage` for the first image that fails when decoded alone."""
        self._pipeline = self.define_pipeline()  # a pipeline is unusable after an error
        for index, image in enumerate(inputs["images"]):
            try:
                self._run(**{name: batch[index : index + 1] for name, batch in inputs.items()})
            except torch.cuda.OutOfMemoryError:
                raise
            except RuntimeError as error:
                position = start + index
                raise UndecodableImage(position, _describe_defect(image, self._spec.image_shape[2], error)) from None


def _header(position: int, image: NDArray[np.uint8]) -> ImageHeader:
    try:
        return read_image_header(image)
    except ValueError as error:
        raise UndecodableImage(position, str(error)) from None


def _as_pnm(position: int, image: NDArray[np.uint8], channels: int) -> NDArray[np.uint8]:
    """Decode an image that DALI may decode differently from Pillow, and return it in a format without variants."""
    try:
        pixels = decode(image, channels)
    except ValueError as error:
        raise UndecodableImage(position, str(error)) from None
    height, width, _ = pixels.shape
    start = b"P%d %d %d 255\n" % (5 if channels == 1 else 6, width, height)
    return np.concatenate([np.frombuffer(start, np.uint8), pixels.reshape(-1)])


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
