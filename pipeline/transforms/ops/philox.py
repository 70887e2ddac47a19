"""The random words of `pipeline.common.rng.random_keys` in tensor operations, on any device."""

from __future__ import annotations

import torch

_ROUNDS = 10
# Multipliers and key increments of Philox 4x64 (Salmon et al. 2011), as signed 64-bit integers.
_MULTIPLIERS = (0xD2E7470EE14C6C93 - 2**64, 0xCA5A826395121157 - 2**64)
_INCREMENTS = (0x9E3779B97F4A7C15 - 2**64, 0xBB67AE8584CAA73B - 2**64)
_LOW = 0xFFFFFFFF


def philox_words(keys: torch.Tensor, words: int) -> torch.Tensor:
    """Compute consecutive words of several streams.

    Args:
        keys: int64 [B, 3], the bits of seed and stream, and the first word divided by four.
        words: Words of each stream, a multiple of four.

    Returns:
        int64 [B, words], the bits of the words of `random_keys`.
    """
    # NumPy counts before it generates, so the first block has counter 1.
    first = keys[:, 2:] + torch.arange(1, words // 4 + 1, device=keys.device)  # [B, blocks]
    # A block is the counter (first, 0, 0, 0), encrypted. Its words 0 and 2 are `even`, 1 and 3 `odd`: [2, B, blocks].
    even = torch.stack([first, torch.zeros_like(first)])
    odd = torch.zeros_like(even)
    key = keys[:, :2].T[:, :, None]
    multipliers, increments = (
        torch.stack([torch.full((1, 1), value, dtype=torch.int64, device=keys.device) for value in values])
        for values in (_MULTIPLIERS, _INCREMENTS)
    )
    for _ in range(_ROUNDS):
        even, odd = (_high_product(even, multipliers) ^ odd.flip(0)).flip(0) ^ key, (even * multipliers).flip(0)
        key = key + increments
    return torch.stack([even, odd], dim=-1).permute(1, 2, 0, 3).reshape(len(keys), words)


def _high_product(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The high 64 bits of the 128-bit product of unsigned numbers, from products of 32-bit halves."""
    x_low, x_high, y_low, y_high = x & _LOW, x >> 32 & _LOW, y & _LOW, y >> 32 & _LOW
    middle = x_high * y_low + (x_low * y_low >> 32 & _LOW)
    other = x_low * y_high + (middle & _LOW)
    return x_high * y_high + (middle >> 32 & _LOW) + (other >> 32 & _LOW)
