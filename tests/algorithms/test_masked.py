"""Whitening and masked moments: golden values of lm-human-preferences, the mask, and moments from outside.

Not proved here: that moments of a batch spread over ranks are measured over all of it.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rlhf.algorithms import masked

X = torch.tensor([[1.2, 1.3, 1.4], [1.5, 1.6, 1.7], [1.8, 1.9, 2.0]])
ALL = torch.ones_like(X)
BIASED = [[0.0508, 0.4381, 0.8254], [1.2127, 1.6, 1.9873], [2.3746, 2.7619, 3.1492]]
UNBIASED = [[0.1394, 0.5046, 0.8697], [1.2349, 1.6, 1.9651], [2.3303, 2.6954, 3.0606]]


def test_whiten_golden_is_the_biased_one() -> None:
    whitened = masked.whiten(X, ALL, shift_mean=False)
    torch.testing.assert_close(whitened, torch.tensor(BIASED), atol=6e-5, rtol=0)
    assert (whitened - torch.tensor(UNBIASED)).abs().max() > 0.05


def test_whiten_takes_moments_from_outside() -> None:
    unbiased = X.mean(), X.var(unbiased=True)
    whitened = masked.whiten(X, ALL, shift_mean=False, moments=unbiased)
    torch.testing.assert_close(whitened, torch.tensor(UNBIASED), atol=6e-5, rtol=0)


def test_shift_mean_removes_the_mean() -> None:
    shifted = masked.whiten(X, ALL, shift_mean=True)
    torch.testing.assert_close(shifted, torch.tensor(BIASED) - 1.6, atol=6e-5, rtol=0)


def test_moments_by_hand() -> None:
    """Of 1, 3 and an ignored 100: mean 2, variance ((-1)^2 + 1^2) / 2 = 1."""
    center, variance = masked.moments(torch.tensor([1.0, 3.0, 100.0]), torch.tensor([1.0, 1.0, 0.0]))
    assert (center.item(), variance.item()) == (2.0, 1.0)


def test_an_empty_mask_gives_zeros() -> None:
    empty = torch.zeros_like(X)
    assert masked.mean(X, empty) == 0
    assert torch.equal(masked.whiten(X, empty, shift_mean=True), empty)
    assert masked.share(X.sum() * 0, 0) == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_masked_out_values_reach_neither_results_nor_gradients(bad: float) -> None:
    x = torch.tensor([1.0, 2.0, bad], requires_grad=True)
    mask = torch.tensor([1.0, 1.0, 0.0])
    assert masked.mean(x, mask) == 1.5
    assert masked.whiten(x, mask, shift_mean=True)[2] == 0
    masked.mean(x, mask).backward()
    assert x.grad is not None and x.grad.tolist() == [0.5, 0.5, 0.0]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10_000),
    scale=st.floats(0.1, 50),
    shift=st.floats(-20, 20),
)
def test_whitened_has_mean_0_and_variance_1_whatever_scale_and_shift(seed: int, scale: float, shift: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4, 7, generator=generator, dtype=torch.float64)
    mask = (torch.rand(4, 7, generator=generator) < 0.6).double()
    mask[0, :2] = 1
    whitened = masked.whiten(x * scale + shift, mask, shift_mean=True)
    center, variance = masked.moments(whitened, mask)
    assert abs(center) < 1e-9
    assert abs(variance - 1) < 1e-3
    torch.testing.assert_close(whitened, masked.whiten(x, mask, shift_mean=True), atol=1e-3, rtol=1e-3)
    assert not whitened[mask == 0].any()
