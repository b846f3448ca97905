"""Eq. (1) over a ranking equals a naive loop over its pairs, in value and gradient, with ties, padding and variable K.

Not proved here: that the engine forwards each response once, nor that pairs of one prompt stay together.
"""

import math
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_rlhf.algorithms import ranking_loss


def naive(scores_PK: Tensor, ranks_PK: Tensor, denominator: str) -> tuple[Tensor, int, int, int]:
    """Sum over prompts of the mean pair loss; prompts with pairs, correct pairs, pairs."""
    total, prompts, correct, count = scores_PK.new_zeros(()), 0, 0, 0
    for scores, ranks in zip(scores_PK, ranks_PK.tolist(), strict=True):
        real = [k for k in range(len(ranks)) if ranks[k] > 0]
        losses = []
        for i, j in combinations(real, 2):
            if ranks[i] == ranks[j]:
                continue
            better, worse = (i, j) if ranks[i] < ranks[j] else (j, i)
            losses.append(torch.log1p(torch.exp(scores[worse] - scores[better])))
            correct += int(scores[better] > scores[worse])
        if losses:
            total = total + sum(losses) / (len(losses) if denominator == "surviving" else math.comb(len(real), 2))
            prompts += 1
            count += len(losses)
    return total, prompts, correct, count


