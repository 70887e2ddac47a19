"""Augmentation: what is drawn is a pure function of seed, epoch, step and place; what it does is what is described."""

from __future__ import annotations

import hashlib
import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from support import augmentation_reference as reference
from support.batches import assert_same
from support.image_files import SIZES, as_array
from support.raw_files import picture, pixels
from support.transform_reference import model_input

from pipeline.common.rng import random_keys
from pipeline.loader import Loader
from pipeline.sampler import ShuffledBatchSampler
from pipeline.transforms.augmentation import NO_AUGMENTATION, Augmentation, AugmentationParams, ParamIndex
from pipeline.transforms.build import build_transform
from pipeline.transforms.ops.erasing import erase
from pipeline.transforms.ops.foreground import contour_mask, foreground_mask
from pipeline.transforms.ops.philox import philox_words
from pipeline.transforms.preprocess import Resolution, input_size
from pipeline.transforms.spec import TransformSpec
from pipeline.transforms.warp import elastic_noise, gaussian_weights
from shards import UserError, open_split
from shards.stores.base import Store
from trainer.config.augment import AugmentConfig

GRAY = (28, 28, 1)
RGB = (20, 31, 3)
# Of the pixel range, for images of noise, whose neighbours differ by all of it. torch stays below 2e-5; DALI sums up
# positions along a line in float32.
TOLERANCE = 1e-4
CPU = torch.device("cpu")
COUNT = 37

AFFINE = Augmentation(rotation=25, shear=15, translation=0.15, scale=0.3)
KINDS = {
    "affine": AFFINE,
    "onto grey": AFFINE.model_copy(update={"fill": 77}),
    "mirrored crop": Augmentation(flip=0.5, vertical_flip=0.4, crop_padding=4, fill=0),
    "elastic": AFFINE.model_copy(update={"elastic": 0.05}),
    "elastic onto white": Augmentation(elastic=0.08, elastic_sigma=0.2, fill=255),
    "colours": Augmentation(brightness=0.3, contrast=0.4, saturation=0.5, hue=30),
    "colours moved": AFFINE.model_copy(
        update={"brightness": 0.3, "contrast": 0.4, "saturation": 0.5, "hue": 30, "fill": 20}
    ),
}


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture(params=["torch", "dali"])
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def store(synthetic_set: Path) -> Store:
    return open_split(synthetic_set, "train")


def noise(count: int, shape: tuple[int, int, int]) -> NDArray[np.uint8]:
    return np.random.default_rng([count, *shape]).integers(0, 256, (count, *shape), dtype=np.uint8)


def spec_of(
    shape: tuple[int | None, int | None, int],
    resolution: Resolution,
    interpolation: str = "linear",
    transposed: bool = False,
) -> TransformSpec:
    return TransformSpec(shape, transposed, resolution, interpolation, (0.0,) * shape[2], (1.0,) * shape[2])


def drawn(augmentation: Augmentation, count: int, seed: int = 0) -> AugmentationParams:
    return augmentation.sample_params(seed, 3, 5, slice(0, count))


# What is drawn.


def test_draws_never_change() -> None:
    """A seed means the same images on every machine and in every version."""
    params = Augmentation(elastic=0.1, elastic_sigma=0.5).sample_params(7, 2, 11, slice(3, 5))
    assert params.uniform.shape == (2, 20)
    assert params.noise.shape == (2, 2, 3, 3)
    content = params.uniform.tobytes() + params.noise.tobytes()
    assert hashlib.sha256(content).hexdigest()[:16] == "296794764b7bf8d4"


def test_without_elastic_distortion_there_is_no_noise() -> None:
    params = drawn(Augmentation(rotation=10), 3)
    assert params.noise is None
    assert params.noise_grid_size == 0


def test_a_transform_has_parameters_if_and_only_if_it_augments() -> None:
    images = noise(2, GRAY)
    plain, moving = (build_transform(spec_of(GRAY, 28), "torch", CPU, 2, each) for each in (Augmentation(), AFFINE))
    for transform, params in ((plain, drawn(AFFINE, 2)), (moving, None)):
        with pytest.raises(AssertionError):
            transform(images, params)


def test_no_images_have_no_parameters() -> None:
    """As the share of a rank, if a batch has fewer samples than ranks."""
    params = Augmentation(elastic=0.1, elastic_sigma=0.5).sample_params(7, 2, 11, slice(3, 3))
    assert params.uniform.shape == (0, 20)
    assert params.noise.shape == (0, 2, 3, 3)


