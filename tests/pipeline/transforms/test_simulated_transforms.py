"""Both transforms on a simulated GPU: no operator mixes devices, and the host never waits."""

from __future__ import annotations

import inspect
import itertools
import weakref
from typing import Any

import numpy as np
import nvidia.dali.types as types
import pytest
import torch
from nvidia.dali import Pipeline
from nvidia.dali.plugin.pytorch import feed_ndarray
from support.gpu_arithmetic import Products
from support.simulated_gpu import GPU, DeviceError, simulated_gpu

from pipeline.transforms import dali_backend
from pipeline.transforms.augmentation import NO_AUGMENTATION, Augmentation
from pipeline.transforms.ops import matmul
from pipeline.transforms.preprocess import NO_PREPROCESSING, Preprocessing, Resolution, input_size
from pipeline.transforms.shared_ops import SharedOps
from pipeline.transforms.spec import TransformSpec
from pipeline.transforms.torch_backend import TorchTransform

AUGMENTATIONS = {
    "none": NO_AUGMENTATION,
    "affine": Augmentation(rotation=10, shear=5, translation=0.1, scale=0.1, flip=0.5, crop_padding=2),
    "trivial": Augmentation(auto_augment="trivial_augment"),
    "random": Augmentation(auto_augment="rand_augment", rand_augment_ops=2, fill=9, vertical_flip=0.5),
    "resized crop": Augmentation(random_resized_crop=(0.08, 1)),
    "elastic": Augmentation(elastic=0.1, fill=0),
    "colors": Augmentation(brightness=0.2, contrast=0.2, saturation=0.2, hue=10),
    "erase": Augmentation(stroke=1.5, erase=0.5),
    "contour": Augmentation(erase=0.5, erase_at="contour"),
}
PREPROCESSING = {
    "none": NO_PREPROCESSING,
    "all": Preprocessing("auto", 2, 0.1, foreground_opening_radius=1, dilation_radius=1, equalize=True),
    "invert": Preprocessing(invert=True),
}
COUNT = 6
MANY = 100  # images, so that every operation of a policy has some


def spec_of(channels: int, transposed: bool, resolution: Resolution, preprocessing: str = "none") -> TransformSpec:
    spec = TransformSpec((28, 26, channels), transposed, resolution, preprocessing=PREPROCESSING[preprocessing])
    return spec.with_normalization((0.5,) * channels, (0.25,) * channels)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("augmentation", AUGMENTATIONS)
def test_a_batch_does_not_wait_for_the_gpu(augmentation: str, channels: int) -> None:
    changes = AUGMENTATIONS[augmentation]
    count = MANY if changes.auto_augment_rounds else COUNT
    images = np.zeros((count, 28, 26, channels), np.uint8)
    for transposed, (resolution, preprocessing) in itertools.product(
        (False, True), ((14, "none"), ("56x30", "all"), (28, "invert"))
    ):
        with simulated_gpu() as gpu:
            transform = TorchTransform(spec_of(channels, transposed, resolution, preprocessing), GPU, changes)
            with gpu.step():
                output = transform(images, changes.sample_params(0, 0, 0, slice(0, count)) if changes else None)
        assert (output.device, output.dtype) == (GPU, torch.float32)
        assert output.shape == (count, channels, *input_size(resolution))


@pytest.mark.parametrize("augmentation", AUGMENTATIONS)
def test_no_product_of_a_batch_is_in_tf32(augmentation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul, "_allows_tf32", lambda: True)
    changes = AUGMENTATIONS[augmentation]
    params = changes.sample_params(0, 0, 0, slice(0, COUNT)) if changes else None
    with simulated_gpu(), Products() as products:
        TorchTransform(spec_of(3, False, "56x30", "all"), GPU, changes)(np.zeros((COUNT, 28, 26, 3), np.uint8), params)
    assert set(products.dtypes) == {torch.float64}


