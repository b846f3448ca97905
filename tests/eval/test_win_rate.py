"""Win rates: by hand, deterministic, the interval's coverage in simulation, and the sizes that the paper's need.

Not proved here: coverage where prompts depend on each other (several of one user), or over training seeds.
"""

import math

import numpy as np
import pytest

from megatron_rlhf.config.rules import BadInput
from megatron_rlhf.eval.win_rate import needed, win_rate


def test_mean_by_hand_with_ties_at_one_half() -> None:
    rate = win_rate([1, 2, 3, 4], [0, 2, 4, 1], seed=1)
    assert (rate.mean, rate.n) == (0.625, 4)
    assert 0 <= rate.low < rate.mean < rate.high <= 1
    assert rate.as_dict() == {"mean": rate.mean, "low": rate.low, "high": rate.high, "n": 4}


def test_same_seed_same_interval_and_sides_mirror() -> None:
    generator = np.random.default_rng(0)
    left, right = generator.normal(0.5, 1, 300), generator.normal(0, 1, 300)
    rate = win_rate(left, right, seed=5)
    assert rate == win_rate(left, right, seed=5)
    mirrored = win_rate(right, left, seed=5)
    assert mirrored.mean == pytest.approx(1 - rate.mean)
    assert mirrored.low == pytest.approx(1 - rate.high, abs=0.01)


@pytest.mark.parametrize("p", [0.5, 0.7, 0.85])
def test_the_interval_covers_p_in_93_to_97_percent_of_trials(p: float) -> None:
    """1,000 runs of 300 prompts each, won with known probability p."""
    wins_TN = np.random.default_rng(11).random((1000, 300)) < p
    losses = np.zeros(300)
    rates = [win_rate(wins_N * 2.0 - 1.0, losses, seed=trial) for trial, wins_N in enumerate(wins_TN)]
    covered = np.mean([rate.low <= p <= rate.high for rate in rates])
    assert 0.93 <= covered <= 0.97
    width = np.mean([rate.high - rate.low for rate in rates])
    assert width == pytest.approx(2 * 1.96 * math.sqrt(p * (1 - p) / 300), rel=0.03)


def test_the_interval_is_that_of_the_resamples_of_nine_wins_in_ten() -> None:
    """Wins of a resample are Binomial(10, 0.9): P(<= 6) = 0.013 and P(<= 7) = 0.070, so the 2.5 % quantile is 0.7."""
    rate = win_rate([1.0] * 9 + [-1.0], [0.0] * 10, seed=4)
    assert (rate.low, rate.high) == pytest.approx((0.7, 1.0))


def test_ties_narrow_the_interval() -> None:
    """Half ties, a quarter wins, a quarter losses: variance 1/8 a prompt, not 1/4."""
    left = [1.0] * 100 + [0.0] * 200 + [-1.0] * 100
    rate = win_rate(left, [0.0] * 400, seed=2)
    assert rate.mean == 0.5
    assert rate.high - rate.low == pytest.approx(2 * 1.96 * math.sqrt(0.125 / 400), rel=0.06)


def test_unanimous_outcomes_keep_an_honest_width() -> None:
    """All of 100 won: a loss may still have probability 1 - 0.025 ** 0.01 = 0.0362."""
    rate = win_rate([1.0] * 100, [0.0] * 100, seed=1)
    assert (rate.mean, rate.high) == (1.0, 1.0)
    assert rate.low == pytest.approx(0.9638, abs=1e-4)
    tied = win_rate([1.0] * 100, [1.0] * 100, seed=1)
    assert tied.low < tied.mean == 0.5 < tied.high


def test_sample_sizes_of_the_papers_intervals() -> None:
    """85 +- 3: 544.2, 71 +- 4: 494.4, 73.4 +- 2: 1,875.1 prompts, rounded up."""
    assert [needed(0.85, 0.03), needed(0.71, 0.04), needed(0.734, 0.02)] == [545, 495, 1876]
    with pytest.raises(BadInput, match="no sample size"):
        needed(1.0, 0.03)


@pytest.mark.parametrize(("left", "right"), [([], []), ([1.0], [1.0, 2.0]), ([math.nan], [1.0])])
def test_bad_input_is_refused(left: list[float], right: list[float]) -> None:
    with pytest.raises(BadInput):
        win_rate(left, right, seed=1)
