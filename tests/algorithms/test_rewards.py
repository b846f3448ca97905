"""Rewards land where they should: the KL on every response token, the score on the last, nothing elsewhere.

Not proved here: that scores were read at the last response token.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_rlhf.algorithms import kl, rewards

MASK = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0], [0.0, 0.0, 0.0]])


def episodes(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scores, log-probs, reference log-probs and mask of 5 episodes of 0 to 6 tokens; padding is not finite."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 7, (5,), generator=generator)
    mask = (torch.arange(6) < lengths[:, None]).double()
    logprobs, reference = -torch.rand(2, 5, 6, generator=generator, dtype=torch.float64)
    return torch.randn(5, generator=generator, dtype=torch.float64), logprobs / mask, reference, mask


def test_by_hand() -> None:
    """Log-ratio 0.5 at beta 0.2 takes 0.1 off each token; scores 3, -1 and (of an empty row) 7."""
    ratio = torch.full((3, 3), 0.5)
    shaped = rewards.shape(torch.tensor([3.0, -1.0, 7.0]), ratio - 1, ratio * 0 - 1, MASK, kl_coef=0.2)
    expected = torch.tensor([[-0.1, 2.9, 0.0], [-0.1, -0.1, -1.1], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(shaped, expected)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10_000), kl_coef=st.floats(0, 2))
def test_rewards_of_a_response_sum_to_score_less_beta_log_ratio(seed: int, kl_coef: float) -> None:
    scores, logprobs, reference, mask = episodes(seed)
    shaped = rewards.shape(scores, logprobs, reference, mask, kl_coef=kl_coef)
    for b in range(5):
        length = int(mask[b].sum())
        ratio = sum((logprobs[b, t] - reference[b, t]).item() for t in range(length))
        expected = scores[b].item() - kl_coef * ratio if length else 0.0
        assert shaped[b].sum().item() == pytest.approx(expected, abs=1e-9)
        assert not shaped[b, length:].any()


def test_beta_0_takes_the_kl_out_of_the_reward_and_it_can_still_be_logged() -> None:
    scores, logprobs, reference, mask = episodes(1)
    shaped = rewards.shape(scores, logprobs, reference, mask, kl_coef=0.0)
    assert int((shaped != 0).sum()) == int((mask.sum(1) > 0).sum())
    torch.testing.assert_close(shaped.sum(1), scores * (mask.sum(1) > 0))
    assert kl.estimate(logprobs, reference, "k3")[mask > 0].mean() > 0.01


def test_another_estimator_replaces_the_log_ratio() -> None:
    scores, logprobs, reference, mask = episodes(2)
    shaped = rewards.shape(scores, logprobs, reference, mask, kl_coef=0.3, estimator="k3")
    penalty = torch.where(mask > 0, kl.estimate(logprobs, reference, "k3"), 0.0).sum(1)
    torch.testing.assert_close(shaped.sum(1), scores * (mask.sum(1) > 0) - 0.3 * penalty)


def test_missing_end_by_rule() -> None:
    scores, ended = torch.tensor([2.0, 0.5, -3.0]), torch.tensor([1.0, 0.0, 0.0])
    assert rewards.missing_end(scores, ended, rule="replace", value=-1.0).tolist() == [2.0, -1.0, -1.0]
    assert rewards.missing_end(scores, ended, rule="subtract", value=-1.0).tolist() == [2.0, -0.5, -4.0]
    assert rewards.missing_end(scores, ended, rule="subtract", value=1.0).tolist() == [2.0, -0.5, -4.0]
    assert rewards.missing_end(scores, ended, rule="keep", value=-1.0).tolist() == [2.0, 0.5, -3.0]


def test_another_rule_is_refused() -> None:
    with pytest.raises(ValueError, match="replace, subtract or keep, not 'drop'"):
        rewards.missing_end(torch.zeros(1), torch.zeros(1), rule="drop", value=-1.0)


def test_scores_are_clipped_on_both_sides_and_0_is_off() -> None:
    scores = torch.tensor([-7.0, 0.25, 9.0])
    assert rewards.clipped(scores, 5.0).tolist() == [-5.0, 0.25, 5.0]
    assert rewards.clipped(scores, 0.0).tolist() == [-7.0, 0.25, 9.0]
    with pytest.raises(ValueError, match="negative"):
        rewards.clipped(scores, -1.0)
