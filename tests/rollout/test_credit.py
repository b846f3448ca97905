"""Proves what the exact KL changes in credit: rewards and returns have it, an advantage what its own token departs from
it, scaled as the rewards are; the estimates are untouched by an exact KL that lies beside them.

Not proved here: that the policy gradient is then the KL's (tests/algorithms/test_rewards.py), GAE (its own tests).
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megatron_rlhf.algorithms import masked
from megatron_rlhf.config.schema import Kl, Learning, Ppo
from megatron_rlhf.rollout.credit import credit
from tests.helpers import roles as tiny

BETA = 0.3


def ppo(estimator: str, *, whiten_rewards: bool = False) -> Ppo:
    """PPO's defaults without whitened advantages."""
    rate = Learning(rate=1e-3)
    return Ppo(
        kl=Kl(estimator=estimator), policy=rate, value=rate, whiten_advantages=False, whiten_rewards=whiten_rewards
    )


@pytest.mark.parametrize("whiten_rewards", [False, True])
def test_an_advantage_has_its_own_tokens_departure(whiten_rewards: bool) -> None:
    annotated = tiny.experience().annotated
    mask_BR = annotated.mask_BR
    kl_BR = torch.rand(mask_BR.shape, generator=torch.Generator().manual_seed(2)) * mask_BR
    given = replace(annotated, exact_kl_BR=kl_BR)
    settings = ppo("exact", whiten_rewards=whiten_rewards)
    made = credit(given, settings, kl_coef=BETA)
    k1_BR = (annotated.old_logprobs_BR - annotated.reference_logprobs_BR) * mask_BR
    blind = credit(replace(given, reference_logprobs_BR=annotated.old_logprobs_BR - kl_BR), settings, kl_coef=BETA)
    assert torch.equal(made.rewards_BR, blind.rewards_BR) and torch.equal(made.returns_BR, blind.returns_BR)
    plain_BR = -BETA * kl_BR  # scores are 0
    scale = torch.rsqrt(masked.moments(plain_BR, mask_BR)[1] + 1e-8) if whiten_rewards else 1.0
    expected_BR = masked.whiten(plain_BR, mask_BR, shift_mean=False) if whiten_rewards else plain_BR
    torch.testing.assert_close(made.rewards_BR, expected_BR)
    torch.testing.assert_close(made.advantages_BR, blind.advantages_BR - BETA * (k1_BR - kl_BR) * scale)
    beside, alone = (credit(each, ppo("k1"), kl_coef=BETA) for each in (given, annotated))
    assert torch.equal(beside.advantages_BR, alone.advantages_BR)