POLICY = Augmentation(auto_augment="rand_augment", rand_augment_ops=3, random_resized_crop=(0.1, 1))


@pytest.mark.parametrize(
    "augmentation", [AFFINE, Augmentation(elastic=0.1), POLICY], ids=["numbers", "and noise", "and more numbers"]
)
def test_ranks_draw_what_one_would(augmentation: Augmentation) -> None:
    whole = augmentation.sample_params(1, 2, 3, slice(0, 50))
    for cuts in ([0, 50], [0, 16, 33, 50], [0, 1, 2, 50]):
        parts = [augmentation.sample_params(1, 2, 3, slice(*pair)) for pair in itertools.pairwise(cuts)]
        together = AugmentationParams.concatenate(parts)
        assert np.array_equal(together.uniform, whole.uniform)
        assert together.noise is whole.noise is None or np.array_equal(together.noise, whole.noise)
        assert [len(part) for part in parts] == np.diff(cuts).tolist()


def test_every_seed_epoch_step_and_place_draws_anew() -> None:
    places = [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (0, 1, 1), (0, 2, 0), (0, 0, 2**20)]
    augmentation = Augmentation(elastic=0.1)
    found = [augmentation.sample_params(*place, slice(0, 30)) for place in places]
    numbers = np.concatenate([params.uniform.ravel() for params in found])
    assert len(np.unique(numbers)) == numbers.size
    beginnings = {params.noise[image].tobytes() for params in found for image in range(30)}
    assert len(beginnings) == 30 * len(places)


def test_draws_are_uniform_and_independent() -> None:
    params = Augmentation(elastic=0.1, elastic_sigma=0.5).sample_params(0, 0, 0, slice(0, 20_000))
    for column in params.uniform.T:
        counts = np.histogram(column, 20, (0, 1))[0]
        assert ((counts - 1000) ** 2 / 1000).sum() < 60  # chi-squared of 19 degrees: one in a million
    correlations = np.corrcoef(params.uniform.T) - np.eye(20)
    assert np.abs(correlations).max() < 5 / np.sqrt(20_000)
    assert abs(params.noise.mean()) < 5 / np.sqrt(params.noise.size)
    assert params.noise.std() == pytest.approx(1, abs=0.01)
    assert np.abs(params.noise).max() <= np.sqrt(3)


def test_amounts_reach_the_ones_given_and_no_further() -> None:
    augmentation = Augmentation(scale=0.25, translation=0.1, stroke=0.5, flip=0.3, crop_padding=2, erase=0.4)
    params = drawn(augmentation, 20_000)
    matrices = augmentation.affine_matrices(params, (28, 28))
    sizes = 1 / matrices[:, 1, 1]
    assert sizes.min() == pytest.approx(1 / 1.25, abs=1e-3)
    assert sizes.max() == pytest.approx(1.25, abs=1e-3)
    assert np.median(sizes) == pytest.approx(1, abs=0.01), "as often larger as smaller"
    assert (matrices[:, 0, 0] < 0).mean() == pytest.approx(0.3, abs=0.02)
    strokes = augmentation.stroke_amounts(params)
    assert [strokes.min(), strokes.max()] == pytest.approx([-0.5, 0.5], abs=1e-3)
    only_crop = Augmentation(crop_padding=2)
    moves = only_crop.affine_matrices(params, (28, 14))[:, :, 2] * (14 / 2, 28 / 2)
    values, counts = np.unique(moves.round(9), return_counts=True)
    assert values.tolist() == [-2, -1, 0, 1, 2]
    assert counts / counts.sum() == pytest.approx([0.2] * 5, abs=0.01)
    heights, widths = augmentation.erase_boxes(params)[:, 2:].T
    hidden = heights > 0
    assert hidden.mean() == pytest.approx(0.4, abs=0.02)
    areas = (heights * widths)[hidden]
    assert [areas.min(), areas.max()] == pytest.approx([0.02, 0.2], abs=1e-3)
    aspects = heights[hidden] / widths[hidden]
    assert [aspects.min(), aspects.max()] == pytest.approx([0.3, 10 / 3], rel=0.01)


def test_displacements_have_the_size_asked_for_everywhere_and_are_smooth() -> None:
    places = (np.arange(56) + 0.5) / 28 - 1
    for smoothness in (0.05, 0.14, 0.4):
        augmentation = Augmentation(elastic=0.04, elastic_sigma=smoothness)
        weights = gaussian_weights(places, augmentation.noise_grid_size, smoothness)
        noise = drawn(augmentation, 1000).noise
        field = weights @ noise @ weights.T  # [B, 2, 56, 56]
        assert field.std(axis=(0, 1)) == pytest.approx(np.ones((56, 56)), abs=0.12)
        # Of white noise under a Gaussian of deviation s, points d apart correlate by exp(-(d / 2s)^2).
        apart = int(smoothness * 56)
        correlation = (field[:, :, :, :-apart] * field[:, :, :, apart:]).mean()
        assert correlation == pytest.approx(np.exp(-((apart / 56 / smoothness) ** 2) / 4), abs=0.1)


