"""Evaluate a model on every sample of a split, once."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import nn

from pipeline.loader import Batch, Loader
from pipeline.transforms.build import build_transform, choose_backend
from pipeline.transforms.spec import TransformSpec
from shards import UserError
from shards.open import open_dataset_or_split
from shards.stores.base import Store
from trainer.checkpoint.trained_model import TrainedModel, load_trained_model
from trainer.config.schema import TrainerConfig
from trainer.data.training_data import evaluation_loader
from trainer.evaluate.calibration import calibration_error
from trainer.evaluate.metrics import ConfusionMatrix
from trainer.evaluate.tta import mean_logits
from trainer.models.precision import autocast, to_memory_format
from trainer.runtime.distributed import World
from trainer.runtime.signals import Interrupted


@dataclass(frozen=True)
class Predictions:
    """For every sample, in the order of rows: its row in the raw source, true class, predicted class (int64 [N]),
    and the probability float32 [N] of its prediction, at the temperature and as the model gave it."""

    rows: NDArray[np.int64]
    labels: NDArray[np.int64]
    predicted: NDArray[np.int64]
    confidence: NDArray[np.float32]
    uncalibrated: NDArray[np.float32]


@dataclass(frozen=True)
class Evaluation:
    """confusion: over all ranks. loss: mean cross-entropy in nats, of the logits that are decided by. predictions: on
    rank 0, None elsewhere.

    temperature: by which the logits were divided. calibrated_loss: the cross-entropy then.
    seconds, wait_seconds: how long it took on this rank, and how much of that it waited for data.
    """

    confusion: ConfusionMatrix
    loss: float
    temperature: float
    calibrated_loss: float
    predictions: Predictions | None
    seconds: float
    wait_seconds: float

    def summary(self) -> dict[str, float | int]:
        return {**self.confusion.summary(), "loss": self.loss}

    def calibration(self) -> dict[str, float]:
        """How well confidence tells accuracy before and after the temperature; on rank 0."""
        found = self.predictions
        assert found is not None
        correct = found.predicted == found.labels
        return {
            "temperature": self.temperature,
            "ece_before": calibration_error(found.uncalibrated, correct),
            "ece": calibration_error(found.confidence, correct),
            "nll_before": self.loss,
            "nll": self.calibrated_loss,
        }


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    loader: Loader,
    classes: int,
    settings: TrainerConfig,
    world: World,
    received: Sequence[int] = (),
    *,
    temperature: float = 1.0,
    offsets: NDArray[np.float32] | None = None,
) -> Evaluation:
    """Run a model over all batches of a loader; the same figures on any number of ranks.

    received: signals that came, which end it with `Interrupted` on every rank.
    offsets: [C], taken from the logits before all else (see `trainer.evaluate.logit_adjustment`); None for none.
    temperature: divides the logits before they become probabilities.
    """
    model.eval()
    rows, labels, predicted, confidence, uncalibrated = [], [], [], [], []
    loss = torch.zeros(2, dtype=torch.float64, device=world.device)
    taken = None if offsets is None else torch.from_numpy(offsets).to(world.device)
    wait_seconds = 0.0
    start = before = time.perf_counter()
    for batch in loader.batches():
        if received:
            break
        wait_seconds += time.perf_counter() - before
        logits = model_logits(model, batch, settings, world)
        if taken is not None:
            logits = logits - taken
        top = logits.softmax(dim=1).max(dim=1)
        calibrated = logits / temperature
        losses = [F.cross_entropy(each, batch.labels, reduction="sum") for each in (logits, calibrated)]
        loss += torch.stack(losses).double()
        rows.append(batch.source_index)
        labels.append(batch.labels)
        predicted.append(top.indices)
        confidence.append(calibrated.softmax(dim=1).amax(dim=1))
        uncalibrated.append(top.values)
        before = time.perf_counter()
    if world.all_reduce_max(len(received)):
        raise Interrupted
    mine = [_joined(parts) for parts in (rows, labels, predicted, confidence, uncalibrated)]
    confusion = ConfusionMatrix.of(mine[1].astype(np.int64), mine[2].astype(np.int64), classes)
    counts = world.sum(torch.from_numpy(confusion.counts)).numpy()
    mean_loss, calibrated_loss = (world.sum(loss.cpu()) / int(counts.sum())).tolist()
    gathered = _by_row(world.gather(mine))
    predictions = Predictions(*gathered) if gathered else None
    seconds = time.perf_counter() - start
    return Evaluation(
        ConfusionMatrix(counts), mean_loss, temperature, calibrated_loss, predictions, seconds, wait_seconds
    )


@torch.inference_mode()
def predict_logits(
    model: nn.Module, loader: Loader, settings: TrainerConfig, world: World, received: Sequence[int] = ()
) -> tuple[NDArray[np.float32], NDArray[np.int64]] | None:
    """A model's logits [N, C] for the samples of a loader and their labels [N], in the order of rows; on rank 0, None
    elsewhere. The same on any number of ranks.

    received: as in `evaluate`.
    """
    model.eval()
    rows, labels, logits = [], [], []
    for batch in loader.batches():
        if received:
            break
        rows.append(batch.source_index)
        labels.append(batch.labels)
        logits.append(model_logits(model, batch, settings, world))
    if world.all_reduce_max(len(received)):
        raise Interrupted
    gathered = _by_row(world.gather([_joined(parts) for parts in (rows, labels, logits)]))
    return (gathered[2], gathered[1]) if gathered else None


def model_logits(model: nn.Module, batch: Batch, settings: TrainerConfig, world: World) -> torch.Tensor:
    """float32 [n, classes], over the views of `trainer.test_time_augmentation`."""
    images = to_memory_format(batch.images, settings)
    with autocast(settings, world.device):
        return mean_logits(model, images, settings.test_time_augmentation)


def _by_row(gathered: list[list[NDArray]]) -> list[NDArray]:
    """Columns of all ranks together, in the order of the first one, the rows; nothing of nothing."""
    # A rank without a batch has empty columns of no width.
    full = [columns for columns in gathered if len(columns[0])]
    together = [np.concatenate(columns) for columns in zip(*full, strict=True)]
    return [column[np.argsort(together[0], kind="stable")] for column in together]


def _joined(parts: list[torch.Tensor]) -> NDArray:
    """One array of the batches' tensors, empty if this rank had no batch."""
    return torch.cat(parts).cpu().numpy() if parts else np.empty(0, np.int64)


