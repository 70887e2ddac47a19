"""Compare both transforms with a slow reference, and the reference with other libraries."""

from __future__ import annotations

import functools
import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from support.transform_reference import model_input, resize_axis

from pipeline.transforms import torch_backend
from pipeline.transforms.build import build_transform, choose_backend
from pipeline.transforms.export_module import TransformModule
from pipeline.transforms.ops.resize import resize_weights
from pipeline.transforms.preprocess import Preprocessing, Resolution
from pipeline.transforms.spec import Transform, TransformSpec
from pipeline.transforms.torch_backend import TorchTransform
from shards import UserError, open_split

RESOLUTIONS = (7, 9, 14, 20, 28, 31, 40, 56, 64, 84, 96, 112, 140, 224, "15x50", "31x20")
GRAY = (28, 28, 1)
RGB = (20, 31, 3)
# Of the pixel range. torch stays below 1e-6; DALI computes positions in float32, which costs up to about 4e-6 at
# sizes such as 31, where they are no round numbers.
TOLERANCE = 5e-6
BATCH = 70
CPU = torch.device("cpu")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture(params=["torch", "dali"])
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


def random_images(count: int, shape: tuple[int, int, int], seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng([seed, count, *shape]).integers(0, 256, (count, *shape), dtype=np.uint8)


def spec_of(
    shape: tuple[int, int, int], resolution: Resolution, interpolation: str = "linear", transposed: bool = False
) -> TransformSpec:
    channels = shape[2]
    return TransformSpec(shape, transposed, resolution, interpolation, (0.0,) * channels, (1.0,) * channels)


@functools.cache
def expected(
    count: int, shape: tuple[int, int, int], resolution: Resolution, interpolation: str, transposed: bool
) -> NDArray[np.float64]:
    zeros, ones = (0.0,) * shape[2], (1.0,) * shape[2]
    return model_input(random_images(count, shape), resolution, interpolation, transposed, zeros, ones)


def largest_error(result: torch.Tensor, reference: NDArray[np.float64]) -> float:
    assert result.shape == reference.shape
    return float(np.abs(result.cpu().numpy() - reference).max())


@pytest.mark.parametrize("transposed", [False, True], ids=["upright", "transposed"])
@pytest.mark.parametrize("shape", [GRAY, RGB], ids=["gray", "rgb"])
@pytest.mark.parametrize("interpolation", ["linear", "cubic", "lanczos", "nearest"])
@pytest.mark.parametrize("resolution", RESOLUTIONS)
def test_computes_the_reference(
    backend: str,
    device: torch.device,
    resolution: Resolution,
    interpolation: str,
    shape: tuple[int, int, int],
    transposed: bool,
) -> None:
    transform = build_transform(spec_of(shape, resolution, interpolation, transposed), backend, device, BATCH)
    result = transform(random_images(3, shape))
    assert result.dtype == torch.float32
    assert result.device.type == device.type
    assert largest_error(result, expected(3, shape, resolution, interpolation, transposed)) <= TOLERANCE


@pytest.mark.parametrize("transposed", [False, True], ids=["upright", "transposed"])
@pytest.mark.parametrize("resolution", [24, "15x50"])
def test_the_module_of_exported_models_computes_the_reference(resolution: Resolution, transposed: bool) -> None:
    module = TransformModule(spec_of(RGB, resolution, transposed=transposed))
    result = module(torch.from_numpy(random_images(3, RGB)))
    assert largest_error(result, expected(3, RGB, resolution, "linear", transposed)) <= TOLERANCE


@pytest.mark.parametrize("resolution", [11, 23, 50])
def test_rounding_does_not_choose_the_nearest_pixel(backend: str, device: torch.device, resolution: int) -> None:
    """At these sizes some pixels are as near to two others, and float32 alone would take now one, now the other."""
    result = build_transform(spec_of(GRAY, resolution, "nearest"), backend, device, BATCH)(random_images(3, GRAY))
    assert largest_error(result, expected(3, GRAY, resolution, "nearest", False)) <= TOLERANCE


@given(st.integers(1, 70), st.integers(1, 140), st.sampled_from(["linear", "cubic", "lanczos", "nearest"]))
def test_the_matrix_of_an_axis_is_the_reference_at_any_size(source: int, target: int, interpolation: str) -> None:
    matrix = resize_weights(source, target, interpolation)
    assert np.abs(matrix - resize_axis(np.eye(source), 0, target, interpolation)).max() < 1e-12


def test_ties_of_the_nearest_pixel_fall_upwards_at_every_size() -> None:
    """In float64 (r + 1/2) * source / target is at times an ulp below the whole number that it is."""
    for source in range(1, 70):
        for target in range(1, 140):
            chosen = resize_weights(source, target, "nearest").argmax(axis=1)
            assert np.array_equal(chosen, (2 * np.arange(target) + 1) * source // (2 * target)), (source, target)


@pytest.mark.parametrize("reorders_floats", [False, True])
@pytest.mark.parametrize("shape", [GRAY, (20, 31, 1), (1, 9, 1), RGB])
def test_images_are_turned_upright_as_bytes_or_as_floats(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int, int], reorders_floats: bool
) -> None:
    """Which of both is faster depends on the processor; the result does not."""
    monkeypatch.setattr(torch_backend, "_REORDERS_FLOATS", reorders_floats)
    transform = TorchTransform(spec_of(shape, "{1}x{0}".format(*shape), transposed=True), torch.device("cpu"))
    images = random_images(70, shape)
    for batch in (images, images[:1], images[1:34], images[::2]):
        upright = torch.from_numpy(batch.transpose(0, 3, 2, 1).astype(np.float32))
        assert torch.equal(transform(batch), upright * (1 / 255))


@pytest.mark.parametrize("resolution", [14, 28, 40])
@pytest.mark.parametrize("shape", [GRAY, RGB], ids=["gray", "rgb"])
def test_takes_batches_of_any_size_up_to_its_own(
    backend: str, device: torch.device, shape: tuple[int, int, int], resolution: int
) -> None:
    """DALI gets packs of up to 32 images; those that do not fill them are padded and cut off again."""
    transform = build_transform(spec_of(shape, resolution, transposed=True), backend, device, BATCH)
    for count in (1, 31, 33, 64, 70, 2):
        assert largest_error(
            transform(random_images(count, shape)), expected(count, shape, resolution, "linear", True)
        ) <= (TOLERANCE)


@pytest.mark.parametrize("resolution", [14, 28, 31, 112])
@pytest.mark.parametrize(
    ("shape", "mean", "std"),
    [(GRAY, (0.1736,), (0.3317,)), (RGB, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))],
    ids=["emnist", "cifar"],
)
def test_normalises_each_channel(
    backend: str,
    device: torch.device,
    resolution: int,
    shape: tuple[int, int, int],
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> None:
    spec = spec_of(shape, resolution, transposed=True).with_normalization(mean, std)
    images = random_images(5, shape)
    result = build_transform(spec, backend, device, BATCH)(images)
    assert largest_error(result, model_input(images, resolution, "linear", True, mean, std)) <= TOLERANCE / min(std)


def _graph_and_batch(backend: str, device: torch.device, resolution: int) -> tuple[Transform, NDArray[np.uint8]]:
    return build_transform(spec_of(GRAY, resolution, transposed=True), backend, device, BATCH), random_images(33, GRAY)


@pytest.mark.parametrize("resolution", [28, 40])
def test_leaves_the_callers_buffer_alone(backend: str, device: torch.device, resolution: int) -> None:
    transform, images = _graph_and_batch(backend, device, resolution)
    before = images.copy()
    transform(images)
    assert np.array_equal(images, before)


@pytest.mark.parametrize("resolution", [28, 40])
def test_a_result_outlives_later_calls_and_its_input(backend: str, device: torch.device, resolution: int) -> None:
    transform, images = _graph_and_batch(backend, device, resolution)
    first = transform(images)
    images[:] = 0
    for seed in range(1, 4):
        transform(random_images(33, GRAY, seed))
    assert largest_error(first, expected(33, GRAY, resolution, "linear", True)) <= TOLERANCE


def test_the_same_input_gives_the_same_bits(backend: str, device: torch.device) -> None:
    transform, images = _graph_and_batch(backend, device, 40)
    assert torch.equal(transform(images), transform(images))


@pytest.mark.parametrize(
    ("name", "kind", "dali", "chosen"),
    [
        ("auto", "cpu", True, "torch"),
        ("auto", "cuda", True, "dali"),
        ("auto", "cuda", False, "torch"),
        ("dali", "cpu", True, "dali"),
        ("torch", "cuda", True, "torch"),
        ("torch", "cpu", False, "torch"),
    ],
)
def test_chooses_the_backend(monkeypatch: pytest.MonkeyPatch, name: str, kind: str, dali: bool, chosen: str) -> None:
    _pretend_dali(monkeypatch, dali)
    backend, reason = choose_backend(name, kind, False)
    assert backend == chosen
    assert reason


def test_says_that_dali_is_missing_when_that_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    _pretend_dali(monkeypatch, there=False)
    assert "not installed" in choose_backend("auto", "cuda", False)[1]
    with pytest.raises(UserError) as caught:
        choose_backend("dali", "cpu", False)
    assert "nvidia-dali-cuda120" in caught.value.expected
    assert "loader.backend=torch" in caught.value.hint


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_a_trained_model_needs_dali_for_image_files_only(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    _pretend_dali(monkeypatch, there=False)
    assert choose_backend("dali", kind, False, falls_back=True)[0] == "torch"
    with pytest.raises(UserError) as caught:
        choose_backend("dali", kind, True, falls_back=True)
    assert caught.value.hint == "pip install nvidia-dali-cuda120"
    _pretend_dali(monkeypatch, there=True)
    assert choose_backend("dali", kind, False, falls_back=True)[0] == "dali"


def test_says_what_hides_dali(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "nvidia").mkdir()
    (tmp_path / "nvidia" / "__init__.py").touch()
    for name in [name for name in sys.modules if name.partition(".")[0] == "nvidia"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    backend, reason = choose_backend("auto", "cuda", False)
    assert backend == "torch"
    assert str(tmp_path / "nvidia" / "__init__.py") in reason
    sys.modules.pop("nvidia")


def _pretend_dali(monkeypatch: pytest.MonkeyPatch, there: bool) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if there else None)


@pytest.mark.parametrize("resolution", [0, -1, 4097, "28x0", "4097x1"])
def test_refuses_a_resolution_that_makes_no_image(synthetic_set: Path, resolution: Resolution) -> None:
    with pytest.raises(UserError, match=f"resolution={resolution}"):
        TransformSpec.of(open_split(synthetic_set, "train").manifest, resolution)


@pytest.mark.parametrize("resolution", [1, 4096])
def test_takes_the_smallest_and_the_largest_resolution(synthetic_set: Path, resolution: int) -> None:
    assert TransformSpec.of(open_split(synthetic_set, "train").manifest, resolution).resolution == resolution


def test_spec_of_a_pack_takes_shape_and_orientation_from_the_manifest(synthetic_set: Path) -> None:
    assert TransformSpec.of(open_split(synthetic_set, "train").manifest, 56, "cubic") == TransformSpec(
        image_shape=(28, 28, 1), transposed=True, resolution=56, interpolation="cubic", mean=(0.0,), std=(1.0,)
    )


def test_a_spec_alone_does_not_normalize() -> None:
    spec = TransformSpec(GRAY, False, 28)
    assert (spec.mean, spec.std, spec.interpolation) == ((0.0,), (1.0,), "linear")
    assert spec.preprocessing == Preprocessing()


@pytest.mark.parametrize(
    ("shape", "resolution", "needs_resize", "upsamples"),
    [
        (GRAY, 28, False, False),
        (GRAY, 29, True, True),
        (GRAY, 27, True, False),
        (RGB, 25, True, True),  # 625 pixels of 620
        (RGB, 24, True, False),
        ((28, 20, 1), 28, True, True),
        ((20, 28, 1), 28, True, True),
    ],
)
def test_a_spec_tells_how_the_size_changes(
    shape: tuple[int, int, int], resolution: int, needs_resize: bool, upsamples: bool
) -> None:
    for transposed in (False, True):
        spec = spec_of(shape, resolution, transposed=transposed)
        assert spec.input_size == (resolution, resolution)
        assert (spec.needs_resize, spec.upsamples) == (needs_resize, upsamples)
        assert spec.upright_size == (shape[:2] if not transposed else shape[1::-1])
        assert spec.can_warp_raw(fills_border=True) == (resolution >= max(shape[:2]))
        assert spec.can_warp_raw(fills_border=False) == (not needs_resize)
        assert not spec_of(shape, resolution, "cubic", transposed).can_warp_raw(fills_border=True)


def test_a_spec_of_rectangular_output_tells_how_the_size_changes() -> None:
    upright, transposed = spec_of((20, 31, 3), "20x31"), spec_of((20, 31, 3), "20x31", transposed=True)
    assert (upright.input_size, upright.needs_resize, upright.can_warp_raw(True)) == ((20, 31), False, True)
    assert (transposed.needs_resize, transposed.can_warp_raw(True)) == (True, False)
    assert not spec_of((20, 31, 3), "31x20", transposed=True).needs_resize
    assert [spec_of((20, 31, 3), size).upsamples for size in ("10x62", "10x63")] == [False, True]


@pytest.mark.parametrize(("shape", "resolution"), [(GRAY, 28), (GRAY, 112), (RGB, 56)])
def test_fused_batches_take_at_most_2_mib(shape: tuple[int, int, int], resolution: int) -> None:
    fused = build_transform(spec_of(shape, resolution), "torch", CPU, BATCH).max_fused_batch
    image_bytes = shape[2] * resolution * resolution * np.dtype(np.float32).itemsize
    assert fused * image_bytes <= 2 * 1024 * 1024 < (fused + 1) * image_bytes


# The reference itself, anchored to other libraries and to paper.


@pytest.mark.parametrize("resolution", [31, 40, 56, 112, 224])
@pytest.mark.parametrize("shape", [GRAY, RGB], ids=["gray", "rgb"])
def test_reference_enlarges_linearly_as_torch_does(shape: tuple[int, int, int], resolution: int) -> None:
    images = random_images(3, shape)
    planes = torch.from_numpy(images).permute(0, 3, 1, 2).double() / 255
    torchs = F.interpolate(planes, size=(resolution, resolution), mode="bilinear", align_corners=False)
    ours = model_input(images, resolution, mean=(0.0,) * shape[2], std=(1.0,) * shape[2])
    assert np.abs(ours - torchs.numpy()).max() < 1e-12


@pytest.mark.parametrize("resolution", [7, 9, 20, 31, 56, 112, 140])
def test_reference_takes_the_nearest_pixel_as_torch_does(resolution: int) -> None:
    images = random_images(3, GRAY)
    planes = torch.from_numpy(images).permute(0, 3, 1, 2).double() / 255
    torchs = F.interpolate(planes, size=(resolution, resolution), mode="nearest-exact")
    assert np.array_equal(model_input(images, resolution, "nearest"), torchs.numpy())


@pytest.mark.parametrize(
    ("interpolation", "pil", "tolerance"),
    # The kernels as DALI tabulates them lie within 1/32^2 / 8 * max|k''| = 6e-4 of the cubic itself, and of the Lanczos
    # kernel itself, at each tap.
    [
        ("linear", Image.Resampling.BILINEAR, 1e-6),
        ("cubic", Image.Resampling.BICUBIC, 3e-3),
        ("lanczos", Image.Resampling.LANCZOS, 3e-3),
    ],
)
@pytest.mark.parametrize("target", [9, 20, 40, 112])
def test_reference_agrees_with_pil_away_from_the_border(
    interpolation: str, pil: Image.Resampling, tolerance: float, target: int
) -> None:
    """PIL widens its kernels in the same way, but ignores what lies outside where DALI repeats the border."""
    line = np.random.default_rng(0).random((1, 60)).astype(np.float32)
    pils = np.asarray(Image.fromarray(line).resize((target, 1), pil))[0]
    ours = resize_axis(line.astype(np.float64), 1, target, interpolation)[0]
    inside = slice(target // 4, -(target // 4))
    assert np.abs(ours[inside] - pils[inside]).max() < tolerance


@pytest.mark.parametrize(
    ("interpolation", "line", "target", "by_hand"),
    [
        ("linear", [0, 8], 4, [0, 2, 6, 8]),
        # The triangle over two pixels, at 0.5 and 2.5: weights 1, 3, 3, 1 of 8, the border repeated.
        ("linear", [0, 4, 8, 16], 2, [(3 * 4 + 8) / 8, (4 + 3 * 8 + 4 * 16) / 8]),
        ("nearest", [1, 2, 3], 2, [1, 3]),
        ("nearest", [1, 2], 1, [2]),  # both are as near: the later one
        # At 1/4, 3/4, 5/4, 7/4 of a pixel the kernel is 111, 29, -9, -3 of 128, all at nodes of the table.
        ("cubic", [0, 0, 128, 0, 0], 10, [0, -3, -9, 29, 111, 111, 29, -9, -3, 0]),
    ],
)
def test_reference_gives_what_was_computed_by_hand(
    interpolation: str, line: list[float], target: int, by_hand: list[float]
) -> None:
    assert resize_axis(np.array(line, np.float64), 0, target, interpolation) == pytest.approx(by_hand, abs=1e-12)


def test_reference_gives_the_lanczos_kernel_that_was_computed_by_hand() -> None:
    """At quarters of a pixel, nodes of the table, all sines are those of multiples of 15 degrees: with a = sqrt(3) - 1
    and b = sqrt(3) + 1 the kernel at 1/4, 3/4 .. 11/4 is a, 2/9, -b/25, -b/49, 2/81, a/121, times 12 / pi^2."""
    a, b = 3**0.5 - 1, 3**0.5 + 1
    near = np.array([a, 2 / 9, -b / 25, -b / 49, 2 / 81])
    shares = near / (near.sum() + a / 121)
    resized = resize_axis(np.array([0, 0, 1, 0, 0], np.float64), 0, 10, "lanczos")
    assert resized == pytest.approx([*shares[::-1], *shares], abs=1e-12)


def test_reference_turns_transposed_images_upright() -> None:
    image = np.array([[[0], [51]], [[102], [255]]], np.uint8)[None]
    assert model_input(image, 2, transposed=True)[0, 0] == pytest.approx(np.array([[0, 0.4], [0.2, 1]]))
    assert model_input(image, 2, mean=(0.2,), std=(0.5,))[0, 0] == pytest.approx(np.array([[-0.4, 0], [0.4, 1.6]]))


@pytest.mark.parametrize("backend", ["dalii", "pytorch", "auto"])
def test_an_unknown_backend_is_refused(backend: str) -> None:
    with pytest.raises(UserError, match=f"backend='{backend}'"):
        build_transform(spec_of(GRAY, 8, "linear"), backend, torch.device("cpu"), BATCH)
