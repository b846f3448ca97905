"""The KL estimators have the bias and spread that theory gives them; the coefficient follows its target.

Not proved here: that the log-probs handed in are those of the drawn tokens.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rlhf.algorithms import kl


def moments(mean: float, kind: str) -> tuple[float, float]:
    """Mean and standard deviation of an estimator over x ~ N(0, 1), against N(`mean`, 1), by quadrature."""
    x = torch.linspace(-12, 12, 20_001, dtype=torch.float64)
    weight = torch.softmax(-(x**2) / 2, 0)
    estimate = kl.estimate(-(x**2) / 2, -((x - mean) ** 2) / 2, kind)  # type: ignore[arg-type]
    first = (weight * estimate).sum()
    return first.item(), (weight * (estimate - first) ** 2).sum().sqrt().item()


@pytest.mark.parametrize(
    ("mean", "kind", "bias", "spread"),
    [
        (0.1, "k1", 0.0, 20.0),
        (0.1, "k2", 0.0025, 1.42),
        (0.1, "k3", 0.0, 1.42),
        (1.0, "k1", 0.0, 2.0),
        (1.0, "k2", 0.25, 1.73),
        (1.0, "k3", 0.0, 1.7),
    ],
)
def test_bias_and_spread_over_the_true_kl(mean: float, kind: str, bias: float, spread: float) -> None:
    """KL(N(0, 1) || N(m, 1)) is m^2 / 2; the table is in units of it."""
    true = mean**2 / 2
    first, deviation = moments(mean, kind)
    assert first / true - 1 == pytest.approx(bias, abs=1e-4 + 0.01 * bias)
    assert deviation / true == pytest.approx(spread, rel=0.01)


def test_by_hand() -> None:
    """delta = log 2: k1 = log 2, k2 = (log 2)^2 / 2, k3 = 1/2 - 1 + log 2."""
    logprobs, reference = torch.tensor(0.5).log(), torch.tensor(0.25).log()
    assert kl.estimate(logprobs, reference).item() == pytest.approx(math.log(2))
    assert kl.estimate(logprobs, reference, "k2").item() == pytest.approx(math.log(2) ** 2 / 2)
    assert kl.estimate(logprobs, reference, "k3").item() == pytest.approx(math.log(2) - 0.5)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.floats(-20, 0), st.floats(-20, 0)), min_size=1, max_size=8))
def test_k2_and_k3_are_never_negative_and_equal_log_probs_give_exactly_0(pairs: list[tuple[float, float]]) -> None:
    logprobs, reference = (torch.tensor(column, dtype=torch.float64) for column in zip(*pairs, strict=True))
    assert (kl.estimate(logprobs, reference, "k2") >= 0).all()
    assert (kl.estimate(logprobs, reference, "k3") >= -1e-15).all()
    same = logprobs.float()
    assert not torch.stack([kl.estimate(same, same, "k1"), kl.estimate(same, same, "k2")]).any()
    assert not kl.estimate(same, same, "k3").any()


def test_small_differences_keep_their_precision() -> None:
    """k3 is delta^2 / 2 for a small delta, where e^-delta - 1 in fp32 has lost half its digits."""
    delta = torch.tensor([1e-3, -1e-3])
    exact = torch.expm1(-delta.double()) + delta.double()
    torch.testing.assert_close(kl.estimate(delta, torch.zeros(2), "k3").double(), exact, atol=1e-10, rtol=0)


def test_another_estimator_is_refused() -> None:
    with pytest.raises(ValueError, match="k1, k2 or k3, not 'k4'"):
        kl.estimate(torch.zeros(1), torch.zeros(1), "k4")  # type: ignore[arg-type]


def test_adaptive_golden() -> None:
    """KL 12 is twice the target, the error clips to 0.2: x (1 + 0.2 x 512 / 10000) = x 1.01024."""
    adapted = kl.Coefficient(0.15, adaptive=True, target=6.0, horizon=10000.0).adapted(12.0, 512)
    assert adapted.coef == pytest.approx(0.151536, abs=1e-12)
    assert (adapted.adaptive, adapted.target, adapted.horizon) == (True, 6.0, 10000.0)


@pytest.mark.parametrize(("value", "error"), [(0.0, -0.2), (5.4, -0.1), (6.0, 0.0), (6.6, 0.1), (-3.0, -0.2)])
def test_adaptive_follows_the_clipped_error(value: float, error: float) -> None:
    adapted = kl.Coefficient(0.1, adaptive=True, target=6.0, horizon=1000.0).adapted(value, 100)
    assert adapted.coef == pytest.approx(0.1 * (1 + error / 10))


def test_a_fixed_coefficient_stays() -> None:
    fixed = kl.Coefficient(0.02)
    assert fixed.adapted(50.0, 512) is fixed


def test_a_kl_that_is_not_finite_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot follow a KL of nan"):
        kl.Coefficient(0.02, adaptive=True).adapted(float("nan"), 512)