def loader_for(store: Store, trained: TrainedModel, world: World) -> Loader:
    """The images of a part as a trained model takes them. Raises `UserError` for another number of channels."""
    manifest, config = store.manifest, trained.config
    if manifest.image_shape[2] != trained.channels:
        raise UserError(
            found=f"{manifest.name}/{manifest.split} with {manifest.image_shape[2]} channels",
            expected=f"{trained.channels}, as the run was trained on",
            hint="name a packed set of such images",
        )
    data = config.data
    spec = TransformSpec.of(manifest, data.final_resolution, data.interpolation, data.preprocessing())
    backend, _ = choose_backend(config.loader.backend, world.device, spec)
    spec = spec.with_normalization(trained.mean, trained.std)
    graph = build_transform(spec, backend, world.device, config.loader.batch_size)
    return evaluation_loader(store, np.arange(len(store)), graph, config, world)


def evaluate_run(run: Path, shards: str, world: World) -> dict[str, Any]:
    """The metrics of a run's best checkpoint on a packed set, as in `summary.json`."""
    trained = load_trained_model(run)
    config = trained.config
    store = open_dataset_or_split(shards, "test")
    if store.manifest.classes != trained.classes:
        raise UserError(
            found=f"{shards} with classes {' '.join(store.manifest.classes)}",
            expected=f"the classes of the run: {' '.join(trained.classes)}",
            hint="name a packed set of the same data set and split",
        )
    loader = loader_for(store, trained, world)
    model = trained.build_model(world.device)
    evaluation = evaluate(model, loader, len(trained.classes), config.trainer, world, **trained.posthoc_kwargs())
    return {
        **evaluation.summary(),
        "calibration": evaluation.calibration() if world.is_main_process else None,
        "tau": trained.tau,
        "epochs": config.trainer.epochs,
        "best_epoch": trained.epoch,
        "seconds": evaluation.seconds,
        "images_per_second": evaluation.confusion.samples / evaluation.seconds,
        "data_wait_share": evaluation.wait_seconds / evaluation.seconds,
        "resolution": config.data.final_resolution,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "dataset": f"{store.manifest.name}/{store.manifest.split}",
    }
