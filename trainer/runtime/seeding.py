"""Randomness as a function of (seed, epoch, step): nothing to save, and a resumed run is exact.

The only module that touches torch's global generator: layers are initialised from it and dropout draws from it, and
they offer no other.
"""

from __future__ import annotations

import numpy as np
import torch


def seed_weights(seed: int) -> None:
    """Let the first weights of a model built next depend on the seed alone."""
    torch.manual_seed(seed)


def seed_step(seed: int, epoch: int, step: int, rank: int) -> np.random.Generator:
    """Seed dropout for this step and rank, and return the draws for mixing, the same on every rank."""
    dropout = int(np.random.SeedSequence((seed, epoch, step, rank)).generate_state(1, np.uint64)[0])
    # What torch.manual_seed does, without its search for kinds of devices, which takes 70 times as long.
    torch.default_generator.manual_seed(dropout)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(dropout)
    return np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, epoch, step))))