class Executor:
    """Takes the place of DALI's executor: notes what it is given, and returns outputs of a size.

    Attributes:
        shape: Height, width and channels of the outputs.
        fed: Name, tensor and stream of each input.
        outputs: The outputs, while they are referred to.
        streams: The stream of each run and of each copy of an output.
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.shape: tuple[int, ...] = ()
        self.fed: list[tuple[str, torch.Tensor, int]] = []
        self.outputs: list[weakref.ref] = []
        self.streams: list[int] = []
        executor = self

        class Output:
            dtype = types.FLOAT

            def __init__(self, packs: torch.Size) -> None:
                self._shape = [*packs, *executor.shape]

            def as_tensor(self) -> Output:
                return self

            def shape(self) -> list[int]:
                return self._shape

        def feed(pipeline: Pipeline, *given: Any, **named: Any) -> None:
            arguments = FEED.bind(pipeline, *given, **named).arguments
            data, limit = arguments["data"], pipeline.max_batch_size
            assert data.is_contiguous() and data.device == GPU and len(data) <= limit
            executor.fed.append((arguments["data_node"], data, arguments["cuda_stream"].number))

        def run(pipeline: Pipeline, *given: Any, **named: Any) -> tuple[Output]:
            arguments = RUN.bind(pipeline, *given, **named).arguments
            assert pipeline.exec_dynamic, "outputs on a stream"
            executor.streams.append(arguments["cuda_stream"].number)
            output = Output(executor.fed[-1][1].shape[:2])
            executor.outputs.append(weakref.ref(output))
            return (output,)

        def copy(*given: Any, **named: Any) -> None:
            arguments = COPY.bind(*given, **named).arguments
            output, target = arguments["dali_tensor"], arguments["arr"]
            assert (output.shape(), torch.float32) == (list(target.shape), target.dtype) and target.is_contiguous()
            executor.streams.append(arguments["cuda_stream"].number)  # given, so the copy does not block

        for name, function in (("build", lambda pipeline: None), ("feed_input", feed), ("run", run)):
            patch.setattr(Pipeline, name, function)
        patch.setattr(dali_backend, "feed_ndarray", copy)


FEED, RUN = inspect.signature(Pipeline.feed_input), inspect.signature(Pipeline.run)
COPY = inspect.signature(feed_ndarray)


@pytest.mark.parametrize(("augmentation", "channels"), [("none", 1), ("elastic", 1), ("resized crop", 3)])
def test_dali_works_in_the_order_of_the_current_stream(
    augmentation: str, channels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes, most = AUGMENTATIONS[augmentation], 70
    spec = spec_of(channels, True, "56x30")
    with simulated_gpu() as gpu:
        executor = Executor(monkeypatch)
        transform = dali_backend.DaliTransform(spec, GPU, most, changes)
        executor.shape = (*(spec.input_size if transform._ops.resizes else spec.upright_size), channels)
        for number, count in enumerate((most, 33, 32, 1)):
            images = torch.zeros(count, 28, 26, channels, dtype=torch.uint8, device=GPU)
            params = changes.sample_params(0, 0, number, slice(0, count)) if changes else None
            stream = torch.cuda.Stream()
            with torch.cuda.stream(stream), gpu.step():
                output = transform(images, params)
            assert output.shape == (count, channels, 56, 30)
            assert {*executor.streams, executor.fed[-1][2]} == {stream.number}
            executor.streams.clear()
            packs, pack = executor.fed[-1][1].shape[:2]
            assert packs * pack >= count and pack <= 32 and packs * pack - count < packs
            # DALI's memory is kept until the copy in the stream has ended.
            assert [each() is not None for each in executor.outputs] == [False] * number + [True]


def test_a_wait_in_a_raw_operation_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def spoiled(ops: SharedOps, images: torch.Tensor, params: object) -> torch.Tensor:
        return images if images.any() else ~images

    monkeypatch.setattr(SharedOps, "apply_raw_ops", spoiled)
    with simulated_gpu() as gpu:
        transform = TorchTransform(spec_of(1, False, 56), GPU)
        with gpu.step(), pytest.raises(DeviceError, match="_local_scalar_dense reads"):
            transform(np.zeros((COUNT, 28, 26, 1), np.uint8))
