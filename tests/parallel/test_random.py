"""Proves that the counter noise is standard Gumbel, independent between rows and words, and the same however rows and
words are split over ranks.

Not proved here: a full battery of randomness tests; equal bits on CUDA.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from megatron_rlhf.parallel.random import gumbel

_MEAN, _VARIANCE = 0.5772156649, math.pi**2 / 6


def _noise(rows: int, columns: int, seed: int = 1, iteration: int = 2, position: int = 3) -> Tensor:
    return gumbel(seed, iteration, torch.arange(rows), torch.full((rows,), position), 0, columns)


def _correlation(left: Tensor, right: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([left.flatten(), right.flatten()]).double())[0, 1])


def test_moments_and_quantiles_are_gumbels() -> None:
    """Mean, variance and the distribution function of 2^20 draws, within 5 standard errors; every draw finite."""
    noise = _noise(1024, 1024).double()
    count = noise.numel()
    assert noise.isfinite().all()
    assert float(noise.mean()) == pytest.approx(_MEAN, abs=5 * math.sqrt(_VARIANCE / count))
    # the fourth central moment of a Gumbel is 5.4 variances squared
    assert float(noise.var()) == pytest.approx(_VARIANCE, abs=5 * _VARIANCE * math.sqrt(4.4 / count))
    uniform = (-(-noise).exp()).exp().flatten().sort().values
    distance = (uniform - torch.arange(count) / count).abs().max()
    assert float(distance) < 2.2 / math.sqrt(count)


@pytest.mark.parametrize("what", ["word", "far word", "sequence", "position", "iteration", "seed", "high bits"])
def test_neighbours_are_uncorrelated(what: str) -> None:
    """Draws that differ in one counter only have correlation 0 within 5 standard errors."""
    base = _noise(512, 512)
    position = torch.full((512,), 3)
    pairs = {
        "word": (base[:, 1:], base[:, :-1]),
        "far word": (base[:, 256:], base[:, :256]),
        "sequence": (base[1:], base[:-1]),
        "position": (base, _noise(512, 512, position=4)),
        "iteration": (base, _noise(512, 512, iteration=3)),
        "seed": (base, _noise(512, 512, seed=2)),
        "high bits": (base, gumbel(1, 2, torch.arange(512) + (1 << 32), position, 0, 512)),
    }
    left, right = pairs[what]
    assert abs(_correlation(left, right)) < 5 / math.sqrt(left.numel())
    assert abs(_correlation(left.exp().clamp(max=50), right.exp().clamp(max=50))) < 5 / math.sqrt(left.numel())


@pytest.mark.parametrize("along", ["sequences", "words"])
def test_no_pair_is_correlated(along: str) -> None:
    """Of all 130,816 pairs of 512 rows (or words) none has a correlation beyond 6 standard errors.

    A mean over pairs cannot see pairs that go together and pairs that go against each other.
    """
    noise = _noise(512, 4096) if along == "sequences" else _noise(4096, 512).t()
    uniform = (-(-noise.double()).exp()).exp()
    correlations = torch.corrcoef(uniform).fill_diagonal_(0)
    assert float(correlations.abs().max()) < 6 / math.sqrt(4096)


def test_counters_do_not_stand_in_for_each_other() -> None:
    """Swapping or shifting counters (seed, iteration, sequence, position) gives other noise."""
    rows = [(1, 2, 3, 4), (2, 1, 3, 4), (1, 2, 4, 3), (1, 3, 2, 4), (4, 3, 2, 1), (1 << 32, 2, 3, 4), (0, 2, 3, 4)]
    drawn = [gumbel(a, b, torch.tensor([c]), torch.tensor([d]), 0, 64) for a, b, c, d in rows]
    for place, noise in enumerate(drawn):
        assert not any(torch.equal(noise, other) for other in drawn[:place])


def test_argmax_draws_from_the_softmax() -> None:
    """Frequencies of 65,536 Gumbel-max draws fit softmax probabilities (chi-square, 15 degrees, p > 1e-5)."""
    logits = torch.linspace(-3, 2, 16)
    draws = torch.cat([_noise(4096, 16, position=place) for place in range(16)])
    counts = torch.bincount((logits + draws).argmax(1), minlength=16).double()
    expected = torch.softmax(logits.double(), 0) * len(draws)
    assert float(((counts - expected) ** 2 / expected).sum()) < 49.5


def test_any_split_draws_the_same_noise() -> None:
    """Slices of the vocabulary, reordered rows and single rows are bit-equal to the whole, chunks of rows included."""
    sequence, position = torch.tensor([5, 900, 5, 2**33 + 1]), torch.tensor([0, 7, 1, 511])
    columns = 70000
    whole = gumbel(-3, 11, sequence, position, 0, columns)
    slices = [gumbel(-3, 11, sequence, position, start, columns // 4) for start in range(0, columns, columns // 4)]
    assert torch.equal(torch.cat(slices, 1), whole)
    order = torch.tensor([2, 0, 3, 1])
    assert torch.equal(gumbel(-3, 11, sequence[order], position[order], 0, columns), whole[order])
    assert torch.equal(gumbel(-3, 11, sequence[1:2], position[1:2], 600, 40), whole[1:2, 600:640])


def test_the_noise_never_changes() -> None:
    """These values were drawn by the first release; other ones would change every seeded run."""
    noise = gumbel(7, 1, torch.tensor([2]), torch.tensor([3]), 4, 4)
    assert noise.dtype == torch.float32
    assert noise[0].tolist() == pytest.approx([1.4976137, 0.5929104, 2.5530665, 1.8599112], abs=1e-6)


def test_no_rows_and_no_words() -> None:
    """Empty batches and empty slices give empty noise."""
    assert _noise(0, 5).shape == (0, 5)
    assert _noise(3, 0).shape == (3, 0)
