"""The weighted divergence is the formula of DESIGN, and class weights are what their names say."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from trainer.config.schema import LossConfig
from trainer.optim.losses import class_weights, log_priors, weighted_kl
from trainer.optim.mixup import soft_targets

BATCH, CLASSES = 7, 5


def random_logits(seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    return scale * torch.randn(BATCH, CLASSES, generator=torch.Generator().manual_seed(seed))


def random_targets(seed: int = 1) -> torch.Tensor:
    return torch.rand(BATCH, CLASSES, generator=torch.Generator().manual_seed(seed)).pow(3).softmax(dim=1)


def hard_targets() -> torch.Tensor:
    return soft_targets(torch.arange(BATCH) % CLASSES, CLASSES, smoothing=0.0)


WEIGHTS = torch.tensor([1.0, 2.0, 1.5, 0.25, 1.1])


def by_loops(logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> float:
    total = 0.0
    for z, t in zip(logits.double().tolist(), targets.double().tolist(), strict=True):
        normaliser = math.log(sum(math.exp(value) for value in z))
        for z_c, t_c, w_c in zip(z, t, weights.double().tolist(), strict=True):
            if t_c > 0:
                total += w_c * t_c * (math.log(t_c) - (z_c - normaliser))
    return total


@pytest.mark.parametrize("targets", [random_targets(), hard_targets()], ids=["soft", "with zeros"])
@pytest.mark.parametrize("weights", [torch.ones(CLASSES), WEIGHTS], ids=["unweighted", "weighted"])
def test_is_the_formula(targets: torch.Tensor, weights: torch.Tensor) -> None:
    logits = random_logits()
    loss = weighted_kl(logits, targets, weights)
    assert loss.shape == ()
    assert float(loss) == pytest.approx(by_loops(logits, targets, weights), rel=1e-5)


@pytest.mark.parametrize("targets", [random_targets(), hard_targets()], ids=["soft", "with zeros"])
def test_without_weights_it_is_torchs_batch_mean_times_the_batch(targets: torch.Tensor) -> None:
    logits = random_logits()
    torchs = torch.nn.KLDivLoss(reduction="batchmean")(F.log_softmax(logits, dim=1), targets)
    assert float(weighted_kl(logits, targets, torch.ones(CLASSES)) / BATCH) == pytest.approx(float(torchs), rel=1e-6)


def test_is_zero_where_the_model_says_the_targets() -> None:
    targets = random_targets()
    assert float(weighted_kl(targets.log() + 4, targets, WEIGHTS)) == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("targets", [random_targets(), hard_targets()], ids=["soft", "with zeros"])
def test_its_gradient_is_that_of_weighted_cross_entropy(targets: torch.Tensor) -> None:
    ours, torchs = random_logits().requires_grad_(), random_logits().requires_grad_()
    weighted_kl(ours, targets, WEIGHTS).backward()
    F.cross_entropy(torchs, targets, weight=WEIGHTS, reduction="sum").backward()
    assert torch.isfinite(ours.grad).all()
    assert torch.allclose(ours.grad, torchs.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scale", [1e-3, 100.0, 1e4])
def test_stays_finite_for_extreme_logits(scale: float) -> None:
    logits = random_logits(scale=scale).requires_grad_()
    loss = weighted_kl(logits, hard_targets(), WEIGHTS)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(logits.grad).all()


def test_is_computed_in_float32_whatever_the_model_computes_in() -> None:
    logits, targets = random_logits().bfloat16(), random_targets()
    loss = weighted_kl(logits, targets, WEIGHTS)
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(by_loops(logits, targets, WEIGHTS), rel=1e-5)


@pytest.mark.parametrize(
    ("kind", "counts", "by_hand"),
    [
        ("none", [10, 20, 70], [1, 1, 1]),
        ("inverse", [10, 20, 70], [100 / 30, 100 / 60, 100 / 210]),
        ("minmax", [10, 20, 70], [2, 1 + (1 / 20 - 1 / 70) / (1 / 10 - 1 / 70), 1]),
        # beta 1/2: (1 - b) / (1 - b^n) is 1, 2/3, 4/7 for n = 1, 2, 3; their mean is 47/63.
        ("effective", [1, 2, 3], [63 / 47, 42 / 47, 36 / 47]),
        ("inverse", [8, 8, 8], [1, 1, 1]),
        ("minmax", [8, 8, 8], [1, 1, 1]),
        ("effective", [8, 8, 8], [1, 1, 1]),
        ("inverse", [0, 1, 4], [1, 5 / 2, 5 / 8]),
        ("minmax", [0, 1, 4], [1, 2, 1]),
        ("minmax", [30, 31, 32], [2, 1 + (1 / 31 - 1 / 32) / (1 / 30 - 1 / 32), 1]),  # hardly different
        # 2/3 and 4/7, whose mean is 13/21; a class without samples takes no part.
        ("effective", [0, 2, 3], [1, 14 / 13, 12 / 13]),
    ],
)
def test_class_weights_are_what_was_computed_by_hand(kind: str, counts: list[int], by_hand: list[float]) -> None:
    weights = class_weights(np.array(counts), LossConfig(class_weights=kind, effective_beta=0.5))
    assert weights.dtype == torch.float32
    assert weights.tolist() == pytest.approx(by_hand, rel=1e-6)


def test_effective_weights_lie_between_none_and_inverse() -> None:
    """Cui et al. 2019: beta towards 0 weights nothing, towards 1 by inverse frequency."""
    counts = np.array([10, 20, 70])
    nearly_none = class_weights(counts, LossConfig(class_weights="effective", effective_beta=1e-9))
    assert nearly_none.tolist() == pytest.approx([1, 1, 1], rel=1e-6)
    nearly_inverse = class_weights(counts, LossConfig(class_weights="effective", effective_beta=1 - 1e-9))
    inverse = class_weights(counts, LossConfig(class_weights="inverse"))
    assert nearly_inverse.tolist() == pytest.approx((inverse / inverse.mean()).tolist(), rel=1e-5)


def test_log_priors_are_the_logarithms_of_the_shares() -> None:
    found = log_priors(np.array([1, 2, 5]))
    assert found.dtype == torch.float32
    assert found.tolist() == pytest.approx([math.log(1 / 8), math.log(2 / 8), math.log(5 / 8)], rel=1e-6)


def test_a_class_without_samples_has_the_prior_of_one_sample() -> None:
    assert log_priors(np.array([0, 3, 4])).tolist() == pytest.approx([math.log(n / 8) for n in (1, 3, 4)], rel=1e-6)
