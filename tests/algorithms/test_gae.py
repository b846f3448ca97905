"""Masked GAE equals the definition, summed term by term, and nothing passes the end token.

Not proved here: that the mask ends at the end token.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_rlhf.algorithms import gae


def brute_force(rewards: list[float], values: list[float], gamma: float, lam: float) -> tuple[list[float], list[float]]:
    """A_t = sum over l of (gamma lam)^l delta_{t+l}, of one response without padding."""
    length = len(rewards)
    following = [*values[1:], 0.0]
    delta = [rewards[t] + gamma * following[t] - values[t] for t in range(length)]
    result = [sum((gamma * lam) ** (u - t) * delta[u] for u in range(t, length)) for t in range(length)]
    return result, [a + v for a, v in zip(result, values, strict=True)]


def episodes(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rewards, values and mask of 6 responses of 0 to 9 tokens; padding holds large numbers."""
    generator = torch.Generator().manual_seed(seed)
    mask = (torch.arange(9) < torch.randint(0, 10, (6, 1), generator=generator)).double()
    rewards, values = torch.randn(2, 6, 9, generator=generator, dtype=torch.float64)
    return rewards + 1e3 * (1 - mask), values - 1e3 * (1 - mask), mask


@settings(max_examples=60, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10_000), gamma=st.floats(0, 1), lam=st.floats(0, 1))
def test_equals_brute_force_on_masked_episodes(seed: int, gamma: float, lam: float) -> None:
    rewards, values, mask = episodes(seed)
    advantages, returns = gae.advantages(rewards, values, mask, gamma=gamma, lam=lam)
    for b in range(6):
        n = int(mask[b].sum())
        expected = brute_force(rewards[b, :n].tolist(), values[b, :n].tolist(), gamma, lam)
        assert advantages[b, :n].tolist() == pytest.approx(expected[0], abs=1e-9)
        assert returns[b, :n].tolist() == pytest.approx(expected[1], abs=1e-9)
        assert not advantages[b, n:].any() and not returns[b, n:].any()


def test_by_hand() -> None:
    """Reward 1 at the end, values 1/2: delta = 0, 0, 1/2, so A = 0.95^2 / 2, 0.95 / 2, 1/2."""
    rewards, values = torch.tensor([[0.0, 0.0, 1.0]]), torch.full((1, 3), 0.5)
    advantages, returns = gae.advantages(rewards, values, torch.ones(1, 3), gamma=1.0, lam=0.95)
    torch.testing.assert_close(advantages, torch.tensor([[0.45125, 0.475, 0.5]]))
    torch.testing.assert_close(returns, torch.tensor([[0.95125, 0.975, 1.0]]))


def test_gamma_1_lambda_1_is_return_minus_value() -> None:
    rewards, values, mask = episodes(4)
    advantages, returns = gae.advantages(rewards, values, mask, gamma=1.0, lam=1.0)
    left = (rewards * mask).flip(1).cumsum(1).flip(1) * mask
    torch.testing.assert_close(returns, left, atol=1e-9, rtol=0)
    torch.testing.assert_close(advantages, left - values * mask, atol=1e-9, rtol=0)


def test_lambda_0_is_the_one_step_error() -> None:
    rewards, values, mask = episodes(5)
    advantages, _ = gae.advantages(rewards, values, mask, gamma=0.9, lam=0.0)
    following = torch.nn.functional.pad(values * mask, (0, 1))[:, 1:]
    torch.testing.assert_close(advantages, (rewards + 0.9 * following - values) * mask, atol=1e-9, rtol=0)


def test_padding_is_never_read() -> None:
    rewards, values, mask = episodes(6)
    clean = gae.advantages(rewards * mask, values * mask, mask, gamma=0.99, lam=0.95)
    nowhere = torch.full_like(mask, float("nan")).masked_fill(mask > 0, 0)
    dirty = gae.advantages(rewards + nowhere, values + nowhere, mask, gamma=0.99, lam=0.95)
    assert torch.equal(clean[0], dirty[0]) and torch.equal(clean[1], dirty[1])


def test_the_inputs_stay_and_no_gradient_flows() -> None:
    rewards, values, mask = episodes(7)
    before = rewards.clone(), values.clone()
    advantages, returns = gae.advantages(rewards, values.requires_grad_(), mask, gamma=1.0, lam=0.95)
    assert torch.equal(rewards, before[0]) and torch.equal(values, before[1])
    assert not advantages.requires_grad and not returns.requires_grad
