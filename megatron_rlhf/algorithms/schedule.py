"""The learning rate as a share of its peak: linear warm-up, then a cosine or a constant (InstructGPT appendix C)."""

from __future__ import annotations

import math


def multiplier(step: int, total: int, *, schedule: str, final: float, warmup: int, warmup_start: float) -> float:
    """The share of the peak at `step`, counted from 0.

    Warm-up rises linearly from `warmup_start` at step 0 to 1 at step `warmup`. Then "cosine" falls to `final` at step
    `total` and stays there, "constant" stays at 1. Raises ValueError for another schedule.
    """
    if schedule not in ("cosine", "constant"):
        raise ValueError(f"a learning-rate schedule is cosine or constant, not '{schedule}'")
    if step < warmup:
        return warmup_start + (1 - warmup_start) * step / warmup
    if schedule == "constant":
        return 1.0
    progress = min((step - warmup) / max(total - warmup, 1), 1.0)
    return final + (1 - final) * (1 + math.cos(math.pi * progress)) / 2
