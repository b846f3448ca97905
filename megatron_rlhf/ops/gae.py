"""Generalised advantage estimation as one scan a row; algorithms/gae.py says what it means and is its oracle.

B sequences, R response positions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_rlhf.ops import library


@torch.no_grad()
def advantages(rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Advantages and returns, both [B, R] and 0 where the mask is 0: A_t = delta_t + gamma lam A_{t+1}.

    delta_t = r_t + gamma V_{t+1} - V_t, return_t = A_t + V_t; V and A are 0 behind the end.
    """
    given = (rewards, values, mask)
    if all(part.dtype == torch.float32 for part in given) and library.serves(rewards):
        return torch.ops.megatron_rlhf.gae(*(part.contiguous() for part in given), gamma, lam)
    return _reference(rewards, values, mask, gamma, lam)


def _reference(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    values = values.masked_fill(mask == 0, 0)
    result = torch.zeros_like(values)
    next_value = next_advantage = torch.zeros_like(values[:, 0]) if values.shape[1] else values.new_zeros(len(values))
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = (delta + gamma * lam * next_advantage).masked_fill(mask[:, t] == 0, 0)
        next_value = values[:, t]
        result[:, t] = next_advantage
    return result, result + values


if library.loaded():

    @torch.library.register_fake("megatron_rlhf::gae")
    def _fake(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
        return torch.empty_like(rewards), torch.empty_like(rewards)
