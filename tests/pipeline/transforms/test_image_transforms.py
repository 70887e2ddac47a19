"""Picture files through the transform: decoded, resized each from its own size, and named if they cannot be decoded."""

from __future__ import annotations

import importlib.util
import io

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from support.image_files import SIZES, as_array
from support.raw_files import picture, pixels
from support.synthetic_records import synthetic_file
from support.transform_reference import model_input

from pipeline.transforms.build import build_transform, choose_backend
from pipeline.transforms.spec import Transform, TransformSpec, UndecodableImage
from shards import UserError
from shards.stores.image_header import decode

dali_backend = pytest.importorskip("pipeline.transforms.dali_backend", reason="DALI is not installed")

# Of the pixel range. Positions in float32 are the less exact the larger the picture, and cost the more the steeper the
# kernel: 0.9e-5 for linear, 1.3e-5 for Lanczos; see test_graph.
TOLERANCE = 1.5e-5
BATCH = 16
CPU = torch.device("cpu")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


def spec_of(channels: int, resolution: int, interpolation: str = "linear", transposed: bool = False) -> TransformSpec:
    shape = (None, None, channels)
    return TransformSpec(shape, transposed, resolution, interpolation, (0.0,) * channels, (1.0,) * channels)


def graph_of(device: torch.device, channels: int = 3, resolution: int = 24, **options: object) -> Transform:
    return build_transform(spec_of(channels, resolution, **options), "dali", device, BATCH)


def random_images(channels: int) -> list[NDArray[np.uint8]]:
    return [pixels(*size, channels) for size in SIZES]


def expected(images: list[NDArray[np.uint8]], spec: TransformSpec) -> list[NDArray[np.float64]]:
    arguments = (spec.resolution, spec.interpolation, spec.transposed, spec.mean, spec.std)
    return [model_input(image[None], *arguments)[0] for image in images]


def largest_error(result: torch.Tensor, reference: list[NDArray[np.float64]]) -> float:
    assert len(result) == len(reference)
    return max(float(np.abs(one.cpu().numpy() - other).max()) for one, other in zip(result, reference, strict=True))


def assert_alike(one: torch.Tensor, other: torch.Tensor) -> None:
    """The same bits; on a GPU, where several decoders share a batch, three levels of 255."""
    assert one.shape == other.shape
    assert torch.equal(one, other) or (one.is_cuda and (one - other).abs().max() <= 3 / 255)


@pytest.mark.parametrize("channels", [1, 3], ids=["gray", "rgb"])
@pytest.mark.parametrize("interpolation", ["linear", "cubic", "lanczos", "nearest"])
@pytest.mark.parametrize("resolution", [16, 28, 50, 112])
def test_computes_the_reference_from_pictures_of_any_size(
    device: torch.device, resolution: int, interpolation: str, channels: int
) -> None:
    images = random_images(channels)
    spec = spec_of(channels, resolution, interpolation)
    result = build_transform(spec, "dali", device, BATCH)([as_array(picture(image)) for image in images])
    assert result.dtype == torch.float32
    assert result.device.type == device.type
    assert result.shape == (len(images), channels, resolution, resolution)
    assert largest_error(result, expected(images, spec)) <= TOLERANCE


def test_normalises_each_channel_and_turns_what_is_stored_transposed(device: torch.device) -> None:
    images = random_images(3)
    spec = spec_of(3, 31, transposed=True).with_normalization((0.49, 0.48, 0.45), (0.25, 0.24, 0.26))
    result = build_transform(spec, "dali", device, BATCH)([as_array(picture(image)) for image in images])
    assert largest_error(result, expected(images, spec)) <= TOLERANCE / min(spec.std)


