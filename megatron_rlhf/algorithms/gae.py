"""Generalised advantage estimation over responses (Schulman et al. 2016, eq. 16).

B sequences, R response positions. `mask` is 1 on response tokens, up to and including the end token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_rlhf.algorithms import masked


@torch.no_grad()
def advantages(rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Advantages and returns, both [B, R] and 0 outside the mask.

    A_t = delta_t + gamma lam A_{t+1} with delta_t = r_t + gamma V_{t+1} - V_t, and return_t = A_t + V_t. Nothing
    follows the end token: V and A are 0 there, a response cut by the length limit is not bootstrapped either.
    """
    values = masked.kept(values, mask)
    result = torch.zeros_like(values)
    next_value = next_advantage = torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = masked.kept(delta + gamma * lam * next_advantage, mask[:, t])
        next_value = values[:, t]
        result[:, t] = next_advantage
    return result, result + values
