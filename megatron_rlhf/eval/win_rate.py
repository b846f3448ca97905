"""Win rate of one policy over another with its 95 % interval, InstructGPT's main metric (section 3.6)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from megatron_rlhf.config.rules import BadInput

RESAMPLES = 2000
Z = 1.96
"""Normal quantile of a 95 % interval."""


@dataclass(frozen=True, slots=True)
class WinRate:
    """Mean outcome over `n` prompts (win 1, tie 0.5, loss 0) with the ends of its 95 % interval."""

    mean: float
    low: float
    high: float
    n: int

    def as_dict(self) -> dict[str, float]:
        """`{mean, low, high, n}` as report.json holds it."""
        return asdict(self)


def win_rate(left: Sequence[float], right: Sequence[float], seed: int) -> WinRate:
    """How often `left` scores above `right`, prompt by prompt; ties count half.

    The interval is the percentile bootstrap over prompts. An outcome takes three values only, so a resample of n
    prompts is one multinomial draw of their counts. Where all outcomes are alike the bootstrap has no width, and the
    exact bound stands instead: with 97.5 % confidence another outcome has at most probability 1 - 0.025^(1/n).
    Raises BadInput on no prompts, unequal lengths or scores that are not finite.
    """
    if len(left) != len(right) or not len(left):
        raise BadInput(f"a win rate needs two scores a prompt; it was given {len(left)} and {len(right)}")
    left_N, right_N = np.asarray(left, dtype=np.float64), np.asarray(right, dtype=np.float64)
    if not (np.isfinite(left_N).all() and np.isfinite(right_N).all()):
        raise BadInput("a win rate needs finite scores; drop the prompts whose score is nan or infinite")
    n = len(left_N)
    counts = np.array([(left_N > right_N).sum(), (left_N == right_N).sum(), (left_N < right_N).sum()])
    outcomes = np.array([1.0, 0.5, 0.0])
    mean = float(counts @ outcomes / n)
    if counts.max() == n:
        slack = 1.0 - 0.025 ** (1.0 / n)
        return WinRate(mean, mean - slack * mean, mean + slack * (1.0 - mean), n)
    drawn = np.random.default_rng(seed).multinomial(n, counts / n, size=RESAMPLES) @ outcomes / n
    low, high = np.quantile(drawn, [0.025, 0.975])
    return WinRate(mean, float(low), float(high), n)


def needed(p: float, half_width: float) -> int:
    """Prompts for a 95 % interval of p +- `half_width`: 1.96^2 p (1 - p) / half_width^2, rounded up."""
    if not 0 < p < 1 or not half_width > 0:
        raise BadInput(f"p = {p} and half width {half_width} give no sample size; for example needed(0.85, 0.03)")
    return math.ceil(Z**2 * p * (1 - p) / half_width**2)
