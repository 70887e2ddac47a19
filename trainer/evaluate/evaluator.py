"""Evaluate a model on every sample of a split, once."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import nn

from pipeline.common.index_ranges import Positions
from pipeline.loader import Loader
from pipeline.transforms.build import build_transform, choose_backend
from pipeline.transforms.spec import TransformSpec
from shards import UserError
from shards.open import open_dataset_or_split
from shards.stores.base import Store
from trainer.checkpoint.trained_model import TrainedModel, load_trained_model
from trainer.config.schema import Config, TrainerConfig
from trainer.data.training_data import evaluation_loader
from trainer.evaluate.calibration import calibration_error
from trainer.evaluate.metrics import ClassificationMetrics, classification_report
from trainer.evaluate.tta import mean_logits
from trainer.models.precision import autocast, to_memory_format
from trainer.runtime.distributed import World
from trainer.runtime.profiler import DataWait
from trainer.runtime.signals import raise_if_signalled

_TOP = 5  # classes of the top-5 accuracy
_MAX_PENDING_LOGITS = 2**20  # 4 MB, `evaluate` makes several arrays of this size


@dataclass(frozen=True)
class ModelOutputs:
    """The logits of all samples of a split, in the order of `rows`."""

    rows: NDArray[np.int64]
    """[N], positions in the raw source."""
    labels: NDArray[np.int64]
    """[N], true classes."""
    logits: NDArray[np.float32]
    """[N, C]."""


@dataclass(frozen=True)
class Predictions:
    """The prediction for each sample, in the order of `rows`; the columns of `predictions.npz`."""

    rows: NDArray[np.int64]
    """[N], positions in the raw source."""
    labels: NDArray[np.int64]
    """[N], true classes."""
    predicted: NDArray[np.int64]
    """[N], predicted classes."""
    confidence: NDArray[np.float32]
    """[N], probability of the predicted class after temperature scaling."""
    uncalibrated: NDArray[np.float32]
    """[N], the same before temperature scaling."""


@dataclass(frozen=True)
class Evaluation:
    """Metrics of a model on a split."""

    metrics: ClassificationMetrics
    loss: float
    """Mean cross-entropy in nats, before temperature scaling."""
    temperature: float
    calibrated_loss: float
    """Mean cross-entropy in nats, after temperature scaling."""
    top5_accuracy: float | None
    """Fraction of the samples whose class is among the 5 largest logits; None with up to 5 classes."""
    predictions: Predictions
    seconds: float
    wait_seconds: float
    """The part of `seconds` that rank 0 waited for data."""

    def summary(self) -> dict[str, float | int]:
        """Return the metrics as `summary.json` holds them."""
        top5 = {} if self.top5_accuracy is None else {"top5_accuracy": self.top5_accuracy}
        return {**self.metrics.summary(), **top5, "loss": self.loss}

    def calibration(self) -> dict[str, float]:
        """Return calibration error and cross-entropy before and after temperature scaling."""
        predictions = self.predictions
        is_correct = predictions.predicted == predictions.labels
        return {
            "temperature": self.temperature,
            "ece_before": calibration_error(predictions.uncalibrated, is_correct),
            "ece": calibration_error(predictions.confidence, is_correct),
            "nll_before": self.loss,
            "nll": self.calibrated_loss,
        }


def evaluate(
    model: nn.Module,
    loader: Loader,
    settings: TrainerConfig,
    world: World,
    signals_received: Sequence[int] = (),
    *,
    temperature: float = 1.0,
    offsets: NDArray[np.float32] | None = None,
) -> Evaluation:
    """Evaluate a model on all batches of a loader. The metrics do not depend on the number of ranks.

    Args:
        model: Set to evaluation mode.
        loader: Evaluation loader of this rank.
        settings: Precision and test-time augmentation.
        world: The process group.
        signals_received: Signals that this process received.
        temperature: Divides the logits.
        offsets: [C], subtracted from the logits (see `trainer.evaluate.logit_adjustment`); None for zeros.

    Returns:
        The evaluation, on every rank.

    Raises:
        Interrupted: A rank received a signal; raised on all ranks.
    """
    start, classes = time.perf_counter(), loader.classes

    def predict(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if offsets is not None:
            logits = logits - torch.from_numpy(offsets)
        calibrated = logits / temperature
        uncalibrated, predicted = logits.softmax(dim=1).max(dim=1)
        losses = (F.cross_entropy(each, labels.long(), reduction="none") for each in (logits, calibrated))
        in_top5 = (logits.topk(min(_TOP, classes)).indices == labels[:, None]).any(dim=1)
        return predicted, calibrated.softmax(dim=1).amax(dim=1), uncalibrated, in_top5, *losses

    outputs = map_logits(predict, model, loader, settings, world, signals_received)
    if outputs is None:
        return world.broadcast_object(None)  # rank 0 sends its evaluation
    (rows, labels, predicted, confidence, uncalibrated, in_top5, *losses), wait_seconds = outputs
    loss, calibrated_loss = (float(torch.from_numpy(each).double().mean()) for each in losses)
    evaluation = Evaluation(
        metrics=ClassificationMetrics.of(labels, predicted, classes),
        loss=loss,
        temperature=temperature,
        calibrated_loss=calibrated_loss,
        top5_accuracy=float(in_top5.mean()) if classes > _TOP else None,
        predictions=Predictions(rows, labels, predicted, confidence, uncalibrated),
        seconds=time.perf_counter() - start,
        wait_seconds=wait_seconds,
    )
    return world.broadcast_object(evaluation)


def predict_logits(
    model: nn.Module, loader: Loader, settings: TrainerConfig, world: World, signals_received: Sequence[int] = ()
) -> ModelOutputs | None:
    """Compute the logits of all samples of a loader; see `map_logits`."""
    outputs = map_logits(lambda logits, _: (logits,), model, loader, settings, world, signals_received)
    return None if outputs is None else ModelOutputs(*outputs[0])


@torch.inference_mode()
def map_logits(
    function: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, ...]],
    model: nn.Module,
    loader: Loader,
    settings: TrainerConfig,
    world: World,
    signals_received: Sequence[int] = (),
) -> tuple[list[NDArray], float] | None:
    """Apply a function to the logits of all samples of a loader, which are never in memory all at once.

    The results do not depend on the number of ranks.

    Args:
        function: From logits float32 [n, C] and labels [n] to columns [n, ...]; both are on the CPU.
        model: Set to evaluation mode.
        loader: Evaluation loader of this rank.
        settings: Precision and test-time augmentation.
        world: The process group.
        signals_received: Signals that this process received.

    Returns:
        On rank 0 rows, labels and the columns of all samples, in the order of rows, and the seconds that it waited for
        data; None elsewhere.

    Raises:
        Interrupted: A rank received a signal; raised on all ranks.
    """
    model.eval()
    pending: list[tuple[torch.Tensor, ...]] = []
    # Allocated once: small tensors that stay between large ones that are freed would fragment the heap.
    columns: list[torch.Tensor] = []
    done = 0

    def flush() -> None:
        nonlocal done
        rows, labels, logits = (torch.cat(column).cpu() for column in zip(*pending, strict=True))
        pending.clear()
        results = rows, labels, *function(logits, labels)
        if not columns:
            columns.extend(each.new_empty((len(loader.sampler.samples), *each.shape[1:])) for each in results)
        for column, each in zip(columns, results, strict=True):
            column[done : done + len(rows)] = each
        done += len(rows)

    wait = DataWait(world.device)
    for batch in loader.batches():
        if signals_received:
            break
        wait.stop()
        logits = model_logits(model, batch.images, settings)
        # Cloned, as on a GPU they are part of a block that holds the raw images of the batch.
        pending.append((batch.source_index.clone(), batch.labels.clone(), logits))
        if sum(logits.numel() for *_, logits in pending) > _MAX_PENDING_LOGITS:
            flush()
        wait.start()
    raise_if_signalled(world, signals_received)
    if pending:
        flush()
    wait.update()
    local = [column[:done].numpy() for column in columns]
    columns.clear()
    gathered = [each for each in world.gather(local) if each]  # a rank may have no batch
    del local  # with several ranks, `gathered` has a copy
    if not world.is_main_process:
        return None
    order = np.argsort(np.concatenate([rows for rows, *_ in gathered]), kind="stable")
    results = []
    while gathered[0]:  # column by column, so that only one is in memory twice
        parts = [each.pop(0) for each in gathered]
        results.append((np.concatenate(parts) if len(parts) > 1 else parts[0])[order])
    rows, labels, *others = results
    return [rows, labels.astype(np.int64), *others], wait.seconds


def model_logits(model: nn.Module, images: torch.Tensor, settings: TrainerConfig) -> torch.Tensor:
    """Return the logits of a batch, float32 [n, C], with `trainer.test_time_augmentation`."""
    with autocast(settings, images.device):
        return mean_logits(model, to_memory_format(images, settings), settings.test_time_augmentation)


def loader_for(store: Store, trained: TrainedModel, world: World, samples: Positions | None = None) -> Loader:
    """Return a loader of images of a split, all by default, with the input transform of a trained model.

    Raises:
        UserError: The images have another number of channels.
    """
    manifest, config = store.manifest, trained.config
    if manifest.image_shape[2] != trained.channels:
        raise UserError(
            found=f"{manifest.name}/{manifest.split} with {manifest.image_shape[2]} channels",
            expected=f"{trained.channels}, as in the training data of the run",
            hint="name a packed data set of such images",
        )
    data = config.data
    spec = TransformSpec.of(manifest, data.final_resolution, data.interpolation, data.preprocessing())
    backend, _ = choose_backend(config.loader.backend, world.device.type, spec.encoded, falls_back=True)
    spec = spec.with_normalization(trained.mean, trained.std)
    transform = build_transform(spec, backend, world.device, config.loader.batch_size)
    return evaluation_loader(store, samples, transform, config, world)


def to_pixels(images: torch.Tensor, trained: TrainedModel) -> torch.Tensor:
    """Convert model input float32 [n, C, H, W] to pixels uint8 [n, H, W, C] on the CPU."""
    mean, std = (torch.tensor(values, device=images.device).view(-1, 1, 1) for values in (trained.mean, trained.std))
    return (images * std + mean).clamp(0, 1).mul(255).round().byte().permute(0, 2, 3, 1).contiguous().cpu()


def measurements(evaluation: Evaluation, network: nn.Module, config: Config) -> dict[str, Any]:
    """Return metrics, speed and size of a network, which need no training, under the keys of `summary.json`."""
    return {
        **evaluation.summary(),
        "calibration": evaluation.calibration(),
        "seconds": evaluation.seconds,
        "images_per_second": evaluation.metrics.samples / evaluation.seconds,
        "data_wait_share": evaluation.wait_seconds / evaluation.seconds,
        "resolution": config.data.final_resolution,
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
    }


def evaluate_run(run_dir: Path, shards: str, world: World) -> dict[str, Any]:
    """Evaluate the best checkpoint of a run on a packed data set.

    Args:
        run_dir: A run directory.
        shards: Directory or address of a packed data set (its test split) or of one split.
        world: The process group.

    Returns:
        The metrics, with the fields of `summary.json`, and `report`, those of each class as text.

    Raises:
        UserError: The data set has other classes, or one of both cannot be read.
    """
    trained = load_trained_model(run_dir)
    config = trained.config
    store = open_dataset_or_split(shards, "test")
    trained.check_classes(store.manifest, shards)
    loader = loader_for(store, trained, world)
    model = trained.build_model(world.device)
    evaluation = evaluate(model, loader, config.trainer, world, **trained.posthoc_kwargs())
    predictions = evaluation.predictions
    return {
        **measurements(evaluation, model, config),
        "tau": trained.tau,
        "epochs": config.trainer.epochs,
        "best_epoch": trained.epoch,
        "dataset": f"{store.manifest.name}/{store.manifest.split}",
        "report": classification_report(predictions.labels, predictions.predicted, trained.classes),
    }