@pytest.mark.parametrize("form", ["PNG", "BMP", "lossless WebP"])
@pytest.mark.parametrize("channels", [1, 3], ids=["gray", "rgb"])
def test_formats_without_loss_are_exact(device: torch.device, form: str, channels: int) -> None:
    """At their own size nothing is resized: what comes out are the stored values."""
    images = [pixels(24, 24, channels, seed) for seed in range(3)]
    options = {"lossless": True} if "WebP" in form else {}
    files = [as_array(picture(image, form.split()[-1], **options)) for image in images]
    result = graph_of(device, channels)(files)
    stored = np.stack(images).transpose(0, 3, 1, 2) / 255
    assert np.abs(result.cpu().numpy() - stored).max() < 1e-6


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
@pytest.mark.parametrize("channels", [1, 3], ids=["gray", "rgb"])
def test_jpeg_is_decoded_as_pillow_does_within_a_few_levels(
    device: torch.device, channels: int, subsampling: str
) -> None:
    """On a CPU to the last bit; nvJPEG on a GPU is allowed three levels of 255."""
    # Smooth, as photographs are: noise at the edge of what JPEG can hold is not what decoders agree on.
    image = Image.fromarray(pixels(6, 5, 3)).resize((24, 24), Image.Resampling.BICUBIC)
    image = image.convert("L" if channels == 1 else "RGB")
    content = picture(image, "JPEG", quality=90, **({"subsampling": subsampling} if channels == 3 else {}))
    result = graph_of(device, channels)([as_array(content)])[0].cpu().numpy().transpose(1, 2, 0)
    by_pillow = np.asarray(Image.open(io.BytesIO(content))).reshape(24, 24, channels)
    levels = np.abs(result * 255 - by_pillow).max()
    assert levels <= (1e-3 if device.type == "cpu" else 3)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16"])
