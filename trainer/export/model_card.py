"""The model card beside an exported model: what it is, how it is used, what it learned from, how good it is."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub import EvalResult, ModelCardData
from torch import nn

from shards import Manifest
from trainer.checkpoint.completed_run import CompletedRun
from trainer.config.schema import BUILTIN_MODELS
from trainer.evaluate.metrics import ConfusionMatrix
from trainer.export.parity import TOLERANCE, Parity, Reference
from trainer.models.factory import pretrained_license

_TEMPLATE = Path(__file__).with_name("model_card.md.j2")
_MARK = re.compile(r"<!-- the card of (.+), by python -m trainer.export -->")
_WORST = 8  # pairs of classes that are most often confused
# Of `torch.nn.functional.interpolate`; close to the pipeline's own inside, and at the border where images grow.
_RESIZE = {
    "linear": {"mode": "bilinear", "antialias": True},
    "cubic": {"mode": "bicubic", "antialias": True},
    "nearest": {"mode": "nearest-exact"},
}


@dataclass(frozen=True)
class Card:
    """What a card is about. metadata: as inside the file. train, test: manifests.
    form, file: the format and name of the file. parity: how it compares with the trainer."""

    run: CompletedRun
    metadata: dict[str, Any]
    train: Manifest
    test: Manifest
    form: str
    file: str
    parity: Parity

    def render(self, sha256: str, size: int, model: nn.Module, reference: Reference) -> str:
        """The card as Markdown. sha256, size: of the file. model: the run's, for its form."""
        environment = jinja2.Environment(
            loader=jinja2.FileSystemLoader(_TEMPLATE.parent),
            trim_blocks=True,
            lstrip_blocks=True,
            keep_trailing_newline=True,
            undefined=jinja2.StrictUndefined,
        )
        environment.filters["percent"] = lambda share: f"{100 * share:.2f} %"
        classes, settings = self.run.trained.classes, self.run.config.model
        predictions = np.load(self.run.directory.predictions)
        confusion = ConfusionMatrix.of(predictions["labels"], predictions["predicted"], len(classes))
        return environment.get_template(_TEMPLATE.name).render(
            file=self.file,
            form=self.form,
            size=size,
            sha256=sha256,
            meta=self.metadata,
            config=self.run.config,
            settings=self.run.directory.config.read_text(),
            environment=self.run.environment,
            summary=self.run.summary,
            parts=[self.train, self.test],
            raw={file.name: file for part in (self.train, self.test) for file in part.raw}.values(),
            confused=[(classes[true], classes[said], count) for true, said, count in confusion.most_confused(_WORST)],
            parity=self.parity,
            tolerance=TOLERANCE,
            recorded=recorded_agreement(predictions, reference),
            front_matter=self._front_matter().to_yaml(),
            publisher="torchvision" if settings.name in BUILTIN_MODELS else "timm",
            licence=pretrained_license(settings.name) if settings.pretrained else None,
            timm_alone=self._timm_alone,
            network=settings.model_dump(mode="json", exclude_defaults=True, exclude={"pretrained", "init_checkpoint"}),
            resize=_RESIZE.get(self.run.config.data.interpolation),
            plain=self._plain(model, reference) if self._has_plain else None,
        )

    def _front_matter(self) -> ModelCardData:
        """The metadata that the Hugging Face Hub reads, with the results on the test part."""
        figures = (
            ("accuracy", "accuracy", self.run.summary["accuracy"]),
            ("f1", "macro F1", self.run.summary["macro_f1"]),
            ("f1", "weighted F1", self.run.summary["weighted_f1"]),
        )
        return ModelCardData(
            model_name=self.run.config.run.name,
            pipeline_tag="image-classification",
            library_name=None if self.run.config.model.name in BUILTIN_MODELS else "timm",
            tags=["image-classification", "inkstream"],
            metrics=["accuracy", "f1"],
            eval_results=[
                EvalResult(
                    task_type="image-classification",
                    dataset_type=self.test.name,
                    dataset_name=self.test.name,
                    dataset_split="test",
                    metric_type=kind,
                    metric_name=name,
                    metric_value=value,
                )
                for kind, name, value in figures
            ],
        )

    @property
    def _timm_alone(self) -> bool:
        """Whether the weights fit what `timm.create_model` makes, without any of our changes."""
        settings = self.run.config.model
        repeats = settings.gray_input == "repeated" and self.run.trained.channels == 1
        return not (settings.name in BUILTIN_MODELS or settings.head_hidden or settings.stem_stride or repeats)

    @property
    def _has_plain(self) -> bool:
        """Whether a few lines of torch bring raw images to what the weights alone take."""
        known = self.metadata["interpolation"] in _RESIZE and not self.metadata["preparation"]
        return self.form == "safetensors" and not self.test.encoded and known

    def _plain(self, model: nn.Module, reference: Reference) -> Parity:
        """How the card's own few lines of preprocessing compare with the trainer's."""
        found = plain_probabilities(self.metadata, model, reference)
        same = int((found.argmax(axis=1) == reference.probabilities.argmax(axis=1)).sum())
        return Parity(len(found), same, float(np.abs(found - reference.probabilities).max()))


@torch.inference_mode()
def plain_probabilities(metadata: dict[str, Any], model: nn.Module, reference: Reference) -> np.ndarray:
    """[n, classes], by what the card of the safetensors format shows."""
    assert isinstance(reference.images, np.ndarray)
    planes = torch.from_numpy(reference.images).permute(0, 3, 1, 2)
    mean, std = (torch.tensor(metadata[name]).view(1, -1, 1, 1) for name in ("mean", "std"))
    inputs = ((planes.mT if metadata["transposed"] else planes) / 255 - mean) / std
    side = metadata["resolution"]
    if inputs.shape[2:] != (side, side):
        inputs = F.interpolate(inputs, size=(side, side), **_RESIZE[metadata["interpolation"]])
    offsets = torch.tensor(metadata["offsets"]) if metadata["offsets"] else 0.0
    return ((model.eval()(inputs) - offsets) / metadata["temperature"]).softmax(dim=1).numpy()


def recorded_agreement(predictions: Any, reference: Reference) -> int:
    """Of the reference's samples, those with the class that the run's own test predicted, in the run's precision."""
    order = np.argsort(predictions["rows"])
    places = order[np.searchsorted(predictions["rows"][order], reference.rows)]
    return int((predictions["predicted"][places] == reference.probabilities.argmax(axis=1)).sum())


def subject(card: Path) -> str | None:
    """The file that a card is about; None if it is no card of ours."""
    found = _MARK.search(card.read_text(encoding="utf-8", errors="replace"))
    return found[1] if found else None
