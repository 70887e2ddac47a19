"""Seeds of weights, dropout and mixup as a function of (seed, epoch, step), so a checkpoint needs no generator state.

This is the only module that seeds torch's global generator. Layers initialise their weights from it and dropout draws
from it; they accept no other generator.
"""

from __future__ import annotations

import numpy as np
import torch


def seed_weights(seed: int) -> None:
    """Seed the initial weights of the next model."""
    torch.manual_seed(seed)


def seed_step(seed: int, epoch: int, step: int, rank: int) -> np.random.Generator:
    """Seed dropout for this step and rank; returns the generator of mixup, the same on every rank."""
    dropout = int(np.random.SeedSequence((seed, epoch, step, rank)).generate_state(1, np.uint64)[0])
    # The same as torch.manual_seed without its search for device types, which takes 70 times as long.
    torch.default_generator.manual_seed(dropout)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(dropout)
    return np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, epoch, step))))
