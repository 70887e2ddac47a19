"""Export a finished run's model, with a model card, after holding it against the trainer on real samples.

    python -m trainer.export RUN --format onnx|safetensors|torch-export [--out FILE_OR_DIR] [--shards SHARDS]

onnx and torch-export hold everything between raw uint8 images as they lie at rest and probabilities: orientation,
resize, normalisation, the model, its decision and temperature. safetensors holds the weights, for timm or plain torch.
"""

from __future__ import annotations

import argparse
import hashlib
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
from shards.cli import program_name, run_command
from trainer.checkpoint.completed_run import CompletedRun
from trainer.checkpoint.trained_model import TrainedModel
from trainer.evaluate.logit_adjustment import ProbabilityHead
from trainer.evaluate.tta import mean_logits
from trainer.export import formats as export_formats
from trainer.export import model_card, parity
from trainer.export.module import InferenceModule

SUFFIXES = {"onnx": ".onnx", "safetensors": ".safetensors", "torch-export": ".pt2"}
CARD = "README.md"
_CPU = torch.device("cpu")


def export(run: Path, form: str, out: Path | None = None, shards: str | None = None) -> tuple[Path, parity.Parity]:
    """Write a run's model and its card. form: a key of `SUFFIXES`. shards: where the run's packed set is now.

    Returns the file and how it compares with the trainer. Raises `UserError`, and then leaves no file.
    """
    finished = CompletedRun.open(run)
    config, trained = finished.config, finished.trained
    target = _target(run, form, out)
    train, store = finished.data(shards)
    data = config.data
    spec = TransformSpec.of(store.manifest, data.final_resolution, data.interpolation, data.preprocessing())
    spec = spec.with_normalization(trained.mean, trained.std)
    if spec.encoded and form != "safetensors":
        raise UserError(
            found=f"a run on picture files of differing sizes, and --format {form}",
            expected="images of one size, which a graph from raw images to probabilities begins with",
            hint="--format safetensors; or pack the pictures at one size (python -m pipeline.shard ... --size N) "
            "and train on those",
        )
    expected = parity.reference(config, spec, _model(trained), ProbabilityHead(**trained.posthoc_kwargs()), store)
    metadata = describe(finished, train, store.manifest)
    with created_directory(target.parent):
        content, found = _written(form, trained, spec, expected, metadata)
        agreement = parity.compare(expected.probabilities, found)
        card = model_card.Card(finished, metadata, train, store.manifest, form, target.name, agreement)
        page = card.render(hashlib.sha256(content).hexdigest(), len(content), _model(trained), expected)
        write_file(target, content)
        write_file(target.with_name(CARD), page)
    return target, agreement


def _written(
    form: str,
    trained: TrainedModel,
    spec: TransformSpec,
    expected: parity.Reference,
    metadata: dict[str, Any],
) -> tuple[bytes, NDArray[np.float32]]:
    """The content of the file, and the probabilities of a model that was read back from it."""
    views, decided = trained.config.trainer.test_time_augmentation, ProbabilityHead(**trained.posthoc_kwargs())
    if form == "safetensors":
        zeros = {name: torch.zeros_like(each) for name, each in trained.weights.items()}
        rebuilt = _model(replace(trained, weights=zeros))
        content = export_formats.to_safetensors(_model(trained), rebuilt, metadata)
        with torch.inference_mode():
            logits = mean_logits(rebuilt.eval(), expected.inputs, views)
        return content, decided(logits).numpy()
    classifier = InferenceModule(spec, _model(trained), views, decided).eval()
    write = export_formats.to_onnx if form == "onnx" else export_formats.to_torch_export
    exported = write(classifier, trained.image_shape, metadata)
    assert isinstance(expected.images, np.ndarray)
    answers = [exported.answers(expected.images[part]) for part in parity.parts(len(expected.images))]
    return exported.content, np.concatenate(answers)


def _model(trained: TrainedModel) -> nn.Module:
    """For use alone: without gradients, its kernels in the plain layout."""
    return trained.build_model(_CPU).requires_grad_(False).to(memory_format=torch.contiguous_format)


def describe(run: CompletedRun, train: Manifest, test: Manifest) -> dict[str, Any]:
    """What a program has to know to use the model, as plain values; it stands inside the file."""
    config, trained = run.config, run.trained
    offsets = trained.posthoc_kwargs()["offsets"]
    return {
        "classes": list(trained.classes),
        "image_shape": list(trained.image_shape),  # height, width, channels of a raw image
        "transposed": test.transposed,  # rows and columns are exchanged in a raw image
        "preparation": list(config.data.preprocessing().steps),  # of raw images, before anything else
        "resolution": config.data.final_resolution,
        "interpolation": config.data.interpolation,
        "mean": list(trained.mean),
        "std": list(trained.std),
        "temperature": trained.temperature,
        "offsets": offsets.tolist() if offsets.any() else None,
        "test_time_augmentation": config.trainer.test_time_augmentation,
        "model": config.model.name,
        "run": config.run.name,
        "dataset": test.name,
        "data_sha256": {"train": train.digest(), "test": test.digest()},
        "checkpoint_sha256": hashlib.sha256(run.directory.best.read_bytes()).hexdigest(),
        "versions": run.environment["packages"],
    }


def _target(run: Path, form: str, out: Path | None) -> Path:
    """The file to write; its directory may have to be made."""
    suffix = SUFFIXES[form]
    out = out or run / "export" / form
    target = out if out.suffix == suffix else out / f"model{suffix}"
    if out != target and out.exists() and not out.is_dir():
        raise UserError(
            found=f"--out {out} for --format {form}",
            expected=f"a directory, or a file that ends in {suffix}",
            hint=f"--out {out.with_suffix(suffix)}",
        )
    card = target.with_name(CARD)
    if card.exists() and model_card.subject(card) != target.name:
        raise UserError(
            found=f"{card}, which is not the card of {target.name}",
            expected="a place where a model card takes nothing away",
            hint=f"a directory of its own: --out {target.parent / form}",
        )
    if target.parent.exists():
        check_writable(target)
    return target


def main() -> int:
    parser = argparse.ArgumentParser(
        prog=program_name("trainer.export"),
        description="Export a finished run's model, held against the trainer on images of its test part.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="directory of a run")
    parser.add_argument("--format", choices=tuple(SUFFIXES), required=True, help="what to write")
    parser.add_argument("--out", type=Path, metavar="FILE_OR_DIR", help="where (default RUN/export/FORMAT)")
    parser.add_argument("--shards", metavar="SHARDS", help="the run's packed set, if it is elsewhere now")
    arguments = parser.parse_args()
    target, agreement = export(arguments.run, arguments.format, arguments.out, arguments.shards)
    print(
        f"{target}  {target.stat().st_size / 1e6:.1f} MB\n"
        f"{target.with_name(CARD)}\n"
        f"as the trainer: the same class for {agreement.same} of {agreement.samples} test images, probabilities within "
        f"{agreement.difference:.1g} (allowed {parity.TOLERANCE:g})"
    )
    return 0


if __name__ == "__main__":
    run_command(main)
