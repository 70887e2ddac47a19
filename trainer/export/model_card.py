"""The model card beside an exported model: use, training data, results and license."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub import EvalResult, ModelCardData
from torch import nn

from pipeline.transforms.preprocess import input_size
from shards import Manifest
from shards.atomic import read_file
from trainer.checkpoint.completed_run import CompletedRun
from trainer.config.schema import BUILTIN_MODELS
from trainer.evaluate.metrics import most_confused
from trainer.evaluate.tta import VIEWS
from trainer.export.parity import TOLERANCE, Parity, Reference
from trainer.models.factory import pretrained_license, timm_options
from trainer.report.html import render

_MARK = re.compile(r"<!-- model card of (.+), written by python -m trainer.export -->")
_CONFUSIONS = 8
_MAX_CARD = 1 << 24  # bytes
# Options of `torch.nn.functional.interpolate`, equal to the pipeline's resize except at the border of enlarged images.
_INTERPOLATE: dict[str, dict[str, Any]] = {
    "linear": {"mode": "bilinear", "antialias": True},
    "cubic": {"mode": "bicubic", "antialias": True},
    "nearest": {"mode": "nearest-exact"},
}


@dataclass(frozen=True)
class Card:
    """Content of a model card.

    Attributes:
        run: The run.
        metadata: Metadata inside the exported file.
        train: Manifest of the training split.
        test: Manifest of the test split.
        format_name: Format of the file.
        file: Name of the file.
        content: Content of the file.
        parity: Comparison of the exported model with the trainer.
    """

    run: CompletedRun
    metadata: dict[str, Any]
    train: Manifest
    test: Manifest
    format_name: str
    file: str
    content: bytes
    parity: Parity

    def render(self, model: nn.Module, reference: Reference) -> str:
        """Render the card as Markdown.

        Args:
            model: The run's model.
            reference: Predictions of the trainer.
        """
        classes, settings, shape = self.run.trained.classes, self.run.config.model, self.metadata["image_shape"]
        predictions = self.run.predictions
        confusions = most_confused(predictions["labels"], predictions["predicted"], _CONFUSIONS)
        has_snippet = self._has_torch_preprocessing
        return render(
            "model_card.md.j2",
            Path(__file__).parent,
            card=self,
            sha256=hashlib.sha256(self.content).hexdigest(),
            views=VIEWS[self.run.config.trainer.test_time_augmentation],
            meta=self.metadata,
            size=input_size(self.metadata["resolution"]),
            upright_size=tuple(shape[1::-1] if self.test.transposed else shape[:2]),
            members=[Path(path).name for path in self.run.summary.get("members", [])],
            networks=sorted({member.config.model.name for member in self.run.trained.members}),
            timm_options=timm_options(settings, self.metadata["resolution"]),
            config=self.run.config,
            settings=self.run.directory.read_settings()[0],
            environment=self.run.environment,
            summary=self.run.summary,
            raw={file.name: file for split in (self.train, self.test) for file in split.raw}.values(),
            confusions=[(classes[label], classes[predicted], count) for label, predicted, count in confusions],
            tolerance=TOLERANCE,
            evaluated=self.run.config.data.evaluated,
            splits={split.split: split for split in (self.train, self.test)}.values(),
            front_matter=self._front_matter().to_yaml(),
            publisher="torchvision" if settings.name in BUILTIN_MODELS else "timm",
            license=pretrained_license(settings.name) if settings.pretrained else None,
            is_timm_model=self._is_timm_model,
            network=settings.model_dump(mode="json", exclude_defaults=True, exclude={"pretrained", "init_checkpoint"}),
            interpolate=_INTERPOLATE.get(self.run.config.data.interpolation),
            torch_parity=self._torch_parity(model, reference) if has_snippet else None,
        )

    def _front_matter(self) -> ModelCardData:
        """Metadata for the Hugging Face Hub, with the results on the test split."""
        results = (("accuracy", "accuracy"), ("f1", "macro F1"), ("f1", "weighted F1"))
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
                    dataset_split=self.test.split,
                    metric_type=metric,
                    metric_name=name,
                    metric_value=self.run.summary[name.lower().replace(" ", "_")],
                )
                for metric, name in results
            ],
        )

    @property
    def _is_timm_model(self) -> bool:
        """Whether the weights fit an unchanged model of `timm.create_model`."""
        settings = self.run.config.model
        repeats = settings.gray_input == "repeated" and self.run.trained.channels == 1
        return not (settings.name in BUILTIN_MODELS or settings.head_hidden or settings.stem_stride or repeats)

    @property
    def _has_torch_preprocessing(self) -> bool:
        """Whether the card shows preprocessing in a few lines of torch."""
        is_simple = self.metadata["interpolation"] in _INTERPOLATE and not self.metadata["preparation"]
        return self.format_name == "safetensors" and not self.test.encoded and is_simple

    @torch.inference_mode()
    def _torch_parity(self, model: nn.Module, reference: Reference) -> Parity:
        """Compare the torch code of the card with the trainer."""
        meta = self.metadata
        assert isinstance(reference.images, np.ndarray)
        planes = torch.from_numpy(reference.images).permute(0, 3, 1, 2)
        mean, std = (torch.tensor(meta[name]).view(1, -1, 1, 1) for name in ("mean", "std"))
        inputs = ((planes.mT if meta["transposed"] else planes) / 255 - mean) / std
        size = input_size(meta["resolution"])
        if inputs.shape[2:] != size:
            inputs = F.interpolate(inputs, size=size, **_INTERPOLATE[meta["interpolation"]])
        offsets = torch.tensor(meta["offsets"]) if meta["offsets"] else 0.0
        probabilities = ((model.eval()(inputs) - offsets) / meta["temperature"]).softmax(dim=1)
        return Parity.of(reference.probabilities, probabilities.numpy())


def described_file(card: Path) -> str | None:
    """Return the name of the file that a model card describes; None for other README files."""
    match = _MARK.search(read_file(card, _MAX_CARD).decode(errors="replace"))
    return match[1] if match else None
