"""A training step on a simulated GPU: no operator mixes devices, and the host never waits for the GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT
from support import simulated_training
from support.simulated_gpu import GPU, DeviceError, simulated_gpu
from support.simulated_training import BASE, CLASSES, STEPS, train_epoch, training_on

from trainer.checkpoint.checkpointer import Checkpointer
from trainer.checkpoint.run_dir import RunDirectory
from trainer.checkpoint.trained_model import TrainedModel
from trainer.config.load import load
from trainer.config.schema import CheckpointConfig, ModelConfig
from trainer.loop import engine, nan_guard
from trainer.loop.state import Training
from trainer.models.factory import make_model
from trainer.runtime.distributed import AsyncFlags, World
from trainer.runtime.loggers.base import MetricLogger

VARIANTS = {
    "plain": ("mixup.prob=0", "loss.label_smoothing=0", "loss.class_weights=none", "trainer.ema_decay=null"),
    "mixup": ("mixup.cutmix_alpha=0",),
    "cutmix": ("mixup.mixup_alpha=0",),
    "inverse": ("loss.class_weights=inverse",),
    "effective": ("loss.class_weights=effective",),
    "accumulation": ("optim.grad_accumulation=2",),
    "tau": ("mixup.prob=0", "posthoc.tau=1"),
    "fp32": ("trainer.precision=fp32", "trainer.channels_last=false"),
    "fp16": ("trainer.precision=fp16", "optim.grad_accumulation=2"),
    "fp16 lion": ("trainer.precision=fp16", "optim.name=lion"),
    "profile": ("trainer.profile=true",),
    "adam": ("optim.name=adam",),
    "adamw": ("optim.name=adamw",),
    "lion": ("optim.name=lion",),
    "sgd": ("optim.name=sgd",),
    "lookahead": ("optim.name=sgd_lookahead",),
    "fp16 adan": ("trainer.precision=fp16", "optim.name=adan"),
    "schedule free": ("optim.name=schedule_free_adamw", "trainer.ema_decay=null", "loss.name=focal"),
    "bce": (
        "loss.name=bce",
        "model.name=test_efficientnet",
        "model.freeze=2",
        "optim.layer_decay=0.5",
        "optim.head_lr=1e-3",
    ),
    "dropout": ("model.drop_rate=0.2", "model.head_hidden=8"),
    "drop path": ("model.name=test_efficientnet", "model.drop_path_rate=0.2", "model.gray_input=repeated"),
}


@pytest.fixture(autouse=True)
def read_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nan_guard, "_READ_EVERY", 1)


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_step_waits_for_the_gpu(variant: str) -> None:
    with simulated_gpu() as gpu:
        training = training_on(gpu, *VARIANTS[variant])
        train_epoch(training)
    accumulation = training.config.optim.grad_accumulation
    assert training.state.updates == -(-STEPS // accumulation)
    assert gpu.operators["convolution_backward"] > 0
    assert all(each.device == GPU for each in [*training.state.model.parameters(), *training.state.model.buffers()])


@pytest.mark.slow  # seconds: the graph of the backward pass is interpreted
def test_gradient_checkpointing_does_not_wait_for_the_gpu() -> None:
    settings = ("model.name=test_efficientnet", "model.grad_checkpointing=true", "model.drop_rate=0.2")
    convolutions = []
    for options in (settings[:1], settings):
        with simulated_gpu() as gpu:
            train_epoch(training_on(gpu, *options))
        convolutions.append(gpu.operators["convolution"])
    assert convolutions[1] > 1.5 * convolutions[0], "the forward pass is computed again"


@pytest.mark.parametrize("read_every", [1, 2, 32])
@pytest.mark.parametrize("interval", [1, 2])
def test_logged_steps_do_not_wait_for_the_gpu(read_every: int, interval: int, monkeypatch: pytest.MonkeyPatch) -> None:
    class Steps(MetricLogger):
        def __init__(self) -> None:
            self.records: list[dict[str, Any]] = []

        def log_step(self, record: dict[str, Any]) -> None:
            self.records.append(record)

    monkeypatch.setattr(nan_guard, "_READ_EVERY", read_every)
    logger = Steps()
    with simulated_gpu() as gpu:
        train_epoch(training_on(gpu, f"logging.every_steps={interval}", "trainer.precision=fp16"), logger)
    assert [record["step"] for record in logger.records] == [*range(interval, STEPS + 1, interval)]
    assert all(record["gradient_norm"] == 0 for record in logger.records), "values are not simulated"


def teacher(side: int) -> TrainedModel:
    config = load(ROOT / "configs" / "quickstart.yaml", [*BASE, f"data.resolution={side}"])
    weights = make_model(config.model, 1, len(CLASSES)).state_dict()
    return TrainedModel(
        weights=weights,
        config=config,
        classes=CLASSES,
        data_identity="",
        image_shape=(16, 16, 1),
        mean=(0.3,),
        std=(0.4,),
        adapter_state={},
        epoch=1,
        tau=0.0,
        offsets=np.zeros(len(CLASSES), np.float32),
    )


@pytest.mark.parametrize("side", [16, 24])
def test_a_teacher_does_not_wait_for_the_gpu(side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = teacher(side)
    monkeypatch.setattr(TrainedModel, "load", lambda path: trained)
    with simulated_gpu() as gpu:
        train_epoch(training_on(gpu, "distillation.teacher=best.pt"))
    assert gpu.operators["_softmax"] == STEPS


def insert(monkeypatch: pytest.MonkeyPatch, fault: Any) -> None:
    """Call a function with the logits of every step."""
    compute = engine.compute_loss

    def spoiled(logits: torch.Tensor, *others: Any) -> torch.Tensor:
        fault(logits)
        return compute(logits, *others)

    monkeypatch.setattr(engine, "compute_loss", spoiled)


FAULTS = {
    "cpu": (lambda x: x.cpu(), "from cuda to cpu waits"),
    "item": (lambda x: x.sum().item(), "_local_scalar_dense reads"),
    "float": (lambda x: float(x.detach().sum()), "_local_scalar_dense reads"),
    "bool": (lambda x: bool(x.sum() > 0), "_local_scalar_dense reads"),
    "tolist": (lambda x: x.tolist(), "_local_scalar_dense reads"),
    "nonzero": (lambda x: x.nonzero(), "nonzero reads"),
    "mask": (lambda x: x[x > 0], "index by a mask"),
    "cpu tensor": (lambda x: x + torch.zeros(len(CLASSES)), r"add takes tensors of the GPU and of the CPU \[3\]"),
    "cpu index": (lambda x: x[torch.zeros(2, dtype=torch.int64)], "index copies its indices"),
    "new tensor": (lambda x: torch.tensor([1.0], device=x.device), "from cpu to cuda waits"),
    "pageable": (lambda x: torch.zeros(99999).to(x.device, non_blocking=True), "memory is not pinned"),
    "unpinned": (lambda x: torch.zeros(6, 3).copy_(x, non_blocking=True), "memory is not pinned"),
    "synchronize": (lambda x: torch.cuda.synchronize(), "synchronize waits"),
    "event": (lambda x: torch.cuda.current_stream().record_event().synchronize(), r"Event\.synchronize waits"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_wait_that_is_inserted_into_the_step_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fault, words = FAULTS[name]
    insert(monkeypatch, fault)
    with simulated_gpu() as gpu, pytest.raises(DeviceError, match=words):
        train_epoch(training_on(gpu))


def test_what_does_not_wait_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    def harmless(logits: torch.Tensor) -> None:
        _ = logits * torch.tensor(2.0)  # a scalar of the CPU
        pinned = torch.zeros(99999, pin_memory=True)
        pinned.copy_(pinned.to(GPU, non_blocking=True), non_blocking=True)
        torch.zeros(99999).pin_memory().to(GPU, non_blocking=True)

    insert(monkeypatch, harmless)
    with simulated_gpu() as gpu:
        train_epoch(training_on(gpu))


def test_a_check_of_all_weights_waits_once() -> None:
    with simulated_gpu() as gpu:
        model = make_model(ModelConfig(name="three_block_cnn"), 1, 3).to(GPU)
        gpu.waits.clear()
        assert nan_guard.all_finite(model.parameters())
    assert len(gpu.waits) == 1


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_not_finite_is_found(bad: float) -> None:
    weights = [torch.full((3, 2), 3e38), torch.zeros(2)]
    assert nan_guard.all_finite(weights)
    weights[0][1, 0] = bad
    assert not nan_guard.all_finite(weights)


@pytest.mark.parametrize(("rank", "saved"), [(0, [3, 5, 7]), (1, [])])
def test_ranks_save_each_checkpoint_once_when_rank_0_is_due(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int, saved: list[int]
) -> None:
    """As with several ranks, the flags of a step are known a step later."""
    flags: list[list[int]] = [[0, 0, 0]]
    found: list[int] = []
    monkeypatch.setattr(simulated_training, "STEPS", 7)
    monkeypatch.setattr(nan_guard.NonFiniteMonitor, "finish", lambda _: None)  # waits for the GPU, as it may here
    monkeypatch.setattr(engine.EpochMeter, "commit", lambda _: None)
    monkeypatch.setattr(AsyncFlags, "reduce", lambda _, *new: flags.append(list(new)) or flags[-2])
    with simulated_gpu() as gpu:
        training = training_on(gpu)
        training.world = World(rank, 1, GPU)
        settings = CheckpointConfig(every_minutes=1e-9 if rank else None, every_steps=2)
        checkpointer = Checkpointer(RunDirectory(tmp_path), settings, 0, True)
        monkeypatch.setattr(checkpointer, "_write", lambda *_: None)

        def save(training: Training, _: object) -> None:
            found.append(training.state.step)
            checkpointer.save({"step": training.state.step})

        monkeypatch.setattr(engine, "_save_checkpoint", save)
        train_epoch(training, checkpointer=checkpointer)
        checkpointer.finish()
    assert found == saved
