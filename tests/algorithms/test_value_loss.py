"""The clipped value loss equals a loop over tokens, and the explained variance comes out of added Stats.

Not proved here: that the clip helps; the paper leaves it open.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_rlhf.algorithms import value_loss


def tokens(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """New values, old values, returns and mask [4, 6]; padding is NaN."""
    generator = torch.Generator().manual_seed(seed)
    mask = (torch.rand(4, 6, generator=generator) < 0.7).double()
    nowhere = torch.full_like(mask, float("nan")).masked_fill(mask > 0, 0)
    old, move, returns = torch.randn(3, 4, 6, generator=generator, dtype=torch.float64) + nowhere
    return old + 0.4 * move, old, returns, mask


@settings(max_examples=40, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10_000), clip=st.sampled_from([0.0, 0.05, 0.2, 1.0]))
def test_equals_a_loop_over_tokens(seed: int, clip: float) -> None:
    values, old, returns, mask = tokens(seed)
    values = values.requires_grad_()
    loss, stats = value_loss.clipped(values, old, returns, mask, clip=clip, num_tokens=50)
    loss.backward()
    total, gradient = 0.0, torch.zeros_like(mask)
    stopped, error_sum, square, linear = 0, 0.0, 0.0, 0.0
    for b, t in mask.nonzero().tolist():
        v, o, r = values[b, t].item(), old[b, t].item(), returns[b, t].item()
        near = o + min(max(v - o, -clip), clip) if clip else v
        total += 0.5 * max((v - r) ** 2, (near - r) ** 2)
        stops = (near - r) ** 2 > (v - r) ** 2
        gradient[b, t] = 0.0 if stops else (v - r) / 50
        stopped, error_sum = stopped + stops, error_sum + (v - r) ** 2
        square, linear = square + r**2, linear + r
    assert loss.item() == pytest.approx(total / 50, abs=1e-12)
    assert values.grad is not None
    torch.testing.assert_close(values.grad, gradient, atol=1e-12, rtol=1e-9)
    assert {name: float(item) for name, item in stats.sums.items()} == pytest.approx(
        {
            "loss.value": total,
            "value.clip_fraction": stopped,
            "value.error": error_sum,
            "return.square": square,
            "return.mean": linear,
        }
    )
    assert {float(weight) for weight in stats.weights.values()} == {float(mask.sum())}
    assert not any(item.requires_grad for item in stats.sums.values())


def test_by_hand() -> None:
    """From 0 to 1, return 1, clip 0.2: the clipped value 0.2 is off by 0.8, so 0.5 x 0.64 = 0.32 without gradient."""
    values = torch.tensor([[1.0]], requires_grad=True)
    one = torch.ones(1, 1)
    loss, stats = value_loss.clipped(values, 0 * one, one, one, clip=0.2, num_tokens=1)
    loss.backward()
    assert loss.item() == pytest.approx(0.32)
    assert values.grad is not None and values.grad.item() == 0.0
    assert stats["value.clip_fraction"] == 1.0 and stats["value.error"] == 0.0


def test_explained_variance_from_added_stats() -> None:
    values, old, returns, mask = tokens(9)
    parts = [
        value_loss.clipped(values[rows], old[rows], returns[rows], mask[rows], clip=0.2, num_tokens=1)[1]
        for rows in (slice(0, 3), slice(3, 4))
    ]
    v, r = values[mask > 0], returns[mask > 0]
    expected = 1 - ((v - r) ** 2).mean() / r.var(unbiased=False)
    assert value_loss.explained_variance(parts[0] + parts[1]) == pytest.approx(expected.item())


def test_explained_variance_of_perfect_mean_and_constant_returns() -> None:
    returns, mask = torch.tensor([[1.0, 3.0]]), torch.ones(1, 2)
    perfect = value_loss.clipped(returns, returns, returns, mask, clip=0.2, num_tokens=2)[1]
    mean = value_loss.clipped(returns * 0 + 2, returns, returns, mask, clip=0.2, num_tokens=2)[1]
    constant = value_loss.clipped(returns, returns, returns * 0 + 2, mask, clip=0.2, num_tokens=2)[1]
    assert value_loss.explained_variance(perfect) == 1.0
    assert value_loss.explained_variance(mean) == 0.0
    assert value_loss.explained_variance(constant) == 0.0


def test_empty_rows_cost_nothing_and_micro_batches_add() -> None:
    batch = tokens(3)
    count = batch[3].sum()
    whole, _ = value_loss.clipped(*batch, clip=0.2, num_tokens=count)
    parts = [value_loss.clipped(*(x[i : i + 1] for x in batch), clip=0.2, num_tokens=count)[0] for i in range(4)]
    torch.testing.assert_close(sum(parts), whole, atol=1e-12, rtol=0)
    zeros = torch.zeros(2, 3)
    assert value_loss.clipped(zeros, zeros, zeros, zeros, clip=0.2, num_tokens=0)[0] == 0
