"""Lookahead around an optimizer, in few kernels."""

from __future__ import annotations

from typing import Any

import timm.optim
import torch

_SLOW = "lookahead_slow_buff"  # timm's key


class Lookahead(timm.optim.Lookahead):
    """timm's Lookahead, which updates all parameters of a group at once."""

    @torch.no_grad()
    def update_slow(self, group: dict[str, Any]) -> None:
        """Move the slow weights of a parameter group towards the fast ones, and copy them back."""
        fast = [weight for weight in group["params"] if weight.grad is not None]
        states = [self._base_optimizer.state[weight] for weight in fast]
        for weight, state in zip(fast, states, strict=True):
            state.setdefault(_SLOW, weight.detach().clone())
        slow = [state[_SLOW] for state in states]
        torch._foreach_add_(slow, torch._foreach_sub(fast, slow), alpha=group["lookahead_alpha"])
        torch._foreach_copy_(fast, slow)
