"""Scores of a rollout by the reward model."""

from __future__ import annotations

from dataclasses import replace

from megatron_rlhf.algorithms import rewards
from megatron_rlhf.batch import Rollout
from megatron_rlhf.config.schema import Ppo
from megatron_rlhf.train.engine import Engine


def score(rollout: Rollout, reward: Engine, ppo: Ppo) -> Rollout:
    """The rollout with one score a response, the rule for a missing end token and the clip applied. Collective: world.

    The reward model's own bias already makes demonstrations score 0 on average (InstructGPT section 3.5).
    """
    scores_B = rewards.clipped(reward.forward(rollout.rows), ppo.score_clip)
    scores_B = rewards.missing_end(scores_B, rollout.ended_B, rule=ppo.missing_end, value=ppo.missing_end_score)
    return replace(rollout, scores_B=scores_B)