# What becomes of it.


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("shape", "resolution", "interpolation", "transposed"),
    [
        (GRAY, 28, "linear", True),
        (GRAY, 40, "linear", False),
        (GRAY, 14, "linear", True),
        (RGB, 40, "linear", True),
        (RGB, 31, "cubic", False),
        (RGB, 16, "nearest", True),
        (RGB, "24x50", "linear", False),
        (RGB, "40x17", "cubic", True),
    ],
)
def test_computes_the_reference(
    backend: str,
    device: torch.device,
    kind: str,
    shape: tuple[int, int, int],
    resolution: Resolution,
    interpolation: str,
    transposed: bool,
) -> None:
    augmentation, images = KINDS[kind], noise(COUNT, shape)
    params = drawn(augmentation, COUNT)
    spec = spec_of(shape, resolution, interpolation, transposed)
    before = images.copy()
    result = build_transform(spec, backend, device, COUNT, augmentation)(images, params)
    assert np.array_equal(images, before)
    some = slice(0, 4)
    expected = reference.augmented(images[some], resolution, augmentation, params, interpolation, transposed)
    assert result.shape == (COUNT, shape[2], *input_size(resolution))
    assert np.abs(result[some].cpu().numpy() - expected).max() <= TOLERANCE
    # The last ones share a pack with padding.
    last = build_transform(spec, backend, device, COUNT, augmentation)(images[-3:], params[-3:])
    assert float((last - result[-3:]).abs().max()) <= TOLERANCE


@pytest.mark.parametrize("kind", ["onto grey", "elastic", "colours moved"])
def test_normalises_after_all_that(backend: str, device: torch.device, kind: str) -> None:
    augmentation, images = KINDS[kind], noise(5, RGB)
    mean, std = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)
    params = drawn(augmentation, 5)
    plain = build_transform(spec_of(RGB, 40), backend, device, 5, augmentation)(images, params).cpu().numpy()
    spec = spec_of(RGB, 40).with_normalization(mean, std)
    result = build_transform(spec, backend, device, 5, augmentation)(images, params).cpu().numpy()
    expected = (plain - np.array(mean)[:, None, None]) / np.array(std)[:, None, None]
    assert np.abs(result - expected).max() <= 2e-5


def test_a_fill_without_moved_pixels_does_not_change_the_normalization(backend: str, device: torch.device) -> None:
    augmentation, images = Augmentation(brightness=0.3, fill=0), noise(5, RGB)
    spec = spec_of(RGB, 40).with_normalization((0.49, 0.48, 0.45), (0.25, 0.24, 0.26))
    params = drawn(augmentation, 5)
    results = [
        build_transform(spec, backend, device, 5, augmentation.model_copy(update={"fill": fill}))(images, params)
        for fill in (0, "border")
    ]
    assert torch.equal(*results)


@pytest.mark.parametrize("fill", ["border", 0])
@pytest.mark.parametrize("resolution", [14, 28, 50])
def test_at_no_strength_images_are_those_of_evaluation(
    backend: str, device: torch.device, resolution: int, fill: int | str
) -> None:
    images = noise(5, GRAY)
    least = Augmentation(rotation=1e-9, elastic=1e-9, stroke=1e-9, brightness=1e-9, fill=fill)
    result = build_transform(spec_of(GRAY, resolution), backend, device, 5, least)(images, drawn(least, 5))
    assert np.abs(result.cpu().numpy() - model_input(images, resolution)).max() <= 2e-5
    spec = spec_of(GRAY, resolution)
    assert not NO_AUGMENTATION
    assert torch.equal(
        build_transform(spec, backend, device, 5, NO_AUGMENTATION)(images),
        build_transform(spec, backend, device, 5)(images),
    )


