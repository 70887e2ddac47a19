"""The formats of an exported model: how each is written, and how its answers are read back for comparison."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from shards.errors import UserError
from trainer.export.module import InferenceModule

Answers = Callable[[NDArray[np.uint8]], NDArray[np.float32]]
"""Raw images uint8 [N, H, W, C] to probabilities [N, classes]."""

METADATA = "inkstream.json"  # in a .pt2 file
_INPUT, _OUTPUTS = "images", ["probabilities", "logits"]
_ONNX_PACKAGES = ("onnx", "onnxruntime", "onnxscript")
_EXAMPLES = 2  # images that the model is traced with; of one image the tracer would take the number for fixed


@dataclass(frozen=True)
class Exported:
    """content: of the file. answers: of a model that was read back from these bytes."""

    content: bytes
    answers: Answers


def to_onnx(classifier: InferenceModule, image_shape: tuple[int, int, int], metadata: dict[str, Any]) -> Exported:
    """An ONNX graph (opset 20) from raw images to probabilities and logits. metadata: goes into its properties.

    Raises `UserError` if a package is missing.
    """
    if missing := [name for name in _ONNX_PACKAGES if importlib.util.find_spec(name) is None]:
        raise UserError(
            found=f"no package {missing[0]}",
            expected=f"{', '.join(_ONNX_PACKAGES)}, which --format onnx needs",
            hint="pip install 'inkstream[onnx]'",
        )
    import onnx
    import onnxruntime

    traced = _traced(classifier, image_shape)
    with _quiet():
        try:
            names = {"input_names": [_INPUT], "output_names": _OUTPUTS}
            program = torch.onnx.export(traced, **names, dynamo=True, verbose=False)
        except Exception as error:  # the exporter raises many kinds
            raise _refused(error, "onnx") from None
    assert program is not None
    proto = program.model_proto
    for value in (*proto.graph.input, *proto.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "N"
    onnx.helper.set_model_props(proto, as_text(metadata))
    content = proto.SerializeToString()
    onnx.checker.check_model(content)
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return Exported(content, lambda images: session.run(_OUTPUTS[:1], {_INPUT: images})[0])


def to_torch_export(
    classifier: InferenceModule, image_shape: tuple[int, int, int], metadata: dict[str, Any]
) -> Exported:
    """A `torch.export` program from raw images to probabilities and logits. metadata: a file within it."""
    content = io.BytesIO()
    torch.export.save(_traced(classifier, image_shape), content, extra_files={METADATA: json.dumps(metadata, indent=1)})
    content.seek(0)
    module = torch.export.load(content).module()
    return Exported(content.getvalue(), lambda images: module(torch.from_numpy(images))[0].numpy())


def to_safetensors(model: nn.Module, rebuilt: nn.Module, metadata: dict[str, Any]) -> bytes:
    """The weights alone. rebuilt: a model of the same form, which takes its weights from what was written."""
    from safetensors.torch import load, save

    content = save({name: each.contiguous() for name, each in model.state_dict().items()}, as_text(metadata))
    rebuilt.load_state_dict(load(content))
    return content


def as_text(metadata: dict[str, Any]) -> dict[str, str]:
    """Each value as it is if it is text, else as JSON."""
    return {name: each if isinstance(each, str) else json.dumps(each) for name, each in metadata.items()}


def _traced(classifier: InferenceModule, image_shape: tuple[int, int, int]) -> torch.export.ExportedProgram:
    """The classifier as a graph of tensor operations, for any number of images."""
    example = torch.zeros((_EXAMPLES, *image_shape), dtype=torch.uint8)
    try:
        return torch.export.export(classifier, (example,), dynamic_shapes=({0: torch.export.Dim("N")},))
    except Exception as error:  # the tracer raises many kinds
        raise _refused(error, "torch-export") from None


def _refused(error: Exception, form: str) -> UserError:
    reason = next((line for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__)
    return UserError(
        found=f"a model that cannot be written as {form}: {reason.strip()}",
        expected="one whose every step is known to the format, for any number of images",
        hint="--format safetensors, for the weights alone",
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's remarks, which are about its own insides."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)
