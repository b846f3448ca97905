"""The clipped surrogate equals a loop over tokens, in value and gradient, and its Stats are what they are called.

Not proved here: that old and new log-probs agree before the first update; the recipe demands it.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_rlhf.algorithms import policy_loss


def tokens(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """New and old log-probs, advantages and mask [4, 6]; padding is NaN."""
    generator = torch.Generator().manual_seed(seed)
    mask = (torch.rand(4, 6, generator=generator) < 0.7).double()
    old = -torch.rand(4, 6, generator=generator, dtype=torch.float64)
    new = old + 0.4 * torch.randn(4, 6, generator=generator, dtype=torch.float64)
    nowhere = torch.full_like(mask, float("nan")).masked_fill(mask > 0, 0)
    advantages = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    return new + nowhere, old + nowhere, advantages + nowhere, mask


@settings(max_examples=40, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10_000), clip=st.floats(0.01, 0.5))
def test_equals_a_loop_over_tokens(seed: int, clip: float) -> None:
    new, old, advantages, mask = tokens(seed)
    new = new.requires_grad_()
    loss, stats = policy_loss.clipped(new, old, advantages, mask, clip=clip, num_tokens=50)
    loss.backward()
    total, gradient = 0.0, torch.zeros_like(mask)
    sums = dict.fromkeys(("clip_fraction", "ratio", "ratio_error", "kl.update"), 0.0)
    for b, t in mask.nonzero().tolist():
        log_ratio = new[b, t].item() - old[b, t].item()
        ratio, advantage = math.exp(log_ratio), advantages[b, t].item()
        bounded = min(max(ratio, 1 - clip), 1 + clip)
        total += max(-advantage * ratio, -advantage * bounded)
        stopped = -advantage * bounded > -advantage * ratio
        gradient[b, t] = 0.0 if stopped else -advantage * ratio / 50
        sums["clip_fraction"] += stopped
        sums["ratio"] += ratio
        sums["ratio_error"] += abs(ratio - 1)
        sums["kl.update"] += ratio - 1 - log_ratio
    assert loss.item() == pytest.approx(total / 50, abs=1e-12)
    assert new.grad is not None
    torch.testing.assert_close(new.grad, gradient, atol=1e-12, rtol=1e-9)
    assert {name: float(stats.sums[name]) for name in sums} == pytest.approx(sums, abs=1e-9)
    assert float(stats.sums["loss.policy"]) == pytest.approx(total, abs=1e-9)
    assert {float(weight) for weight in stats.weights.values()} == {float(mask.sum())}
    assert not any(item.requires_grad for item in stats.sums.values())


def test_by_hand() -> None:
    """Ratio 2 at clip 0.2: A = 1 earns 1.2 (clipped, no gradient), A = -1 costs 2 (not clipped)."""
    new = torch.tensor([[0.0, 0.0]], requires_grad=True)
    old = torch.full((1, 2), -math.log(2))
    loss, stats = policy_loss.clipped(new, old, torch.tensor([[1.0, -1.0]]), torch.ones(1, 2), clip=0.2, num_tokens=2)
    loss.backward()
    assert loss.item() == pytest.approx((-1.2 + 2.0) / 2)
    assert new.grad is not None
    torch.testing.assert_close(new.grad, torch.tensor([[0.0, 1.0]]))
    assert stats["clip_fraction"] == 0.5 and stats["ratio"] == pytest.approx(2.0)


def test_equal_log_probs_have_ratio_exactly_1_and_the_policy_gradient() -> None:
    _, old, advantages, mask = tokens(2)
    new = old.clone().requires_grad_()
    loss, stats = policy_loss.clipped(new, old, advantages, mask, clip=0.2, num_tokens=mask.sum())
    loss.backward()
    assert stats["ratio"] == 1.0
    assert stats["ratio_error"] == stats["kl.update"] == stats["clip_fraction"] == 0.0
    assert new.grad is not None
    torch.testing.assert_close(new.grad, -torch.nan_to_num(advantages) * mask / mask.sum())


def test_micro_batches_add_to_the_batch() -> None:
    batch = tokens(3)
    count = batch[3].sum()
    whole, stats = policy_loss.clipped(*batch, clip=0.2, num_tokens=count)
    parts = [
        policy_loss.clipped(*(item[rows] for item in batch), clip=0.2, num_tokens=count)
        for rows in (slice(0, 1), slice(1, 4))
    ]
    torch.testing.assert_close(parts[0][0] + parts[1][0], whole, atol=1e-12, rtol=0)
    assert (parts[0][1] + parts[1][1]).means() == pytest.approx(stats.means())
    assert stats["loss.policy"] == pytest.approx(whole.item())


def test_empty_rows_cost_nothing() -> None:
    zeros = torch.zeros(2, 3)
    loss, stats = policy_loss.clipped(zeros, zeros, zeros, zeros, clip=0.2, num_tokens=0)
    assert loss == 0 and stats["ratio"] == 0
