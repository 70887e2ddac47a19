"""Every operator of a DALI pipeline for a GPU runs there. Pipelines are defined and not built, which needs no GPU."""

from __future__ import annotations

import itertools

import nvidia.dali.backend as dali
import nvidia.dali.fn as fn
import pytest
from nvidia.dali import Pipeline
from support.simulated_gpu import GPU, simulated_gpu

from benchmarks.training.device.image_channels import ImageChannelsTransform
from pipeline.transforms.augmentation import NO_AUGMENTATION, Augmentation
from pipeline.transforms.dali_backend import DaliEncodedTransform, DaliTransform
from pipeline.transforms.preprocess import Preprocessing
from pipeline.transforms.spec import TransformSpec

INTERPOLATIONS = ("linear", "cubic", "lanczos", "nearest")
AUGMENTATIONS = {
    "none": NO_AUGMENTATION,
    "warp": Augmentation(rotation=10, elastic=0.1),
    "colors": Augmentation(brightness=0.2, hue=10),
    "raw": Augmentation(stroke=1, erase=0.5, crop_padding=2),
}
RAW_OPS = Preprocessing(invert="auto", opening_radius=1, crop_to_foreground=0.1, equalize=True)
# Devices of operators that do not run on the GPU; a `mixed` one takes CPU memory and fills GPU memory. The others
# compute sizes of images, which the host knows.
DEVICES = {
    "decoders__Image": {"mixed"},
    "Shapes": {"cpu"},
    "_Shape": {"cpu"},
    "_TensorSubscript": {"cpu"},
    "_ArithmeticGenericOp": {"cpu"},
    "Stack": {"cpu"},
    "Constant": {"cpu"},
}


def operators_of(pipeline: Pipeline) -> dict[str, set[str]]:
    """The devices of each operator of a pipeline, by the name of its schema.

    Raises:
        AssertionError: An operator has no implementation for its device.
    """
    registered = {
        "cpu": set(dali.RegisteredCPUOps()),
        "gpu": set(dali.RegisteredGPUOps()),
        "mixed": set(dali.RegisteredMixedOps()),
    }
    pipeline._build_graph()
    devices: dict[str, set[str]] = {}
    for operator in pipeline._ops:
        name, device = operator._op.schema.Name(), operator._op.device
        assert name in registered[device], f"{name} has no implementation for {device}"
        devices.setdefault(name, set()).add(device)
    return devices


def gpu_pipeline(transform: type, spec: TransformSpec, augmentation: Augmentation = NO_AUGMENTATION) -> Pipeline:
    """The pipeline of a transform for a GPU, not built."""
    with simulated_gpu(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(Pipeline, "build", lambda pipeline: None)
        return transform(spec, GPU, 64, augmentation).define_pipeline()


def check(pipeline: Pipeline, files: bool = False) -> dict[str, set[str]]:
    found = operators_of(pipeline)
    expected = DEVICES | ({"ExternalSource": {"cpu"}} if files else {})
    assert found == {name: expected.get(name, {"gpu"}) for name in found}
    assert [output.device for output in pipeline._graph_outputs] == ["gpu"]
    assert pipeline.device_id == 0
    return found


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("augmentation", AUGMENTATIONS)
def test_raw_images_are_transformed_on_the_gpu(channels: int, augmentation: str) -> None:
    for resolution, interpolation, transposed, preprocessing in itertools.product(
        (14, 28, 56), INTERPOLATIONS, (False, True), (Preprocessing(), RAW_OPS)
    ):
        spec = TransformSpec((28, 28, channels), transposed, resolution, interpolation, preprocessing=preprocessing)
        spec = spec.with_normalization((0.5,) * channels, (0.25,) * channels)
        found = check(gpu_pipeline(DaliTransform, spec, AUGMENTATIONS[augmentation]))
        assert "CropMirrorNormalize" in found
        assert ("Transpose" in found) == transposed


@pytest.mark.parametrize("channels", [1, 3])
def test_images_as_channels_are_resized_on_the_gpu(channels: int) -> None:
    for resolution, transposed in itertools.product((14, 56), (False, True)):
        spec = TransformSpec((28, 28, channels), transposed, resolution)
        spec = spec.with_normalization((0.5,) * channels, (0.25,) * channels)
        assert {"Resize", "CropMirrorNormalize"} <= check(gpu_pipeline(ImageChannelsTransform, spec)).keys()


@pytest.mark.parametrize("channels", [1, 3])
def test_image_files_are_decoded_on_the_gpu(channels: int) -> None:
    for interpolation, transposed, augmentation in itertools.product(INTERPOLATIONS, (False, True), ("none", "warp")):
        spec = TransformSpec((None, None, channels), transposed, 56, interpolation)
        spec = spec.with_normalization((0.5,) * channels, (0.25,) * channels)
        found = check(gpu_pipeline(DaliEncodedTransform, spec, AUGMENTATIONS[augmentation]), files=True)
        assert {"decoders__Image", "CropMirrorNormalize", "Resize"} <= found.keys()


SPOILED = {
    "no implementation for the GPU": lambda images: fn.power_spectrum(images),
    "an input from the CPU": lambda images: fn.cat(images, fn.external_source(name="other"), device="gpu"),
    "an argument from the GPU": lambda images: fn.resize(images, size=images.gpu()),
    "on the CPU": lambda images: fn.copy(fn.external_source(name="other")),
}


@pytest.mark.parametrize("name", SPOILED)
def test_an_operator_that_does_not_run_on_the_gpu_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    normalize, spoil = DaliTransform._normalize, SPOILED[name]
    monkeypatch.setattr(DaliTransform, "_normalize", lambda transform, images: spoil(normalize(transform, images)))
    # DALI itself refuses inputs and arguments on the wrong device.
    with pytest.raises((AssertionError, RuntimeError, ValueError)):
        check(gpu_pipeline(DaliTransform, TransformSpec((28, 28, 1), False, 56)))
