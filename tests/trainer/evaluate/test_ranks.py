"""Evaluation shared among ranks, of which some have no batch."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT

from pipeline.loader import Loader
from pipeline.sampler import SequentialBatchSampler
from pipeline.transforms.build import build_transform
from pipeline.transforms.spec import TransformSpec
from shards import open_split
from trainer.config.load import load
from trainer.evaluate.evaluator import Evaluation, evaluate
from trainer.models.factory import make_model
from trainer.runtime.distributed import World

CPU = torch.device("cpu")


@dataclass(frozen=True)
class ThreadRank(World):
    """A rank that is a thread."""

    values: list[Any] = field(default_factory=list)
    barrier: threading.Barrier = field(default_factory=lambda: threading.Barrier(1))

    def gather(self, value: Any) -> list[Any]:
        values = self.all_gather(lambda: value)
        return values if self.is_main_process else []

    def all_gather(self, work: Callable[[], Any]) -> list[Any]:
        self.values[self.rank] = work()
        self.barrier.wait(60)
        values = list(self.values)
        self.barrier.wait(60)
        return values

    def broadcast_object(self, value: Any) -> Any:
        return self.all_gather(lambda: value)[0]


@pytest.mark.parametrize("batch_size", [25, 50, 100])
def test_the_metrics_do_not_depend_on_the_number_of_ranks(digits_set: Path, batch_size: int) -> None:
    """100 images of seven of ten classes, in fewer batches than there are ranks; the first ranks have none."""
    config = load(ROOT / "configs" / "quickstart.yaml", ["model.name=three_block_cnn", "trainer.precision=fp32"])
    store = open_split(digits_set, "test")
    spec = TransformSpec.of(store.manifest, 8)
    torch.manual_seed(0)
    model = make_model(config.model, 1, 10)
    samples = np.flatnonzero(np.isin(store.labels.take(np.arange(len(store))), range(7)))[:100]
    assert len(samples) == 100

    def run(ranks: int) -> Evaluation:
        values, barrier = [None] * ranks, threading.Barrier(ranks)

        def of_rank(rank: int) -> Evaluation:
            transform = build_transform(spec, "torch", CPU, batch_size)
            sampler = SequentialBatchSampler(samples, batch_size)
            loader = Loader(store, sampler, transform, CPU, rank=rank, world_size=ranks)
            return evaluate(model, loader, config.trainer, ThreadRank(rank, ranks, CPU, values, barrier))

        with ThreadPoolExecutor(ranks) as pool:
            evaluations = list(pool.map(of_rank, range(ranks)))
        assert all(evaluation is evaluations[0] for evaluation in evaluations)
        return evaluations[0]

    alone, shared = run(1), run(5)
    assert len(shared.metrics.correct) == 10
    assert shared.top5_accuracy is not None
    assert shared.summary() == alone.summary()
    assert shared.calibration() == alone.calibration()
    for name in ("rows", "labels", "predicted", "confidence", "uncalibrated"):
        np.testing.assert_array_equal(getattr(shared.predictions, name), getattr(alone.predictions, name))
