"""PPO's clipped surrogate over response tokens (Schulman et al. 2017, eq. 7).

All tensors are [B sequences, R response positions]. `old_logprobs` are the policy's before the iteration's first
update, computed in the train layout.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_rlhf.algorithms import kl, masked
from megatron_rlhf.observe.stats import Stats


def clipped(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, *, clip: float, num_tokens: int | Tensor
) -> tuple[Tensor, Stats]:
    """max(-A ratio, -A clamp(ratio, 1 - clip, 1 + clip)) summed over the mask, over `num_tokens` of the whole batch.

    ratio = pi / pi_old. Stats: `loss.policy`; `clip_fraction`, the tokens whose gradient the clip removes; `ratio`;
    `ratio_error` = |ratio - 1|; `kl.update`, KL(old || new) by k3.
    """
    old = masked.kept(old_logprobs, mask)
    new = masked.kept(logprobs, mask)
    advantages = masked.kept(advantages, mask)
    ratio = torch.exp(new - old)
    raw = -advantages * ratio
    bounded = -advantages * ratio.clamp(1 - clip, 1 + clip)
    total, count = torch.maximum(raw, bounded).sum(), mask.sum()
    with torch.no_grad():
        stats = Stats.of(
            loss__policy=(total.detach(), count),
            clip_fraction=((bounded > raw).sum(), count),
            ratio=((ratio * mask).sum(), count),
            ratio_error=((ratio - 1).abs().sum(), count),
            kl__update=(kl.estimate(old, new, "k3").sum(), count),
        )
    return masked.share(total, num_tokens), stats
