"""Evaluation on a simulated GPU: the host waits for logits when they are read, not once per batch or view."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from support.simulated_gpu import GPU, simulated_gpu

from pipeline.loader import Batch
from trainer.config.load import load
from trainer.evaluate.evaluator import evaluate, predict_logits
from trainer.models.factory import make_model
from trainer.models.precision import memory_format
from trainer.runtime.distributed import World

SIZES = (6, 6, 5)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("views", ["none", "flip", "shifts", "shifts_flip", "shifts_scales"])
def test_no_batch_waits_for_the_gpu(views: str, channels: int) -> None:
    settings = [f"trainer.test_time_augmentation={views}", "trainer.precision=bf16"]
    config = load(ROOT / "configs" / "quickstart.yaml", ["model.name=three_block_cnn", *settings])
    with simulated_gpu() as gpu:
        model = make_model(config.model, channels, 3).to(GPU).to(memory_format=memory_format(config.trainer))

        def batches() -> Iterator[Batch]:
            for step, size in enumerate(SIZES):
                images = torch.empty(size, channels, 16, 16, device=GPU)
                labels, rows = (torch.zeros(size, dtype=torch.int64, device=GPU) for _ in range(2))
                with gpu.step():
                    yield Batch(images, labels, rows, step, size)

        loader = SimpleNamespace(batches=batches, classes=3, sampler=SimpleNamespace(samples=np.arange(sum(SIZES))))
        world = World(0, 1, GPU)
        gpu.waits.clear()
        evaluation = evaluate(model, loader, config.trainer, world, offsets=np.zeros(3, np.float32))
        assert len(gpu.waits) == 3, "rows, labels and logits, once for all batches"
        outputs = predict_logits(model, loader, config.trainer, world)
    assert outputs is not None
    assert outputs.logits.shape == (17, 3)
    assert evaluation.metrics.samples == 17


def test_logits_that_wait_keep_no_raw_images() -> None:
    config = load(ROOT / "configs" / "quickstart.yaml", ["model.name=three_block_cnn", "trainer.precision=fp32"])
    blocks = []

    def batches() -> Iterator[Batch]:
        for step, size in enumerate(SIZES):
            block = np.zeros(10_000, np.int64)  # labels, rows and raw images, as they are copied to a GPU
            blocks.append(weakref.ref(block))
            labels, rows = torch.from_numpy(block)[: 2 * size].split(size)
            del block
            yield Batch(torch.zeros(size, 1, 16, 16), labels, rows, step, size)
            del labels, rows
            assert sum(block() is not None for block in blocks) <= 1, "the one of the loop"

    loader = SimpleNamespace(batches=batches, classes=3, sampler=SimpleNamespace(samples=np.arange(sum(SIZES))))
    model = make_model(config.model, 1, 3)
    evaluate(model, loader, config.trainer, World(0, 1, torch.device("cpu")))
    assert len(blocks) == len(SIZES)
