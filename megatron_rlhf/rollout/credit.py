"""Which token earned what: per-token rewards, advantages and returns of an annotated rollout."""

from __future__ import annotations

from typing import Literal, cast

import torch

from megatron_rlhf.algorithms import masked, rewards
from megatron_rlhf.batch import Annotated, Experience
from megatron_rlhf.config.schema import Ppo
from megatron_rlhf.ops import gae


def credit(annotated: Annotated, ppo: Ppo, *, kl_coef: float) -> Experience:
    """Rewards −β·KL with the score on the last token, GAE, advantages whitened once over the whole batch.

    With the exact KL an advantage also has what its own token departs from the expectation (`rewards.own`).
    """
    mask_BR, scale = annotated.mask_BR, torch.ones(())
    rewards_BR = rewards.shape(
        annotated.rollout.scores_B,
        annotated.old_logprobs_BR,
        annotated.reference_logprobs_BR,
        mask_BR,
        kl_coef=kl_coef,
        estimator=cast(Literal["k1", "k2", "k3", "exact"], ppo.kl.estimator),
        exact_kl_BR=annotated.exact_kl_BR,
    )
    if ppo.whiten_rewards:
        moments = masked.moments(rewards_BR, mask_BR)
        rewards_BR = masked.whiten(rewards_BR, mask_BR, shift_mean=False, moments=moments)
        scale = torch.rsqrt(moments[1] + 1e-8)
    advantages_BR, returns_BR = gae.advantages(rewards_BR, annotated.values_BR, mask_BR, gamma=ppo.gamma, lam=ppo.lam)
    if ppo.kl.estimator == "exact" and annotated.exact_kl_BR is not None:
        drawn_BR, reference_BR = annotated.old_logprobs_BR, annotated.reference_logprobs_BR
        own_BR = rewards.own(drawn_BR, reference_BR, annotated.exact_kl_BR, mask_BR, kl_coef=kl_coef)
        advantages_BR = advantages_BR + own_BR * scale
    if ppo.whiten_advantages:
        advantages_BR = masked.whiten(advantages_BR, mask_BR, shift_mean=True)
    return Experience(annotated, rewards_BR, advantages_BR, returns_BR)
