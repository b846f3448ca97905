"""The value model's regression onto returns, with PPO's clip around the old values (Ziegler et al. 2019).

All tensors are [B sequences, R response positions]. `old_values` are the value model's before the iteration's first
update. The paper leaves the clip open.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_rlhf.algorithms import masked
from megatron_rlhf.observe.stats import Stats


def clipped(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, *, clip: float, num_tokens: int | Tensor
) -> tuple[Tensor, Stats]:
    """0.5 max((V - R)^2, (V_clipped - R)^2) summed over the mask, over `num_tokens` of the whole batch.

    V_clipped stays within `clip` of the old value; clip 0 is off. Stats: `loss.value`; `value.clip_fraction`, the
    tokens where the clipped error is the larger; `value.error` = (V - R)^2, `return.square` and `return.mean`.
    """
    values, old_values, returns = (masked.kept(x, mask) for x in (values, old_values, returns))
    error = (values - returns) ** 2
    # clamped to bounds, not old + clamped step: inside the bounds it is the value to the last bit
    near = values.clamp(old_values - clip, old_values + clip) if clip else values
    near_error = (near - returns) ** 2
    total, count = 0.5 * torch.maximum(error, near_error).sum(), mask.sum()
    stats = Stats.of(
        loss__value=(total.detach(), count),
        value__clip_fraction=((near_error > error).sum(), count),
        value__error=(error.detach().sum(), count),
        return__square=((returns**2).detach().sum(), count),
        return__mean=(returns.detach().sum(), count),
    )
    return masked.share(total, num_tokens), stats


def explained_variance(stats: Stats) -> float:
    """1 - mean (V - R)^2 / variance of R, from `clipped`'s Stats added over any batch; 0 where R does not vary."""
    variance = stats["return.square"] - stats["return.mean"] ** 2
    return 1 - stats["value.error"] / variance if variance > 0 else 0.0
