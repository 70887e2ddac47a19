"""The weighted divergence is the formula of DESIGN, and class weights are what their names say."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from timm.loss import BinaryCrossEntropy
from torchvision.ops import sigmoid_focal_loss

from trainer.config.schema import LossConfig
from trainer.loop.engine import compute_loss
from trainer.optim.losses import class_weights, log_priors, weighted_bce, weighted_focal, weighted_kl
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


@pytest.mark.parametrize("targets", [random_targets(), hard_targets()], ids=["soft", "with zeros"])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_focal_is_the_formula(targets: torch.Tensor, gamma: float) -> None:
    """Lin et al. 2017 for each class of a softmax, in NumPy."""
    logits = random_logits()
    z = logits.double().numpy()
    p = np.exp(z) / np.exp(z).sum(axis=1, keepdims=True)
    expected = -(WEIGHTS.numpy() * targets.numpy() * (1 - p) ** gamma * np.log(p)).sum()
    assert float(chosen("focal", logits, targets, gamma)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("gamma", [0.5, 2.0])
def test_focal_of_two_classes_is_torchvisions(gamma: float) -> None:
    """A softmax of two logits is the sigmoid of their difference."""
    logits, labels = random_logits()[:, :2], torch.arange(BATCH) % 2
    expected = sigmoid_focal_loss(logits[:, 1] - logits[:, 0], labels.float(), alpha=-1, gamma=gamma, reduction="sum")
    found = weighted_focal(logits, soft_targets(labels, 2, 0.0), torch.ones(2), gamma)
    assert float(found) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_focal_has_a_finite_gradient_where_the_model_is_certain(gamma: float) -> None:
    logits = torch.tensor([[200.0, 0, 0, 0, 0], [-200.0, 0, 0, 0, 0]], requires_grad=True)
    targets = soft_targets(torch.tensor([0, 0]), CLASSES, 0.0)
    weighted_focal(logits, targets, torch.ones(CLASSES), gamma).backward()
    assert torch.isfinite(logits.grad).all() and logits.grad[0].abs().max() < 1e-6 < logits.grad[1].abs().max()


@pytest.mark.parametrize("targets", [random_targets(), hard_targets()], ids=["soft", "with zeros"])
def test_binary_cross_entropy_is_the_formula_and_timms(targets: torch.Tensor) -> None:
    logits = random_logits()
    s = 1 / (1 + np.exp(-logits.double().numpy()))
    t = targets.numpy()
    expected = -(WEIGHTS.numpy() * t * np.log(s) + (1 - t) * np.log(1 - s)).sum()
    assert float(chosen("bce", logits, targets)) == pytest.approx(expected, rel=1e-5)
    timms = BinaryCrossEntropy(smoothing=0.0, sum_classes=True)(logits, targets)
    assert float(weighted_bce(logits, targets, torch.ones(CLASSES))) == pytest.approx(BATCH * float(timms), rel=1e-5)


def chosen(name: str, logits: torch.Tensor, targets: torch.Tensor, gamma: float = 2.0) -> torch.Tensor:
    """The loss of a training step with these settings."""
    shift = torch.zeros(CLASSES)
    settings = LossConfig(name=name, focal_gamma=gamma)
    return compute_loss(logits, targets, torch.empty(0), shift, WEIGHTS, None, settings)


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
