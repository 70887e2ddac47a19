"""Steps on raw images are what SciPy, DALI and plain loops make of them, on any device."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import pack_splits, synthetic_splits
from numpy.typing import NDArray
from scipy import ndimage
from support import augmentation_reference as reference
from support.gpu_arithmetic import GpuRounding

from pipeline import normalization
from pipeline.transforms.build import build_transform
from pipeline.transforms.ops.foreground import contour_mask, foreground_mask
from pipeline.transforms.ops.morphology import change_stroke_width, morphological_opening
from pipeline.transforms.preprocess import Preprocessing
from pipeline.transforms.spec import TransformSpec
from shards import UserError, open_split

SHAPES = {"gray": (28, 28, 1), "rgb": (20, 31, 3)}


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture(params=["gray", "rgb"])
def images(request: pytest.FixtureRequest) -> NDArray[np.uint8]:
    return drawings(12, SHAPES[request.param])


def drawings(count: int, shape: tuple[int, int, int]) -> NDArray[np.uint8]:
    """Bright blobs on a dark, noisy ground; the last image is noise, the one before is of one value."""
    random = np.random.default_rng([count, *shape])
    height, width, channels = shape
    down, across = np.mgrid[:height, :width]
    found = np.zeros((count, *shape))
    for image in found:
        for _ in range(3):
            centre, radius = random.uniform(0.25, 0.75, 2) * (height, width), random.uniform(1.5, 4)
            inside = np.hypot(down - centre[0], across - centre[1]) < radius
            image[inside] = random.uniform(150, 255, channels)
    found += random.uniform(0, 40, found.shape)
    found[-1] = random.uniform(0, 255, shape)
    found[-2] = 77
    return found.clip(0, 255).astype(np.uint8)


def prepared(images: NDArray[np.uint8], device: torch.device, **steps: object) -> NDArray[np.uint8]:
    before = images.copy()
    result = Preprocessing(**steps)(torch.from_numpy(images).to(device))
    assert np.array_equal(images, before)
    assert result.dtype == torch.uint8
    assert result.is_contiguous()
    return result.cpu().numpy()


def planes(images: NDArray) -> NDArray:
    """[B, H, W, C] as [B * C, H, W]."""
    return images.transpose(0, 3, 1, 2).reshape(-1, *images.shape[1:3])


def test_inverts_all_or_those_with_a_bright_border(images: NDArray[np.uint8], device: torch.device) -> None:
    assert np.array_equal(prepared(images, device, invert=True), 255 - images)
    dark = images[:-2]
    mixed = np.concatenate([dark, 255 - dark])
    assert np.array_equal(prepared(mixed, device, invert="auto"), np.concatenate([dark, dark]))


@pytest.mark.parametrize("shape", [(4, 6, 1), (5, 3, 3), (2, 7, 1), (1, 4, 1)])
def test_every_pixel_of_the_border_counts_once(shape: tuple[int, int, int], device: torch.device) -> None:
    """Noise, whose border is as often bright as dark."""
    images = np.random.default_rng(0).integers(0, 256, (300, *shape), np.uint8)
    is_border = np.ones(shape[:2], bool)
    is_border[1:-1, 1:-1] = False
    bright = images[:, is_border].mean(axis=(1, 2)) > 127.5
    expected = np.where(bright[:, None, None, None], 255 - images, images)
    assert np.array_equal(prepared(images, device, invert="auto"), expected)


@pytest.mark.parametrize("steps", [{"invert": "auto"}, {"crop_to_foreground": 0.1}, {"equalize": True}])
def test_a_gpu_rounds_as_a_cpu(images: NDArray[np.uint8], steps: dict[str, object]) -> None:
    def compare(batch: NDArray[np.uint8]) -> None:
        expected = prepared(batch, torch.device("cpu"), **steps)
        with GpuRounding():
            assert np.array_equal(prepared(batch, torch.device("cpu"), **steps), expected)

    compare(images)
    for side in range(8, 30, 2):  # borders as bright as dark, which are not inverted
        compare(np.tile(np.array([0, 255], np.uint8), 2 * side**2).reshape(4, side, side, 1))


@pytest.mark.parametrize("radius", [1, 2])
def test_opens_as_scipy_does(images: NDArray[np.uint8], device: torch.device, radius: int) -> None:
    diamond = ndimage.iterate_structure(reference.CROSS, radius)
    for ours, plane in zip(planes(prepared(images, device, opening_radius=radius)), planes(images), strict=True):
        eroded = ndimage.minimum_filter(plane, footprint=diamond, mode="constant", cval=255)
        assert np.array_equal(ours, ndimage.maximum_filter(eroded, footprint=diamond, mode="constant", cval=0))
        dilated = prepared(plane[None, :, :, None], device, dilation_radius=radius)[0, :, :, 0]
        assert np.array_equal(dilated, ndimage.maximum_filter(plane, footprint=diamond, mode="constant", cval=0))
    assert torch.equal(morphological_opening(torch.from_numpy(images), 0), torch.from_numpy(images))


@pytest.mark.parametrize("most", [0.7, 1.0, 2.5])
def test_strokes_become_thicker_and_thinner_as_scipy_makes_them(
    images: NDArray[np.uint8], device: torch.device, most: float
) -> None:
    amounts = np.linspace(-most, most, len(images))
    ours = (
        change_stroke_width(torch.from_numpy(images).to(device), torch.from_numpy(amounts).to(device), most)
        .cpu()
        .numpy()
    )
    for image, result, amount in zip(images, ours, amounts, strict=True):
        for plane, found in zip(planes(image[None]), planes(result[None]), strict=True):
            # Half a level for rounding and one for the amount, which is a multiple of 1/128, in each step.
            assert np.abs(found - reference.change_stroke_width(plane, amount)).max() <= 1.5 * np.ceil(most)
    whole = change_stroke_width(torch.from_numpy(images), torch.full((len(images),), 2.0), 2).numpy()
    assert all(
        np.array_equal(a, reference.change_stroke_width(b, 2))
        for a, b in zip(planes(whole), planes(images), strict=True)
    )
    still = change_stroke_width(torch.from_numpy(images), torch.zeros(len(images)), most)
    assert torch.equal(still, torch.from_numpy(images))


def test_equalises_as_dali_and_by_rank(images: NDArray[np.uint8], device: torch.device) -> None:
    dali, fn = pytest.importorskip("nvidia.dali"), pytest.importorskip("nvidia.dali.fn")
    ours = prepared(images, device, equalize=True)
    pipeline = dali.Pipeline(batch_size=len(images), num_threads=1, device_id=None, prefetch_queue_depth=1)
    with pipeline:
        pipeline.set_outputs(fn.equalize(fn.external_source(name="images", layout="HWC")))
    pipeline.build()
    (dalis,) = pipeline.run(images=list(images))
    difference = np.abs(ours.astype(int) - dalis.as_array())
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.01, "where float32 falls beside one half"
    for found, plane in zip(planes(ours), planes(images), strict=True):
        assert np.array_equal(found, reference.equalize(plane))


def test_equalised_emnist_has_the_moments_that_are_known(shared_data: Path) -> None:
    """0.171 and 0.285 of all ByClass images at 112 pixels; the raw ones have 0.174 and 0.317."""
    path = shared_data / "emnist" / "emnist-byclass-train-images-idx3-ubyte.gz"
    with gzip.open(path) as file:
        raw = np.frombuffer(file.read(16 + 5000 * 784), np.uint8, offset=16).reshape(-1, 28, 28, 1).copy()
    spec = TransformSpec((28, 28, 1), True, 112, preprocessing=Preprocessing(equalize=True))
    found = build_transform(spec, "torch", torch.device("cpu"), len(raw))(raw)
    assert float(found.mean()) == pytest.approx(0.171, abs=0.003)
    assert float(found.std()) == pytest.approx(0.285, abs=0.003)


@pytest.mark.parametrize(("margin", "opening"), [(0.0, 0), (0.2, 0), (0.0, 1)])
def test_crops_to_the_ink(images: NDArray[np.uint8], device: torch.device, margin: float, opening: int) -> None:
    """With an opening, the ink is located in the opened image, and cropped from the image itself."""
    images[:, 1, 1] = 255  # a speck in a corner, which the opening ignores
    ours = prepared(images, device, crop_to_foreground=margin, foreground_opening_radius=opening)
    sought = prepared(images, device, opening_radius=opening)
    assert opening == 0 or not np.array_equal(ours, prepared(images, device, crop_to_foreground=margin))
    found = foreground_mask(torch.from_numpy(sought)).numpy()
    for image, opened, result, marked in zip(images, sought, ours, found, strict=True):
        gray = opened.astype(np.float32).mean(axis=2).round().astype(np.uint8)
        assert np.array_equal(marked, reference.otsu(gray))
        for plane, cropped in zip(planes(image[None]), planes(result[None]), strict=True):
            assert np.abs(cropped - reference.cropped(plane, marked, margin)).max() <= 0.5 + 1e-3
    if opening:
        assert np.array_equal(ours[-2], images[-2]), "without ink"


def test_the_contour_is_what_erosion_takes_away(images: NDArray[np.uint8]) -> None:
    for found in foreground_mask(torch.from_numpy(images)):
        inner = ndimage.binary_erosion(found.numpy(), reference.CROSS, border_value=1)
        assert np.array_equal(contour_mask(found[None])[0].numpy(), found.numpy() & ~inner)


def test_an_opening_without_a_crop_is_no_step() -> None:
    assert Preprocessing(foreground_opening_radius=1).steps == ()
    assert Preprocessing(foreground_opening_radius=1, crop_to_foreground=0.0).steps == (
        "crop_to_foreground0.0",
        "foreground_opening_radius1",
    )


def test_steps_follow_one_another(images: NDArray[np.uint8], device: torch.device) -> None:
    crop = {"crop_to_foreground": 0.1, "foreground_opening_radius": 1}
    rest = {"opening_radius": 1} | crop | {"dilation_radius": 1, "equalize": True}
    together = prepared(255 - images, device, invert="auto", **rest)
    for step in ({"invert": "auto"}, {"opening_radius": 1}, crop, {"dilation_radius": 1}, {"equalize": True}):
        images = prepared(255 - images if "invert" in step else images, device, **step)
    assert np.array_equal(together, images)


@pytest.mark.parametrize("backend", ["torch", "dali"])
@pytest.mark.parametrize("transposed", [False, True], ids=["upright", "transposed"])
def test_graphs_prepare_before_they_resize(
    images: NDArray[np.uint8], device: torch.device, backend: str, transposed: bool
) -> None:
    steps = Preprocessing(True, 0, 0.1, foreground_opening_radius=1, dilation_radius=1, equalize=True)
    channels = images.shape[3]
    plain = TransformSpec(images.shape[1:], transposed, 40, "linear", (0.0,) * channels, (1.0,) * channels)
    whole = TransformSpec(plain.image_shape, transposed, 40, "linear", plain.mean, plain.std, steps)
    before = images.copy()
    result = build_transform(whole, backend, device, 16)(images)
    assert np.array_equal(images, before)
    # On the same device: the crop depends on the order in which the sums of a row are added.
    prepared_images = steps(torch.from_numpy(images).to(device)).cpu().numpy()
    by_hand = build_transform(plain, backend, device, 16)(prepared_images)
    assert torch.equal(result, by_hand)


def test_statistics_are_those_of_prepared_images_and_kept_apart(tmp_path: Path) -> None:
    packed = pack_splits(synthetic_splits(train=60, test=10), tmp_path / "set")
    store, cpu = open_split(packed, "train"), torch.device("cpu")
    found = {}
    for steps in (Preprocessing(), Preprocessing(invert=True), Preprocessing(crop_to_foreground=0.1, equalize=True)):
        spec = TransformSpec.of(store.manifest, 20, "linear", steps)
        found[steps] = normalization.load_or_compute_stats(store, packed / "train", spec, "torch", cpu)
        assert found[steps] == normalization.load_or_compute_stats(store, packed / "train", spec, "torch", cpu)
        assert found[steps] == normalization.compute_stats(store, spec, "torch", cpu)
    plain, inverted, _ = found.values()
    assert inverted.mean[0] == pytest.approx(1 - plain.mean[0], abs=1e-6)
    names = {path.name for path in (packed / "train" / "statistics").iterdir()}
    assert names == {"20-linear.json", "20-linear-invert.json", "20-linear-crop_to_foreground0.1-equalize.json"}


@pytest.mark.parametrize(
    "steps", [{"equalize": True}, {"crop_to_foreground": 0.0}, {"invert": "auto", "opening_radius": 1}]
)
def test_picture_files_are_refused(steps: dict[str, object]) -> None:
    spec = TransformSpec(
        (None, None, 3), False, 28, mean=(0.0,) * 3, std=(1.0,) * 3, preprocessing=Preprocessing(**steps)
    )
    with pytest.raises(UserError, match=next(iter(steps))) as caught:
        build_transform(spec, "dali", torch.device("cpu"), 8)
    assert "--size N" in caught.value.hint
