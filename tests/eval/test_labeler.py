"""The simulated labeler: gold order without noise, ties, Bradley-Terry odds with it, and what accuracy is reachable.

Not proved here: that people err like Gumbel noise.
"""

import math

import numpy as np
import pytest

from megatron_rlhf.config.rules import BadInput
from megatron_rlhf.eval.labeler import agreement, oracle_accuracy, rank


def test_without_noise_the_gold_order_is_the_ranking() -> None:
    assert rank([0.1, 2.0, -1.0, 1.0], noise=0, generator=1) == [3, 1, 4, 2]
    assert rank([], noise=0.45, generator=1) == []


def test_close_golds_share_a_rank_measured_from_its_best() -> None:
    """1.00, 0.97, 0.94 with ties 0.05: the third is 0.06 below the first of its rank, so it opens the next one."""
    assert rank([0.97, 1.0, 0.94, 0.0], noise=0, generator=1) == [1, 1, 2, 3]
    assert rank([0.5, 0.5, 0.2], noise=0, generator=1, ties=0) == [1, 1, 2], "equal golds tie at any width"


def test_a_pair_is_labeled_in_gold_order_as_bradley_and_terry_say() -> None:
    """A gap of 0.5 under Gumbel(0.45) is ordered rightly with probability 1 / (1 + exp(-0.5 / 0.45)) = 0.752."""
    generator = np.random.default_rng(7)
    trials = 20_000
    hits = sum(rank([0.5, 0.0], noise=0.45, generator=generator, ties=0) == [1, 2] for _ in range(trials))
    expected = 1 / (1 + math.exp(-0.5 / 0.45))
    assert hits / trials == pytest.approx(expected, abs=4 * math.sqrt(expected * (1 - expected) / trials))


def test_a_seed_is_deterministic_and_a_generator_moves_on() -> None:
    golds = [0.1 * k for k in range(9)]
    assert rank(golds, noise=0.45, generator=3) == rank(golds, noise=0.45, generator=3)
    generator = np.random.default_rng(3)
    assert len({tuple(rank(golds, noise=0.45, generator=generator)) for _ in range(5)}) > 1


def test_accuracies_by_hand() -> None:
    """Pairs of ranks [1, 2, 2, 0]: (0, 1) right, (0, 2) equal golds, half; ties and padding apart: 1.5 / 2."""
    assert oracle_accuracy([[1.0, 0.5, 1.0, 9.0]], [[1, 2, 2, 0]]) == 0.75
    assert oracle_accuracy([[1.0, 0.0], [1.0, 0.0]], [[1, 2], [2, 1]]) == 0.5
    assert agreement([[1, 2, 3]], [[1, 3, 2]]) == pytest.approx(2 / 3)
    assert agreement([[1, 2, 2, 1]], [[1, 2, 3, 0]]) == 1.0
    with pytest.raises(BadInput, match="no pair is left"):
        oracle_accuracy([[1.0, 2.0]], [[1, 1]])


def test_oracle_accuracy_meets_the_quickstarts_noise() -> None:
    """Golds of spread 0.79 (the corpus replies) under Gumbel(0.45): near 0.82, labelers agree near 0.75."""
    generator = np.random.default_rng(0)
    golds = list(generator.normal(1.15, 0.79, (1500, 4)))
    one = [rank(row, noise=0.45, generator=generator) for row in golds]
    other = [rank(row, noise=0.45, generator=generator) for row in golds]
    assert oracle_accuracy(golds, one) == pytest.approx(0.82, abs=0.02)
    assert agreement(one, other) == pytest.approx(0.75, abs=0.02)


@pytest.mark.parametrize(
    ("golds", "noise", "ties", "said"),
    [([math.nan], 0.4, 0.05, "not finite"), ([1.0], -1.0, 0.05, "noise"), ([1.0], 0.4, math.nan, "tie width")],
)
def test_bad_input_is_one_sentence(golds: list[float], noise: float, ties: float, said: str) -> None:
    with pytest.raises(BadInput, match=said):
        rank(golds, noise=noise, generator=1, ties=ties)
