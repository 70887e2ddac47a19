"""TrivialAugment, RandAugment and random-resized crops compute what torchvision computes for the same draws."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from support.gpu_arithmetic import GpuRounding
from support.image_files import SIZES, as_array
from support.raw_files import picture, pixels
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from pipeline.transforms.augmentation import Augmentation, AugmentationParams
from pipeline.transforms.build import build_transform
from pipeline.transforms.ops.auto_augment import OPERATIONS, AutoAugment
from pipeline.transforms.ops.resized_crop import ResizedCrop
from pipeline.transforms.preprocess import Resolution, input_size
from pipeline.transforms.shared_ops import SharedOps
from pipeline.transforms.spec import TransformSpec

CPU = torch.device("cpu")
POLICIES = {
    "trivial_augment": (Augmentation(auto_augment="trivial_augment"), v2.TrivialAugmentWide()),
    "trivial_augment, gray": (Augmentation(auto_augment="trivial_augment", fill=77), v2.TrivialAugmentWide(fill=77)),
    "rand_augment": (Augmentation(auto_augment="rand_augment"), v2.RandAugment()),
    "rand_augment, strong": (
        Augmentation(auto_augment="rand_augment", rand_augment_ops=3, rand_augment_magnitude=25),
        v2.RandAugment(3, 25),
    ),
}
COUNT = 60


@pytest.fixture(params=["torch", "dali"])
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


def examples(count: int, height: int, width: int, channels: int) -> NDArray[np.uint8]:
    """Noise of full and of low contrast, gray noise, and images of a single value."""
    images = np.random.default_rng(channels).integers(0, 256, (count, height, width, channels), np.uint8)
    images[::4] = images[::4] // 3 + 40
    images[1::4] = images[1::4, :, :, :1]
    images[2::16] = 99
    return images


def operations_of(policy: v2.TrivialAugmentWide | v2.RandAugment, numbers: NDArray, shape: tuple[int, int]) -> list:
    """Names and magnitudes of the operations of one image, as torchvision chooses them from these draws."""
    chosen = []
    for operation, magnitude_bin, sign, _ in numbers.reshape(-1, 4):
        name, (magnitudes, is_signed) = list(policy._AUGMENTATION_SPACE.items())[int(operation * 14)]
        values = magnitudes(31, *shape)
        magnitude = 0.0
        if values is not None:
            index = policy.magnitude if isinstance(policy, v2.RandAugment) else int(magnitude_bin * 31)
            magnitude = float(values[index]) * (-1 if is_signed and sign <= 0.5 else 1)
        chosen.append((name, magnitude))
    return chosen


def by_torchvision(
    images: NDArray[np.uint8], policy: v2.TrivialAugmentWide | v2.RandAugment, params: AugmentationParams
) -> NDArray[np.uint8]:
    results = []
    for image, numbers in zip(images, params.uniform[:, 20:], strict=True):
        result = torch.from_numpy(image).permute(2, 0, 1)
        for name, magnitude in operations_of(policy, numbers, image.shape[:2]):
            result = policy._apply_image_or_video_transform(
                result, name, magnitude, interpolation=policy.interpolation, fill=policy._fill
            )
        results.append(result.permute(1, 2, 0).numpy())
    return np.stack(results)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("shape", [(28, 28, 1), (20, 31, 3), (33, 18, 3), (2, 5, 1)])
def test_equals_torchvision(policy: str, shape: tuple[int, int, int]) -> None:
    augmentation, reference = POLICIES[policy]
    images = examples(COUNT, *shape)
    params = augmentation.sample_params(3, 1, 2, slice(0, COUNT))
    expected = by_torchvision(images, reference, params)
    for transposed in (False, True):
        policy_ops = AutoAugment(augmentation, shape[:2], transposed)
        arrays = policy_ops.op_params(params)
        stored = np.ascontiguousarray(images.swapaxes(1, 2)) if transposed else images
        given = torch.from_numpy(stored.copy())
        result = policy_ops(given, {name: torch.from_numpy(array) for name, array in arrays.items()}).numpy()
        assert np.array_equal(result.swapaxes(1, 2) if transposed else result, expected)
        assert np.array_equal(given.numpy(), stored)


def test_every_operation_and_magnitude_of_trivial_augment_equals_torchvision() -> None:
    augmentation, reference = POLICIES["trivial_augment"]
    operation, magnitude, sign = np.meshgrid(np.arange(14), np.arange(31), np.arange(2), indexing="ij")
    draws = np.stack([(operation + 0.5) / 14, (magnitude + 0.5) / 31, 0.25 + sign / 2, sign], axis=3).reshape(-1, 4)
    params = augmentation.sample_params(0, 0, 0, slice(0, len(draws)))
    params.uniform[:, 20:] = draws
    images = examples(len(draws), 17, 20, 3)
    policy_ops = AutoAugment(augmentation, (17, 20), transposed=False)
    arrays = {name: torch.from_numpy(array) for name, array in policy_ops.op_params(params).items()}
    result = policy_ops(torch.from_numpy(images), arrays).numpy()
    assert np.array_equal(result, by_torchvision(images, reference, params))
    changed = (result != images).any(axis=(1, 2, 3)).reshape(14, -1).mean(axis=1)
    assert changed[OPERATIONS.index("identity")] == 0
    assert (changed[1:] > 0.5).all()


@pytest.mark.parametrize("name", ["trivial_augment", "rand_augment"])
@pytest.mark.parametrize("shape", [(28, 28, 1), (20, 31, 3)])
def test_a_gpu_rounds_as_a_cpu(name: str, shape: tuple[int, int, int]) -> None:
    """At this magnitude, sheared positions are halfway between two pixels."""
    augmentation = Augmentation(auto_augment=name, rand_augment_magnitude=20)
    images = torch.from_numpy(examples(150, *shape))
    policy = AutoAugment(augmentation, shape[:2], transposed=False)
    arrays = policy.op_params(augmentation.sample_params(0, 0, 0, slice(0, len(images))))
    params = {key: torch.from_numpy(array) for key, array in arrays.items()}
    expected = policy(images, params)
    with GpuRounding() as rounding:
        assert torch.equal(policy(images, params), expected)
    assert rounding.quotients, "the means of contrast"


@pytest.mark.parametrize("transposed", [False, True])
def test_both_backends_apply_it_before_the_resize(backend: str, transposed: bool) -> None:
    augmentation, reference = POLICIES["rand_augment"]
    images = examples(40, 20, 31, 3)
    params = augmentation.sample_params(0, 0, 1, slice(0, 40))
    changed = by_torchvision(images, reference, params)
    spec = TransformSpec((20, 31, 3), False, 24, mean=(0.0,) * 3, std=(1.0,) * 3)
    expected = build_transform(spec, "torch", CPU, 40)(changed)
    if transposed:
        images = np.ascontiguousarray(images.swapaxes(1, 2))
        spec = TransformSpec((31, 20, 3), True, 24, mean=(0.0,) * 3, std=(1.0,) * 3)
    result = build_transform(spec, backend, CPU, 40, augmentation)(images, params)
    assert float((result - expected).abs().max()) <= 1e-5


def boxes_by_torchvision(draws: NDArray, height: int, width: int, area: tuple[float, float]) -> tuple[int, ...]:
    """The algorithm of `RandomResizedCrop.make_params`, with given draws [10, 4] of area, aspect, y and x."""
    for area_draw, aspect_draw, y, x in draws:
        target = height * width * (area[0] + (area[1] - area[0]) * area_draw)
        aspect = math.exp(math.log(3 / 4) + (math.log(4 / 3) - math.log(3 / 4)) * aspect_draw)
        w, h = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(y * (height - h + 1)), int(x * (width - w + 1)), h, w
    w, h = width, height
    if width / height < 3 / 4:
        h = round(width / (3 / 4))
    elif width / height > 4 / 3:
        w = round(height * (4 / 3))
    return (height - h) // 2, (width - w) // 2, h, w


@pytest.mark.parametrize("area", [(0.08, 1.0), (0.9, 1.0)])
def test_boxes_of_random_resized_crops_are_those_of_torchvision(area: tuple[float, float]) -> None:
    augmentation = Augmentation(random_resized_crop=area, auto_augment="trivial_augment")
    params = augmentation.sample_params(0, 0, 0, slice(0, 300))
    sizes = np.array([(28, 28), (20, 31), (90, 12), (10, 95), (1, 1)] * 60)
    found = augmentation.crop_boxes(params, sizes)
    draws = params.uniform[:, 24:].reshape(-1, 10, 4)
    expected = [boxes_by_torchvision(each, *size, area) for each, size in zip(draws, sizes.tolist(), strict=True)]
    assert found.tolist() == [list(box) for box in expected]
    assert len(np.unique(found, axis=0)) > 25


@pytest.mark.parametrize(
    ("interpolation", "resolution"), [("linear", "24x40"), ("linear", 9), ("cubic", "16x11"), ("cubic", 50)]
)
@pytest.mark.parametrize("shape", [(28, 28, 1), (20, 31, 3)])
def test_resized_crops_equal_torchvision(
    backend: str, interpolation: str, resolution: Resolution, shape: tuple[int, int, int]
) -> None:
    augmentation = Augmentation(random_resized_crop=(0.08, 1))
    images = examples(COUNT, *shape)
    params = augmentation.sample_params(0, 0, 0, slice(0, COUNT))
    boxes = augmentation.crop_boxes(params, np.tile(shape[:2], (COUNT, 1)))
    mode = {"linear": v2.InterpolationMode.BILINEAR, "cubic": v2.InterpolationMode.BICUBIC}[interpolation]
    expected = torch.stack(
        [
            functional.resized_crop(
                torch.from_numpy(image).permute(2, 0, 1) / 255, *box, list(input_size(resolution)), mode, antialias=True
            )
            for image, box in zip(images, boxes.tolist(), strict=True)
        ]
    )
    spec = TransformSpec(shape, False, resolution, interpolation, (0.0,) * shape[2], (1.0,) * shape[2])
    result = build_transform(spec, backend, CPU, COUNT, augmentation)(images, params)
    # The cubic kernel is tabulated at steps of 1/32, as in DALI.
    assert float((result - expected).abs().max()) <= (1e-5 if interpolation == "linear" else 2e-3)
    stored = np.ascontiguousarray(images.swapaxes(1, 2))
    spec = TransformSpec(
        (shape[1], shape[0], shape[2]), True, resolution, interpolation, (0.0,) * shape[2], (1.0,) * shape[2]
    )
    exchanged = build_transform(spec, backend, CPU, COUNT, augmentation)(stored, params)
    assert float((exchanged - result).abs().max()) <= 1e-5


def test_nearest_pixels_of_a_box() -> None:
    image = torch.arange(20.0).view(1, 1, 4, 5)
    box = torch.tensor([[1.0, 2.0, 2.0, 3.0]])
    result = ResizedCrop((4, 4), "nearest", CPU)(image, box)
    assert result[0, 0].tolist() == [[7, 8, 8, 9], [7, 8, 8, 9], [12, 13, 13, 14], [12, 13, 13, 14]]


def test_image_files_are_cropped_before_the_resize_and_changed_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the box and the operation of torchvision for each file."""
    sizes = SIZES * 4
    files = [as_array(picture(pixels(*size, 3))) for size in sizes]
    crop = Augmentation(random_resized_crop=(0.2, 0.9))
    both = Augmentation(random_resized_crop=(0.2, 0.9), auto_augment="trivial_augment")
    params = both.sample_params(0, 0, 0, slice(0, len(files)))
    spec = TransformSpec((None, None, 3), False, "24x17", mean=(0.0,) * 3, std=(1.0,) * 3)
    cropped = build_transform(spec, "dali", CPU, len(files), crop)(files, params).numpy()
    boxes = crop.crop_boxes(params, np.array(sizes))
    parts = [
        as_array(picture(pixels(*size, 3)[top : top + height, left : left + width]))
        for size, (top, left, height, width) in zip(sizes, boxes.tolist(), strict=True)
    ]
    assert np.abs(build_transform(spec, "dali", CPU, len(files))(parts).numpy() - cropped).max() <= 1e-6
    assert (boxes[:, 2:] < np.array(sizes)).any()
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
    transform = build_transform(spec.with_normalization(mean, std), "dali", CPU, len(files), both)
    apply, given = SharedOps.apply_raw_ops, []

    def recorded(ops: SharedOps, images: torch.Tensor, arrays: Mapping[str, torch.Tensor]) -> torch.Tensor:
        given.append(images.numpy().copy())
        return apply(ops, images, arrays)

    monkeypatch.setattr(SharedOps, "apply_raw_ops", recorded)
    changed = transform(files, params).numpy()
    quantized = given[0]
    assert np.abs(quantized - cropped.transpose(0, 2, 3, 1) * 255).max() <= 0.501
    numbers = AugmentationParams(params.uniform[:, :24], params.noise_keys, 0)
    expected = by_torchvision(quantized, v2.TrivialAugmentWide(), numbers).transpose(0, 3, 1, 2) / 255
    expected = (expected - np.array(mean)[:, None, None]) / np.array(std)[:, None, None]
    assert np.abs(changed - expected).max() <= 1e-5