def random_rankings(seed: int, prompts: int, k: int, ties: bool) -> tuple[Tensor, Tensor]:
    """Scores and ranks of 0 to `k` responses a prompt, at random places among padding."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(prompts, k, generator=generator, dtype=torch.float64)
    ranks = torch.zeros(prompts, k, dtype=torch.long)
    for p in range(prompts):
        size = int(torch.randint(0, k + 1, (), generator=generator))
        places = torch.randperm(k, generator=generator)[:size]
        drawn = torch.randint(1, 4, (size,), generator=generator) if ties else None
        ranks[p, places] = drawn if drawn is not None else torch.randperm(size, generator=generator) + 1
    return scores * (ranks > 0), ranks


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10_000),
    k=st.integers(2, 9),
    ties=st.booleans(),
    denominator=st.sampled_from(["surviving", "all"]),
)
def test_equals_a_loop_over_pairs_in_value_gradient_and_stats(seed: int, k: int, ties: bool, denominator: str) -> None:
    scores, ranks = random_rankings(seed, 5, k, ties)
    ours, theirs = scores.clone().requires_grad_(), scores.clone().requires_grad_()
    loss, stats = ranking_loss.pairwise(ours, ranks, num_prompts=7, denominator=denominator)
    total, prompts, correct, count = naive(theirs, ranks, denominator)
    torch.testing.assert_close(loss, total / 7, atol=1e-12, rtol=1e-12)
    assert int(ranking_loss.num_ranked(ranks)) == prompts == int(stats.weights["loss.reward"])
    assert (int(stats.sums["accuracy"]), int(stats.weights["accuracy"])) == (correct, count)
    assert float(stats.sums["loss.reward"]) == pytest.approx(total.item(), abs=1e-12)
    loss.backward()
    assert ours.grad is not None
    if count:
        (total / 7).backward()
        assert theirs.grad is not None
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-12, rtol=1e-12)
    assert not ours.grad[ranks == 0].any()


@pytest.mark.parametrize("k", range(2, 10))
def test_without_ties_both_denominators_are_all_pairs(k: int) -> None:
    generator = torch.Generator().manual_seed(k)
    scores = torch.randn(3, k, generator=generator, dtype=torch.float64)
    ranks = torch.stack([torch.randperm(k, generator=generator) + 1 for _ in range(3)])
    surviving, stats = ranking_loss.pairwise(scores, ranks, num_prompts=3)
    every, _ = ranking_loss.pairwise(scores, ranks, num_prompts=3, denominator="all")
    assert surviving == every
    assert int(stats.weights["accuracy"]) == 3 * math.comb(k, 2)


def test_golden_by_hand() -> None:
    """Scores 0, ln 3 with the second better: -log sigmoid(ln 3) = log(4/3); the third, padding, takes no part."""
    scores = torch.tensor([[0.0, math.log(3), 0.0]], requires_grad=True)
    loss, stats = ranking_loss.pairwise(scores, torch.tensor([[2, 1, 0]]), num_prompts=1)
    assert loss.item() == pytest.approx(math.log(4 / 3), rel=1e-6)
    assert stats["accuracy"] == 1.0
    loss.backward()
    assert scores.grad is not None
    torch.testing.assert_close(scores.grad, torch.tensor([[0.25, -0.25, 0.0]]))


def test_all_counts_ties_in_the_denominator_and_surviving_does_not() -> None:
    """Ranks 1, 2, 2 make two equal pairs of log 2 at equal scores: log 2 surviving, 2/3 log 2 over all three."""
    scores, ranks = torch.zeros(1, 3), torch.tensor([[1, 2, 2]])
    surviving, stats = ranking_loss.pairwise(scores, ranks, num_prompts=1)
    every, _ = ranking_loss.pairwise(scores, ranks, num_prompts=1, denominator="all")
    assert surviving.item() == pytest.approx(math.log(2))
    assert every.item() == pytest.approx(math.log(2) * 2 / 3)
    assert stats["accuracy"] == 0.0, "equal scores are not a correct pair"


def test_64_prompts_of_9_responses_are_2304_comparisons() -> None:
    generator = torch.Generator().manual_seed(0)
    ranks = torch.stack([torch.randperm(9, generator=generator) + 1 for _ in range(64)])
    _, stats = ranking_loss.pairwise(torch.zeros(64, 9), ranks, num_prompts=64)
    assert int(stats.weights["accuracy"]) == 2304


def test_shifting_the_scores_changes_nothing() -> None:
    scores, ranks = random_rankings(3, 6, 7, ties=True)
    shifted, scores = (scores + 17.5).requires_grad_(), scores.requires_grad_()
    loss, stats = ranking_loss.pairwise(scores, ranks, num_prompts=6)
    moved, moved_stats = ranking_loss.pairwise(shifted, ranks, num_prompts=6)
    torch.testing.assert_close(moved, loss, atol=1e-12, rtol=0)
    assert moved_stats["accuracy"] == stats["accuracy"]
    loss.backward()
    assert scores.grad is not None
    assert scores.grad.abs().max() > 0.01
    torch.testing.assert_close(scores.grad.sum(1), torch.zeros(6, dtype=torch.float64), atol=1e-12, rtol=0)


def test_micro_batches_add_to_the_batch() -> None:
    scores, ranks = random_rankings(5, 8, 6, ties=True)
    count = ranking_loss.num_ranked(ranks)
    whole, stats = ranking_loss.pairwise(scores, ranks, num_prompts=count)
    parts = [ranking_loss.pairwise(scores[i : i + 3], ranks[i : i + 3], num_prompts=count) for i in (0, 3, 6)]
    torch.testing.assert_close(sum(loss for loss, _ in parts), whole, atol=1e-12, rtol=0)
    added = parts[0][1] + parts[1][1] + parts[2][1]
    assert added.means() == pytest.approx(stats.means())
    assert stats["loss.reward"] == pytest.approx(whole.item())


def test_a_batch_without_pairs_is_zero_with_zero_gradient() -> None:
    scores = torch.randn(2, 3, requires_grad=True)
    ranks = torch.tensor([[1, 1, 1], [1, 0, 0]])
    loss, stats = ranking_loss.pairwise(scores, ranks, num_prompts=ranking_loss.num_ranked(ranks))
    loss.backward()
    assert loss == 0 and stats["loss.reward"] == 0
    assert scores.grad is not None and not scores.grad.any()


def test_another_denominator_is_refused() -> None:
    with pytest.raises(ValueError, match="'surviving' or 'all', not 'pairs'"):
        ranking_loss.pairwise(torch.zeros(1, 2), torch.ones(1, 2), num_prompts=1, denominator="pairs")