def test_strokes_and_boxes_are_done_before_the_images_are_moved(backend: str, device: torch.device) -> None:
    images = noise(COUNT, GRAY)
    augmentation = AFFINE.model_copy(update={"stroke": 0.8, "erase": 0.7, "erase_value": 99})
    params = drawn(augmentation, COUNT)
    changed = np.stack(
        [
            reference.change_stroke_width(image[..., 0], amount)
            for image, amount in zip(images, augmentation.stroke_amounts(params), strict=True)
        ]
    )
    hidden = np.zeros(COUNT, int)
    for number, (down, across, height, width) in enumerate(augmentation.erase_boxes(params)):
        tall, wide = round(height * 28), round(width * 28)
        top, left = int(down * (28 - tall + 1)), int(across * (28 - wide + 1))
        changed[number, top : top + tall, left : left + wide] = 99
        hidden[number] = tall * wide
    assert 0.5 < (hidden > 0).mean() < 0.9
    transform = build_transform(spec_of(GRAY, 40), backend, device, COUNT, augmentation)
    result = transform(images, params).cpu().numpy()
    moved = build_transform(spec_of(GRAY, 40), "torch", CPU, COUNT, AFFINE)
    expected = moved(changed.round().astype(np.uint8)[..., None], params).numpy()
    assert np.abs(result - expected).max() <= 1.5 / 255 + TOLERANCE
    # Of what is stored with rows and columns exchanged, the same part of the upright image is hidden.
    stored = np.ascontiguousarray(images.swapaxes(1, 2))
    exchanged = build_transform(spec_of(GRAY, 40, transposed=True), backend, device, COUNT, augmentation)(
        stored, params
    )
    assert np.abs(exchanged.cpu().numpy() - result).max() <= TOLERANCE


def test_a_box_on_the_contour_hides_a_piece_of_stroke(device: torch.device) -> None:
    images = np.zeros((200, 28, 20, 1), np.uint8)
    images[:-1, 5:20, 4:9] = 200
    images[:-1, 10:14, 9:16] = 180
    augmentation = Augmentation(erase=1, erase_area_min=0.02, erase_area_max=0.05, erase_at="contour")
    boxes = torch.from_numpy(augmentation.erase_boxes(drawn(augmentation, len(images)))).to(device)
    result = erase(torch.from_numpy(images).to(device), boxes, 77, on_contour=True, transposed=False).cpu().numpy()
    edge = contour_mask(foreground_mask(torch.from_numpy(images))).numpy()
    for image, found, around, (place, _, height, width) in zip(images, result, edge, boxes.tolist(), strict=True):
        contour = np.argwhere(around)
        if not len(contour):
            continue
        row, column = contour[int(place * len(contour))]
        tall, wide = round(height * 28), round(width * 20)
        top, left = row - tall // 2, column - wide // 2
        expected = image.copy()
        expected[max(0, top) : top + tall, max(0, left) : left + wide] = 77
        assert np.array_equal(found, expected)
        assert (around & (expected[..., 0] == 77)).any()
    assert edge[:-1].any(axis=(1, 2)).all()
    assert (result[-1] == 77).any(), "without ink it lies anywhere"


@pytest.mark.parametrize("kind", ["affine", "onto grey", "elastic", "colours moved"])
def test_pictures_of_any_size_are_moved_and_coloured_alike(device: torch.device, kind: str) -> None:
    images = [pixels(*size, 3) for size in SIZES]
    augmentation, spec = KINDS[kind], spec_of((None, None, 3), 24)
    params = drawn(augmentation, len(images))
    transform = build_transform(spec, "dali", device, len(images), augmentation)
    result = transform([as_array(picture(image)) for image in images], params).cpu().numpy()
    for number, image in enumerate(images):
        one = model_input(image[None], 24, "linear", False, (0.0,) * 3, (1.0,) * 3)
        one = reference.recoloured(one[0], augmentation, params, number) if augmentation.has_color_jitter else one[0]
        expected = reference.moved(one, (24, 24), (24, 24), augmentation, params, number)
        assert np.abs(result[number] - expected).max() <= TOLERANCE


@pytest.mark.parametrize("name", ["stroke", "erase", "crop_padding"])
def test_what_needs_raw_pixels_is_refused_for_picture_files(name: str) -> None:
    with pytest.raises(UserError, match=name) as caught:
        build_transform(spec_of((None, None, 3), 24), "dali", CPU, 4, Augmentation(**{name: 1}))
    assert "--size N" in caught.value.hint


# On the way to training.


