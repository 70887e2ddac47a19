"""Formats of exported models: how each is written, and read back for comparison with the trainer."""

from __future__ import annotations

import importlib.util
import io
import json
import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from shards.errors import UserError
from trainer.export.module import InferenceModule

METADATA = "inkstream.json"  # in a .pt2 file
_INPUT, _OUTPUTS = "images", ["probabilities", "logits"]
_ONNX_PACKAGES = ("onnx", "onnxruntime", "onnxscript")
_TRACED_IMAGES = 2  # with one image the tracer would take the batch size for a constant


@dataclass(frozen=True)
class ExportedModel:
    """An exported model.

    Attributes:
        content: The file.
        predict: The model read back from `content`: raw images uint8 [N, H, W, C] to probabilities [N, classes].
    """

    content: bytes
    predict: Callable[[NDArray[np.uint8]], NDArray[np.float32]]


def to_onnx(module: InferenceModule, image_shape: tuple[int, int, int], metadata: dict[str, Any]) -> ExportedModel:
    """Export to ONNX (opset 20): raw images to probabilities and logits.

    Args:
        module: The model with pre- and postprocessing.
        image_shape: Height, width and channels of raw images.
        metadata: Properties of the ONNX model.

    Raises:
        UserError: A package is missing, or ONNX cannot express the model.
    """
    if missing := [name for name in _ONNX_PACKAGES if importlib.util.find_spec(name) is None]:
        raise UserError(
            found=f"no package {missing[0]}",
            expected=f"{', '.join(_ONNX_PACKAGES)}, which --format onnx needs",
            hint='pip install -e ".[onnx]"',
        )
    import onnx
    import onnxruntime

    traced = _trace(module, image_shape)
    # Silence the exporter, which warns about its own implementation.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(action="ignore"):
        try:
            program = torch.onnx.export(traced, input_names=[_INPUT], output_names=_OUTPUTS, dynamo=True, verbose=False)
        except Exception as error:  # the exporter raises many types of exceptions
            raise _unsupported(error, "onnx") from None
    assert program is not None
    proto = program.model_proto
    for value in (*proto.graph.input, *proto.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "N"
    onnx.helper.set_model_props(proto, as_text(metadata))
    content = proto.SerializeToString()
    onnx.checker.check_model(content)
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return ExportedModel(content, lambda images: session.run(_OUTPUTS[:1], {_INPUT: images})[0])


def to_torch_export(
    module: InferenceModule, image_shape: tuple[int, int, int], metadata: dict[str, Any]
) -> ExportedModel:
    """Export to a `torch.export` program: raw images to probabilities and logits.

    Args:
        module: The model with pre- and postprocessing.
        image_shape: Height, width and channels of raw images.
        metadata: Content of the extra file `METADATA`.

    Raises:
        UserError: torch.export cannot express the model.
    """
    content = io.BytesIO()
    torch.export.save(_trace(module, image_shape), content, extra_files={METADATA: json.dumps(metadata, indent=1)})
    content.seek(0)
    loaded = torch.export.load(content).module()
    return ExportedModel(content.getvalue(), lambda images: loaded(torch.from_numpy(images))[0].numpy())


def to_safetensors(model: nn.Module, loaded: nn.Module, metadata: dict[str, Any]) -> bytes:
    """Export the weights.

    Args:
        model: The model.
        loaded: A model of the same architecture, which loads the weights from the exported bytes.
        metadata: Metadata of the file.
    """
    from safetensors.torch import load, save

    content = save({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, as_text(metadata))
    loaded.load_state_dict(load(content))
    return content


def as_text(metadata: dict[str, Any]) -> dict[str, str]:
    """Convert values to text: strings unchanged, others to JSON."""
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in metadata.items()}


def _trace(module: InferenceModule, image_shape: tuple[int, int, int]) -> torch.export.ExportedProgram:
    """Trace the module with a dynamic batch size."""
    example = torch.zeros((_TRACED_IMAGES, *image_shape), dtype=torch.uint8)
    try:
        return torch.export.export(module, (example,), dynamic_shapes=({0: torch.export.Dim("N")},))
    except Exception as error:  # the tracer raises many types of exceptions
        raise _unsupported(error, "torch-export") from None


def _unsupported(error: Exception, format_name: str) -> UserError:
    reason = next((line for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__)
    return UserError(
        found=f"a model that cannot be written as {format_name}: {reason.strip()}",
        expected="a model whose operations the format supports for any batch size",
        hint="--format safetensors, for the weights alone",
    )
