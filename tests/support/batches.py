"""Comparison of batches."""

from __future__ import annotations

import torch

from pipeline.loader import Batch


def assert_same(these: list[Batch], those: list[Batch]) -> None:
    assert len(these) == len(those) > 0
    for one, other in zip(these, those, strict=True):
        assert (one.step, one.global_size) == (other.step, other.global_size)
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.labels, other.labels)
        assert torch.equal(one.source_index, other.source_index)
