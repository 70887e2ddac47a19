"""The torch transform on a simulated GPU: no operator mixes devices, and the host never waits."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from support.gpu_arithmetic import Products
from support.simulated_gpu import GPU, DeviceError, simulated_gpu

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


def test_a_wait_in_a_raw_operation_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def spoiled(ops: SharedOps, images: torch.Tensor, params: object) -> torch.Tensor:
        return images if images.any() else ~images

    monkeypatch.setattr(SharedOps, "apply_raw_ops", spoiled)
    with simulated_gpu() as gpu:
        transform = TorchTransform(spec_of(1, False, 56), GPU)
        with gpu.step(), pytest.raises(DeviceError, match="_local_scalar_dense reads"):
            transform(np.zeros((COUNT, 28, 26, 1), np.uint8))
