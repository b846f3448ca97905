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


def test_an_exact_kl_replaces_the_estimates() -> None:
    """The log-probs have no say then; without it, or with an estimator that it is not, it is refused or not read."""
    scores, logprobs, reference, mask = episodes(3)
    exact = torch.rand(mask.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    for drawn in (logprobs, 2 * logprobs):
        shaped = rewards.shape(scores, drawn, reference, mask, kl_coef=0.3, estimator="exact", exact_kl_BR=exact / mask)
        expected = scores * (mask.sum(1) > 0) - 0.3 * (exact * mask).sum(1)
        torch.testing.assert_close(shaped.sum(1), expected)
        assert not shaped[mask == 0].any()
    with pytest.raises(ValueError, match="these were annotated without it"):
        rewards.shape(scores, logprobs, reference, mask, kl_coef=0.3, estimator="exact")
    plain, beside = (
        rewards.shape(scores, logprobs, reference, mask, kl_coef=0.3, exact_kl_BR=unread) for unread in (None, exact)
    )
    assert torch.equal(plain, beside)


def test_an_exact_kl_credits_the_tokens_before_and_own_the_token_itself() -> None:
    """Two tokens of five words, every response enumerated in float64. The policy gradient of the rewards to go is, with
    k1, that of the whole KL; with the exact KL it lacks the gradient of each position's own, which `own` gives, and has
    all of the rest. Together they spread less over the responses than k1 does.
    """
    generator = torch.Generator().manual_seed(5)
    first, second = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((5,), (5, 5)))
    away = [x + torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in (first, second)]
    first.requires_grad_()
    second.requires_grad_()
    p, q = ([x.log_softmax(-1) for x in logits] for logits in ((first, second), away))
    kl_1, kl_2 = ((p_.exp() * (p_ - q_)).sum(-1) for p_, q_ in zip(p, q, strict=True))
    y_1, y_2 = (grid.flatten() for grid in torch.meshgrid(torch.arange(5), torch.arange(5), indexing="ij"))
    logprobs, reference = (torch.stack([x[0][y_1], x[1][y_1, y_2]], 1) for x in (p, q))
    exact = torch.stack([kl_1.expand(25), kl_2[y_1]], 1)
    chance, mask, none = logprobs.sum(1).exp(), torch.ones(25, 2, dtype=torch.float64), torch.zeros(25)

    def gradient(of: Tensor) -> Tensor:
        found = torch.autograd.grad(of, (first, second), retain_graph=True)
        return torch.cat([x.flatten() for x in found])

    def of_policy(shaped: Tensor, more: Tensor | float = 0.0) -> Tensor:
        to_go = to_go_of(shaped) + (more.detach() if isinstance(more, Tensor) else more)
        return gradient((chance.detach()[:, None] * logprobs * to_go).sum())

    def to_go_of(shaped: Tensor) -> Tensor:
        return shaped.detach().flip(1).cumsum(1).flip(1)

    def spread(advantages: Tensor) -> float:
        """The variance of the gradient over responses."""
        each = torch.stack([gradient((logprobs[b] * advantages[b]).sum()) for b in range(25)])
        weight = chance.detach()[:, None]
        return float(((each - (weight * each).sum(0)) ** 2 * weight).sum())

    whole = gradient((chance * (logprobs - reference).sum(1)).sum())
    own = gradient(kl_1 + (p[0].exp().detach() * kl_2).sum())
    made = (none, logprobs, reference, mask)
    by_k1 = of_policy(rewards.shape(*made, kl_coef=1.0))
    by_exact = of_policy(rewards.shape(*made, kl_coef=1.0, estimator="exact", exact_kl_BR=exact))
    torch.testing.assert_close(-by_k1, whole)
    torch.testing.assert_close(-by_exact, whole - own)
    shaped = rewards.shape(*made, kl_coef=1.0, estimator="exact", exact_kl_BR=exact)
    of_own = rewards.own(logprobs, reference, exact, mask, kl_coef=1.0)
    torch.testing.assert_close(-of_policy(shaped, of_own), whole)
    torch.testing.assert_close((chance[:, None] * of_own).sum(0), torch.zeros(2, dtype=torch.float64))
    k1_spread = spread(to_go_of(rewards.shape(*made, kl_coef=1.0)))
    assert spread(to_go_of(shaped) + of_own.detach()) < 0.9 * k1_spread, k1_spread
    assert own.norm() > 0.1 and by_exact.norm() > 0.01
    assert by_exact[5:].abs().max() < 1e-15, "the last token is not held back at all"


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
