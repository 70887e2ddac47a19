"""Mixed targets say what the pixels hold, and mixing depends on its draws alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trainer.config.schema import MixupConfig
from trainer.optim.mixup import apply_mixup_cutmix, cut_box, soft_targets

MIXUP = MixupConfig(prob=1, mixup_alpha=0.4, cutmix_alpha=0)
CUTMIX = MixupConfig(prob=1, mixup_alpha=0, cutmix_alpha=0.7)
BOTH = MixupConfig(prob=1, mixup_alpha=0.4, cutmix_alpha=0.7)


def draws(seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(seed))


def marked_batch(count: int, height: int = 12, width: int = 9) -> tuple[torch.Tensor, torch.Tensor]:
    """Sample i is 1 in its channel i and 0 in the others, and of class i: the mean of channel j is the share of j."""
    targets = torch.eye(count)
    return targets[:, :, None, None].expand(count, count, height, width).contiguous(), targets


def shares(images: torch.Tensor) -> torch.Tensor:
    return images.mean(dim=(2, 3))


def is_cutmix(mixed: torch.Tensor) -> bool:
    return bool(((mixed == 0) | (mixed == 1)).all())


def test_mixing_is_off_in_the_last_epochs() -> None:
    settings = MixupConfig(prob=0.8, off_last_epochs=2)
    assert [settings.at(epoch, 5).prob for epoch in range(5)] == [0.8, 0.8, 0.8, 0, 0]
    assert settings.at(1, 5) == settings


def test_soft_targets_spread_the_smoothing_over_all_classes() -> None:
    labels = torch.tensor([2, 0])
    assert soft_targets(labels, 4, 0.0).tolist() == [[0, 0, 1, 0], [1, 0, 0, 0]]
    smoothed = soft_targets(labels, 4, 0.2)
    assert smoothed.dtype == torch.float32
    assert smoothed.flatten().tolist() == pytest.approx([0.05, 0.05, 0.85, 0.05, 0.85, 0.05, 0.05, 0.05])


@pytest.mark.parametrize("count", [1, 2, 5, 8], ids=lambda count: f"batch of {count}")
@pytest.mark.parametrize("settings", [MIXUP, CUTMIX, BOTH], ids=["mixup", "cutmix", "both"])
@pytest.mark.parametrize("seed", range(8))
def test_targets_are_the_shares_of_the_pixels(settings: MixupConfig, count: int, seed: int) -> None:
    images, targets = marked_batch(count)
    mixed_images, mixed_targets = apply_mixup_cutmix(images, targets, settings, draws(seed))
    assert torch.allclose(mixed_targets, shares(mixed_images), atol=1e-6)
    assert torch.allclose(mixed_targets.sum(dim=1), torch.ones(count))


@pytest.mark.parametrize("settings", [MIXUP, CUTMIX], ids=["mixup", "cutmix"])
def test_every_sample_is_mixed_with_one_other_by_the_same_share(settings: MixupConfig) -> None:
    _, mixed = apply_mixup_cutmix(*marked_batch(5), settings, draws(1))
    keep = float(mixed[0, 0])
    assert 0 < keep < 1
    assert torch.allclose(mixed, keep * torch.eye(5) + (1 - keep) * torch.eye(5).roll(1, 0))


def test_mixup_blends_every_pixel_and_cutmix_cuts_a_box() -> None:
    images, targets = marked_batch(4)
    blended, _ = apply_mixup_cutmix(images, targets, MIXUP, draws(1))
    assert not is_cutmix(blended)
    assert torch.equal(blended.amin(dim=(2, 3)), blended.amax(dim=(2, 3)))

    cut, _ = apply_mixup_cutmix(images, targets, CUTMIX, draws(1))
    assert is_cutmix(cut)
    foreign = cut[0, 0] == 0
    rows, columns = foreign.any(dim=1).nonzero().flatten(), foreign.any(dim=0).nonzero().flatten()
    assert 0 < int(foreign.sum()) < foreign.numel()
    assert foreign[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
    assert int(foreign.sum()) == (rows[-1] - rows[0] + 1) * (columns[-1] - columns[0] + 1)


@pytest.mark.parametrize("settings", [MIXUP, CUTMIX], ids=["mixup", "cutmix"])
def test_copies_of_an_image_are_mixed_with_another_image(settings: MixupConfig) -> None:
    """A batch of two copies of each of four images, of which the last copy is cut off, as in a batch of an odd size."""
    images, targets = (each.repeat_interleave(2, 0)[:7] for each in marked_batch(4))
    mixed_images, mixed_targets = apply_mixup_cutmix(images, targets, settings, draws(1), 2)
    assert torch.allclose(mixed_targets, shares(mixed_images), atol=1e-6)
    assert (mixed_targets.count_nonzero(dim=1) == 2).all()


@pytest.mark.parametrize("settings", [MIXUP, CUTMIX], ids=["mixup", "cutmix"])
def test_leaves_its_inputs_alone(settings: MixupConfig) -> None:
    images, targets = marked_batch(4)
    mixed_images, mixed_targets = apply_mixup_cutmix(images, targets, settings, draws(1))
    assert not torch.equal(mixed_images, images) and not torch.equal(mixed_targets, targets)
    again_images, again_targets = marked_batch(4)
    assert torch.equal(images, again_images) and torch.equal(targets, again_targets)


def test_the_same_draws_give_the_same_mixture_whatever_torch_has_drawn() -> None:
    torch.rand(3)
    first = apply_mixup_cutmix(*marked_batch(6), BOTH, draws(7))
    torch.rand(5)
    second = apply_mixup_cutmix(*marked_batch(6), BOTH, draws(7))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    assert not torch.equal(first[1], apply_mixup_cutmix(*marked_batch(6), BOTH, draws(8))[1])


def test_probability_0_never_mixes_and_1_always() -> None:
    images, targets = marked_batch(4)
    for seed in range(50):
        same_images, same_targets = apply_mixup_cutmix(images, targets, MixupConfig(prob=0), draws(seed))
        assert torch.equal(same_images, images) and torch.equal(same_targets, targets)
        assert not torch.equal(apply_mixup_cutmix(images, targets, MIXUP, draws(seed))[1], targets)


def test_mixes_and_switches_as_often_as_it_is_told() -> None:
    """Of 1,000 batches; four standard deviations on either side."""
    settings = MixupConfig(prob=0.8, mixup_alpha=1, cutmix_alpha=1, switch_prob=0.25)
    images, targets = marked_batch(2, 16, 16)
    random = draws(0)
    results = [apply_mixup_cutmix(images, targets, settings, random)[0] for _ in range(1000)]
    mixed = [result for result in results if result is not images]
    assert len(mixed) == pytest.approx(800, abs=51)
    assert sum(map(is_cutmix, mixed)) == pytest.approx(len(mixed) / 4, abs=49)


@pytest.mark.parametrize(("alpha", "spread"), [(0.22, (1 / (4 * 1.44)) ** 0.5), (4.0, (1 / 36) ** 0.5)])
def test_mixup_weights_are_drawn_from_the_beta_distribution(alpha: float, spread: float) -> None:
    """Beta(a, a) has the mean 1/2 and the variance 1 / (4 (2a + 1))."""
    settings, random = MixupConfig(prob=1, mixup_alpha=alpha, cutmix_alpha=0), draws(0)
    keeps = np.array(
        [float(apply_mixup_cutmix(*marked_batch(2, 1, 1), settings, random)[1][0, 0]) for _ in range(2000)]
    )
    assert keeps.mean() == pytest.approx(0.5, abs=4 * spread / 2000**0.5)
    assert keeps.std() == pytest.approx(spread, rel=0.06)


@given(
    height=st.integers(1, 64),
    width=st.integers(1, 64),
    keep=st.floats(0, 1),
    seed=st.integers(0, 2**32),
)
def test_the_box_lies_in_the_image_and_is_no_larger_than_its_share(
    height: int, width: int, keep: float, seed: int
) -> None:
    top, bottom, left, right = cut_box(height, width, keep, draws(seed))
    assert 0 <= top <= bottom <= height
    assert 0 <= left <= right <= width
    assert (bottom - top) * (right - left) <= (1 - keep) * height * width * (1 + 1e-9)


def test_a_box_away_from_the_edges_has_its_share_of_the_area_and_every_place_is_possible() -> None:
    random = draws(0)
    boxes = [cut_box(32, 32, 0.75, random) for _ in range(2000)]
    assert max((bottom - top) * (right - left) for top, bottom, left, right in boxes) == 16 * 16
    covered = np.zeros((32, 32), bool)
    for top, bottom, left, right in boxes:
        covered[top:bottom, left:right] = True
    assert covered.all()


class Center:
    """Draws that put the box at a given center."""

    def __init__(self, *drawn: int) -> None:
        self.drawn, self.bounds = list(drawn), []

    def integers(self, bound: int) -> int:
        self.bounds.append(bound)
        return self.drawn[len(self.bounds) - 1]


@pytest.mark.parametrize(
    ("keep", "center", "box"),
    [
        (0.75, (6, 5), (4, 9, 3, 7)),  # half of 10 rows and of 8 columns
        (0.75, (0, 0), (0, 3, 0, 2)),  # the same, cut off at the top left
        (0.75, (9, 7), (7, 10, 5, 8)),  # and at the bottom right
        (0.75, (2, 2), (0, 5, 0, 4)),  # it just fits
        (0.75, (7, 6), (5, 10, 4, 8)),
        (0.8775, (5, 4), (4, 7, 3, 5)),  # 35 percent: 3.5 rows, 2.8 columns
        (0.0, (5, 4), (0, 10, 0, 8)),  # the whole image
        (0.0, (0, 0), (0, 5, 0, 4)),
        (1.0, (5, 4), (5, 5, 4, 4)),  # nothing
    ],
)
def test_the_box_lies_around_its_center(keep: float, center: tuple[int, int], box: tuple[int, int, int, int]) -> None:
    draws_of_it = Center(*center)
    assert cut_box(10, 8, keep, draws_of_it) == box
    assert draws_of_it.bounds == [10, 8], "rows, then columns, each as likely"


def test_what_is_cut_in_comes_from_the_same_place_of_the_previous_image() -> None:
    place = torch.arange(12 * 9.0).reshape(12, 9)
    images = torch.stack([place + 1000 * number for number in range(4)])[:, None]
    mixed, targets = apply_mixup_cutmix(images, torch.eye(4), CUTMIX, draws(1))
    own, other = mixed == images, mixed == images.roll(1, 0)
    assert (own ^ other).all()
    assert (other == other[0]).all(), "one box for all"
    assert targets[0, 0] == pytest.approx(float(own[0].float().mean()))


def test_both_alphas_of_the_settings_are_needed_to_choose() -> None:
    """Without a Beta distribution of one kind, the other is taken, whatever `switch_prob`."""
    for seed in range(20):
        for share in (0.0, 1.0):
            mixup = MIXUP.model_copy(update={"switch_prob": share})
            assert not is_cutmix(apply_mixup_cutmix(*marked_batch(4, 1, 1), mixup, draws(seed))[0])
            cutmix = CUTMIX.model_copy(update={"switch_prob": share})
            assert is_cutmix(apply_mixup_cutmix(*marked_batch(4), cutmix, draws(seed))[0])
