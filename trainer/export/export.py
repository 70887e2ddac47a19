"""Export a run's model, after comparing it with the trainer on test images.

    python -m trainer.export RUN --format onnx|safetensors|torch-export [--out FILE_OR_DIR] [--shards SHARDS]

onnx and torch-export contain everything between raw uint8 images as stored on disk and probabilities: preprocessing,
orientation, resize, normalization, model, post-hoc logit adjustment and temperature. safetensors contains the weights,
for timm or plain torch. A model card (README.md) is written beside the file.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from pipeline.transforms.spec import TransformSpec
from shards import Manifest, UserError
from shards.atomic import check_writable, created_directory, write_file
from shards.cli import command_parser
from shards.errors import quote
from trainer.checkpoint.completed_run import CompletedRun
from trainer.checkpoint.trained_model import TrainedModel
from trainer.evaluate.logit_adjustment import ProbabilityHead
from trainer.evaluate.tta import mean_logits
from trainer.export import formats, model_card, parity
from trainer.export.module import InferenceModule

SUFFIXES = {"onnx": ".onnx", "safetensors": ".safetensors", "torch-export": ".pt2"}
CARD = "README.md"
_CPU = torch.device("cpu")


def export(
    run: Path, format_name: str, out: Path | None = None, shards: str | None = None
) -> tuple[Path, parity.Parity]:
    """Write a run's model and its model card.

    Args:
        run: Run directory.
        format_name: A key of `SUFFIXES`.
        out: File or directory to write; RUN/export/FORMAT if None.
        shards: The run's data set, if it has moved.

    Returns:
        The file and its parity with the trainer.

    Raises:
        UserError: The run is not complete or cannot be exported, or the exported model differs from the trainer. No
            file is written then.
    """
    completed = CompletedRun.open(run)
    trained, data = completed.trained, completed.config.data
    target = _target(run, format_name, out)
    train, store = completed.data(shards)
    spec = TransformSpec.of(store.manifest, data.final_resolution, data.interpolation, data.preprocessing())
    spec = spec.with_normalization(trained.mean, trained.std)
    if spec.encoded and format_name != "safetensors":
        raise UserError(
            found=f"a run on images of different sizes, and --format {format_name}",
            expected="images of one size, the input of the exported graph",
            hint="--format safetensors; or pack the images at one size (python -m pipeline.shard ... --size N) and "
            "train on those",
        )
    if trained.members and format_name == "safetensors":
        raise UserError(
            found=f"{run}, an ensemble of {len(trained.members)} networks, and --format safetensors",
            expected="one network, whose weights the file holds",
            hint="--format onnx",
        )
    model = _build_model(trained)
    reference = parity.compute_reference(trained, model, store)
    metadata = export_metadata(completed, train, store.manifest)
    with created_directory(target.parent):
        content, probabilities = _export(format_name, trained, spec, reference, metadata)
        agreement = parity.compare(reference.probabilities, probabilities)
        card = model_card.Card(completed, metadata, train, store.manifest, format_name, target.name, content, agreement)
        write_file(target, content)
        write_file(target.with_name(CARD), card.render(model, reference) + "\n")
    return target, agreement


def _export(
    format_name: str,
    trained: TrainedModel,
    spec: TransformSpec,
    reference: parity.Reference,
    metadata: dict[str, Any],
) -> tuple[bytes, NDArray[np.float32]]:
    """Return the content of the file, and the probabilities of the model that is read back from it."""
    views, head = trained.config.trainer.test_time_augmentation, ProbabilityHead(**trained.posthoc_kwargs())
    if format_name == "safetensors":
        zeros = {name: torch.zeros_like(tensor) for name, tensor in trained.weights.items()}
        loaded = _build_model(replace(trained, weights=zeros))
        content = formats.to_safetensors(_build_model(trained), loaded, metadata)
        with torch.inference_mode():
            return content, head(mean_logits(loaded.eval(), reference.inputs, views)).numpy()
    module = InferenceModule(spec, _build_model(trained), views, head).eval()
    to_format = formats.to_onnx if format_name == "onnx" else formats.to_torch_export
    assert isinstance(reference.images, np.ndarray)
    _, height, width, channels = reference.images.shape
    exported = to_format(module, (height, width, channels), metadata)
    # A graph that is traced with a fixed batch size fails on the others.
    batches = [batch for batch in np.split(reference.images, (1, 3)) if len(batch)]
    return exported.content, np.concatenate(list(map(exported.predict, batches)))


def _build_model(trained: TrainedModel) -> nn.Module:
    return trained.build_model(_CPU).requires_grad_(False).to(memory_format=torch.contiguous_format)


def export_metadata(run: CompletedRun, train: Manifest, test: Manifest) -> dict[str, Any]:
    """Collect all that a program needs to use the model, as plain values that the file contains."""
    config, trained = run.config, run.trained
    return {
        "classes": list(trained.classes),
        "image_shape": list(trained.image_shape),  # height, width, channels of a raw image
        "transposed": test.transposed,  # whether raw images have rows and columns exchanged
        "preparation": list(config.data.preprocessing().steps),  # on raw images, before all other steps
        "resolution": config.data.final_resolution,
        "interpolation": config.data.interpolation,
        "mean": list(trained.mean),
        "std": list(trained.std),
        "temperature": trained.temperature,
        "offsets": trained.offsets.tolist() if trained.offsets.any() else None,
        "test_time_augmentation": config.trainer.test_time_augmentation,
        "model": config.model.name,
        "run": config.run.name,
        "dataset": test.name,
        "data_sha256": {split.split: split.digest() for split in (train, test)},
        "checkpoint_sha256": run.checkpoint_sha256(),
        "versions": run.environment["packages"],
    }


def _target(run: Path, format_name: str, out: Path | None) -> Path:
    """Return the file to write, whose directory may not exist yet."""
    suffix = SUFFIXES[format_name]
    out = out or run / "export" / format_name
    target = out if out.suffix == suffix else out / f"model{suffix}"
    is_file = not out.is_dir() and (out.exists() or out.suffix in SUFFIXES.values())
    if out != target and is_file:
        raise UserError(
            found=f"--out {out} for --format {format_name}",
            expected=f"a directory, or a file that ends in {suffix}",
            hint=f"--out {quote(out.with_suffix(suffix))}",
        )
    card = target.with_name(CARD)
    if card.exists() and model_card.described_file(card) != target.name:
        raise UserError(
            found=f"{card}, which is not the card of {target.name}",
            expected="a directory without the README.md (model card) of another model",
            hint=f"--out {quote(target.parent / format_name)}",
        )
    if target.parent.exists():
        check_writable(target)
    return target


def main() -> int:
    """Run the command. Returns the exit status."""
    parser = command_parser("trainer.export", __doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory")
    parser.add_argument("--format", choices=tuple(SUFFIXES), required=True, help="file format")
    parser.add_argument("--out", type=Path, metavar="FILE_OR_DIR", help="file or directory (default RUN/export/FORMAT)")
    parser.add_argument("--shards", metavar="SHARDS", help="the run's data set, if it has moved")
    arguments = parser.parse_args()
    target, agreement = export(arguments.run, arguments.format, arguments.out, arguments.shards)
    print(
        f"{target}  {target.stat().st_size / 1e6:.1f} MB\n"
        f"{target.with_name(CARD)}\n"
        f"compared with the trainer: the same class for {agreement.same} of {agreement.samples} images, "
        f"probabilities within {agreement.difference:.1g} (tolerance {parity.TOLERANCE:g})"
    )
    return 0