@pytest.mark.parametrize("batch_size", [16, 300])
def test_batches_are_augmented_alike_on_any_number_of_ranks_and_from_any_step(store: Store, batch_size: int) -> None:
    augmentation = KINDS["elastic"].model_copy(update={"stroke": 0.5, "erase": 0.5})
    order = ShuffledBatchSampler(np.arange(len(store)), batch_size, 4, augmentation=augmentation)
    transform = build_transform(TransformSpec.of(store.manifest, 28), "torch", CPU, batch_size, augmentation)
    whole = [replace(batch, images=batch.images.clone()) for batch in Loader(store, order, transform, CPU).batches(2)]
    for first in (1, len(whole) - 1):
        assert_same(list(Loader(store, order, transform, CPU).batches(2, first)), whole[first:])
    ranks = [list(Loader(store, order, transform, CPU, rank=rank, world_size=3).batches(2)) for rank in range(3)]
    for number, batch in enumerate(whole):
        shares = torch.cat([batches[number].images for batches in ranks])
        # Matrix products of other sizes may round otherwise.
        assert float((shares - batch.images).abs().max()) <= 2e-5
    other = next(Loader(store, order, transform, CPU).batches(3)).images
    assert not torch.equal(other[: len(whole[0].images)], whole[0].images)


def test_each_image_gets_the_draws_of_its_place(store: Store) -> None:
    augmentation = KINDS["affine"]
    order = ShuffledBatchSampler(np.arange(len(store)), 64, 4, augmentation=augmentation)
    transform = build_transform(TransformSpec.of(store.manifest, 28), "torch", CPU, 64, augmentation)
    batches = list(Loader(store, order, transform, CPU).batches(1))
    for step in list(order.steps(1, 0, 1))[::5]:
        params = augmentation.sample_params(4, 1, step.step, slice(0, len(step.samples)))
        expected = transform(store.read(step.samples), params)
        assert float((batches[step.step].images - expected).abs().max()) <= 2e-5


def test_the_settings_are_those_of_the_pipeline() -> None:
    names = list(Augmentation.model_fields)
    assert list(AugmentConfig.model_fields) == names
    assert AugmentConfig().augmentation() == NO_AUGMENTATION
    values = dict.fromkeys(names, 1) | {"fill": 7, "erase_at": "contour"}
    values |= {"random_resized_crop": (0.1, 0.5), "auto_augment": "rand_augment"}
    assert AugmentConfig(**values).augmentation() == Augmentation(**values)


def test_the_numbers_of_an_image_have_room() -> None:
    assert [number.value for number in ParamIndex] == list(range(19))


@pytest.mark.parametrize(
    ("seed", "stream", "first"), [(0, 0, 0), (2**64 - 1, 2**63 + 12345, 4 * 77), (987654321, (1 << 59) + 7, 2**40)]
)
def test_words_of_a_gpu_are_those_of_numpy(device: torch.device, seed: int, stream: int, first: int) -> None:
    keys = np.array([[seed, stream, first // 4], [seed, stream, first // 4 + 16]], np.uint64).view(np.int64)
    found = philox_words(torch.from_numpy(keys).to(device), 64).cpu().numpy().view(np.uint64)
    assert np.array_equal(found.reshape(-1), random_keys(seed, stream, 128, first))


@pytest.mark.parametrize("sigma", [0.14, 0.5, 1.0])
def test_noise_of_a_gpu_is_that_of_a_cpu(device: torch.device, sigma: float) -> None:
    augmentation = Augmentation(elastic=0.1, elastic_sigma=sigma)
    steps = [augmentation.sample_params(2**64 - 3, 2, step, slice(3 * step, 3 * step + 9)) for step in range(3)]
    for params in (AugmentationParams.concatenate(steps), steps[0][2:5], steps[1][::2]):
        noise = elastic_noise(torch.from_numpy(params.noise_keys.view(np.int64)).to(device), params.noise_grid_size)
        assert np.array_equal(noise.cpu().numpy(), params.noise)


def test_images_and_parameters_may_be_on_the_device(backend: str, device: torch.device) -> None:
    augmentation = KINDS["elastic"].model_copy(update={"stroke": 0.8, "erase": 0.7, "brightness": 0.3})
    images, params = noise(COUNT, GRAY), drawn(augmentation, COUNT)
    transform = build_transform(spec_of(GRAY, 40), backend, device, COUNT, augmentation)
    expected = transform(images, params)
    sent = {name: torch.from_numpy(array).to(device) for name, array in transform.op_params(params).items()}
    assert torch.equal(transform(torch.from_numpy(images).to(device), sent), expected)
    # A GPU computes the noise from its keys.
    noise_keys = torch.from_numpy(params.noise_keys.view(np.int64)).to(device)
    keyed = {name: tensor for name, tensor in sent.items() if name != "noise"} | {"noise_keys": noise_keys}
    assert torch.equal(transform(torch.from_numpy(images).to(device), keyed), expected)
