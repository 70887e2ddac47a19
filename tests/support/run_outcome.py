"""What a run directory came to, and when two runs are the same."""

from __future__ import annotations

import json
from pathlib import Path

import torch

_CLOCKED = {"seconds", "images_per_second", "data_wait_share"}
_FIGURES = ("accuracy", "macro_f1", "weighted_f1", "samples", "loss", "epochs", "best_epoch", "validation")


def weights(directory: Path, name: str = "last.pt") -> dict[str, torch.Tensor]:
    return torch.load(directory / "checkpoints" / name, weights_only=True)["model"]


def history(directory: Path) -> list[dict]:
    """The epochs' records without what a clock decides."""
    records = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in record.items() if name not in _CLOCKED} for record in records]


def assert_same_weights(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def assert_same_run(first: Path, second: Path) -> None:
    """Weights, epochs and figures agree to the last bit."""
    for name in ("last.pt", "best.pt"):
        assert_same_weights(weights(first, name), weights(second, name))
    assert history(first) == history(second)
    summaries = [json.loads((directory / "summary.json").read_text()) for directory in (first, second)]
    assert [summaries[0][figure] for figure in _FIGURES] == [summaries[1][figure] for figure in _FIGURES]
