"""How far the policy is from the reference: three estimators, and the coefficient that may follow them.

With delta = log pi(y) - log pi_ref(y) and y drawn from pi: k1 = delta (unbiased, may be negative),
k2 = delta^2 / 2 (biased, positive), k3 = e^-delta - 1 + delta (unbiased, positive); Schulman, "Approximating KL
divergence" (2020). The reward is penalised with k1, as in InstructGPT eq. (2); k3 is logged.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor


def estimate(logprobs: Tensor, reference_logprobs: Tensor, kind: Literal["k1", "k2", "k3"] = "k1") -> Tensor:
    """KL(policy || reference) estimated at every position, in nats; ValueError for another kind."""
    delta = logprobs - reference_logprobs
    if kind == "k1":
        return delta
    if kind == "k2":
        return delta**2 / 2
    if kind == "k3":
        return torch.expm1(-delta) + delta
    raise ValueError(f"a KL estimator is k1, k2 or k3, not '{kind}'")


@dataclass(frozen=True, slots=True)
class Coefficient:
    """beta, the weight of the KL penalty: fixed (InstructGPT appendix C.4) or following `target` nats a response."""

    coef: float
    adaptive: bool = False
    target: float = 6.0
    horizon: float = 10000.0

    def adapted(self, kl: float, episodes: int) -> Coefficient:
        """beta x (1 + clip(KL / target - 1, +-0.2) x episodes / horizon), Ziegler et al. 2019; itself if fixed.

        `kl` is the mean KL of a response in nats. Raises ValueError when it is not finite, for beta would stay so.
        """
        if not self.adaptive:
            return self
        if not math.isfinite(kl):
            raise ValueError(f"the adaptive KL coefficient {self.coef} cannot follow a KL of {kl}")
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        return replace(self, coef=self.coef * (1 + error * episodes / self.horizon))
