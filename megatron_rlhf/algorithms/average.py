"""The exponential moving average of the policy's weights (InstructGPT appendix C.4: decay 0.992)."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def follow(average: list[Tensor], live: list[Tensor], decay: float) -> None:
    """Each average becomes decay x average + (1 - decay) x live, in its own precision and on its own device.

    Modifies: `average`. Raises ValueError when the lists do not pair up, or when an average is in 16 bits, where a step
    of 1 - decay would round away.
    """
    for mean, weight in zip(average, live, strict=True):
        if mean.dtype in (torch.float16, torch.bfloat16):
            raise ValueError(f"the average of a weight is {mean.dtype}; keep it in float32, its steps are too small")
        mean.mul_(decay).add_(weight.to(mean), alpha=1 - decay)