@pytest.mark.parametrize("channels", [1, 3], ids=["gray", "rgb"])
def test_unusual_pictures_are_decoded_as_for_people(device: torch.device, mode: str, channels: int) -> None:
    """`shards.stores.image_header.decode` shows pictures in previews and reports, and must show what the model sees."""
    image = Image.fromarray(pixels(24, 24, 3))
    if mode == "I;16":
        image = Image.fromarray(np.random.default_rng(0).integers(0, 1 << 16, (24, 24), np.uint16))
    else:
        image = image.convert(mode)
    content = picture(image, "JPEG" if mode == "CMYK" else "PNG")
    result = graph_of(device, channels)([as_array(content)])[0].cpu().numpy().transpose(1, 2, 0)
    # From colours to gray they round differently.
    allowed = 3 if device.type == "cuda" else 1.001 if channels == 1 and mode in ("P", "RGBA", "CMYK") else 1e-3
    assert np.abs(result * 255 - decode(content, channels)).max() <= allowed


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_pictures_are_turned_as_exif_asks(device: torch.device, form: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(pixels(3, 4, 3)).resize((30, 22), Image.Resampling.BICUBIC)
    content = picture(image, form, exif=exif, **({"quality": 95} if form == "JPEG" else {}))
    spec = spec_of(3, 24)
    result = build_transform(spec, "dali", device, BATCH)([as_array(content)])
    assert largest_error(result, expected([decode(content, 3)], spec)) <= (TOLERANCE if device.type == "cpu" else 0.012)


def test_takes_batches_of_any_size_and_kinds_up_to_its_own(device: torch.device) -> None:
    transform = graph_of(device)
    files = [as_array(synthetic_file(number, number % 2).content) for number in range(BATCH)]
    alone = torch.cat([transform([file]) for file in files])
    for count in (BATCH, 1, 7, BATCH):
        assert_alike(transform(files[:count]), alone[:count])


def test_a_result_outlives_later_calls(device: torch.device) -> None:
    transform = graph_of(device)
    files = [as_array(synthetic_file(number, 0).content) for number in range(BATCH)]
    first = transform(files)
    before = first.clone()
    for _ in range(3):
        transform(files[::-1])
    assert torch.equal(first, before)


def test_a_batch_of_large_pictures_is_taken_in_several_runs(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [as_array(picture(pixels(*size, 3))) for size in SIZES]
    together = graph_of(device)(files)
    for most in (1, 900, 4000, 40 * 90, 1 << 20):
        monkeypatch.setattr(dali_backend, "_MAX_PIXELS", most)
        assert_alike(graph_of(device)(files), together)


@pytest.mark.parametrize(
    ("counts", "runs"),
    [
        ([3], [(0, 1)]),
        ([30], [(0, 1)]),
        ([5, 5, 5], [(0, 2), (2, 3)]),
        ([5, 6, 5, 30, 1], [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5)]),
        ([1] * 10, [(0, 10)]),
    ],
)
def test_runs_hold_as_many_pictures_as_fit(
    monkeypatch: pytest.MonkeyPatch, counts: list[int], runs: list[tuple[int, int]]
) -> None:
    monkeypatch.setattr(dali_backend, "_MAX_PIXELS", 10)
    assert [(run.start, run.stop) for run in dali_backend._runs(counts)] == runs


PNG, JPEG = picture(pixels(30, 30, 3)), picture(pixels(30, 30, 3), "JPEG")
DAMAGED = {
    "nothing": (b"", "an empty file"),
    "text": (b"hello, world", "no JPEG, PNG, WebP or BMP picture"),
    "a program": (b"\x7fELF" + bytes(200), "no JPEG, PNG, WebP or BMP picture"),
    "a GIF": (picture(pixels(9, 9, 1), "GIF"), "no JPEG, PNG, WebP or BMP picture"),
    "half a header": (PNG[:20], "ends inside its header"),
    "half a PNG": (PNG[: len(PNG) // 2], "cannot be decoded"),
    "half a JPEG": (JPEG[: len(JPEG) // 2], "cannot be decoded"),
    "a changed PNG": (PNG[:60] + bytes(20) + PNG[80:], "cannot be decoded"),
    "a bomb": (PNG[:16] + b"\0\1\0\0\0\1\0\0" + PNG[24:], "65536 x 65536"),
}


@pytest.mark.parametrize("position", [0, 3, 5])
@pytest.mark.parametrize("case", DAMAGED)
def test_a_picture_that_cannot_be_decoded_is_found_in_its_batch(
    device: torch.device, case: str, position: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    content, words = DAMAGED[case]
    good = [as_array(synthetic_file(number, 0).content) for number in range(6)]
    bad = [*good[:position], as_array(content) if content else np.empty(0, np.uint8), *good[position + 1 :]]
    monkeypatch.setattr(dali_backend, "_MAX_PIXELS", 4000)  # so that some lie in later runs
    transform = graph_of(device)
    before = transform(good)
    with pytest.raises(UndecodableImage) as caught:
        transform(bad)
    assert caught.value.position == position
    assert words in caught.value.reason
    assert_alike(transform(good), before)


def test_what_only_dali_cannot_decode_is_told_in_its_words(monkeypatch: pytest.MonkeyPatch) -> None:
    def fine(content: bytes, channels: int) -> NDArray[np.uint8]:
        return np.zeros((1, 1, channels), np.uint8)

    monkeypatch.setattr(dali_backend, "decode", fine)
    with pytest.raises(UndecodableImage) as caught:
        graph_of(CPU)([as_array(PNG[:60] + bytes(20) + PNG[80:])])
    assert caught.value.reason.startswith("DALI cannot decode the image: ")
    assert "\n" not in caught.value.reason


def test_a_failure_that_is_no_pictures_fault_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    transform = graph_of(CPU)
    assert isinstance(transform, dali_backend.DaliEncodedTransform)

    class Failing:
        def run(self, images: object) -> None:
            raise RuntimeError("out of memory")

    transform._pipeline = Failing()
    with pytest.raises(RuntimeError, match="out of memory"):
        transform([as_array(PNG)])
    assert transform([as_array(PNG)]).shape == (1, 3, 24, 24)


def test_a_gpu_without_memory_is_no_pictures_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    transform = graph_of(CPU)

    def run(**inputs: object) -> torch.Tensor:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(transform, "_run", run)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        transform([as_array(PNG)])


# Which backend.


@pytest.mark.parametrize("name", ["auto", "dali"])
@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_pictures_go_to_dali_on_any_device(name: str, kind: str) -> None:
    backend, reason = choose_backend(name, kind, True)
    assert backend == "dali"
    assert name == "dali" or "decodes" in reason


@pytest.mark.parametrize(("name", "there"), [("torch", True), ("torch", False), ("auto", False)])
def test_without_dali_pictures_are_refused_with_what_to_do(
    monkeypatch: pytest.MonkeyPatch, name: str, there: bool
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if there else None)
    spec = spec_of(3, 24)
    backend, _ = choose_backend(name, "cpu", True)
    with pytest.raises(UserError) as caught:
        build_transform(spec, backend, CPU, 8)
    assert "DALI" in caught.value.expected
    assert "nvidia-dali-cuda120" in caught.value.hint and "--size" in caught.value.hint
