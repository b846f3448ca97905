"""A simulated labeler: ranks responses by gold score plus Gumbel noise, so that pairs follow Bradley and Terry.

The difference of two Gumbel(s) variables is logistic with scale s: a pair of gold gap g is labeled in gold order with
probability 1 / (1 + exp(-g / s)), the model that equation (1) of InstructGPT (arXiv 2203.02155) fits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import combinations

import numpy as np

from megatron_rlhf.config.rules import BadInput


def rank(
    golds: Sequence[float], *, noise: float, generator: np.random.Generator | int, ties: float = 0.05
) -> list[int]:
    """The rank of each response, 1 is best: golds plus Gumbel(`noise`), sorted.

    A perturbed gold less than `ties` below the best of its rank shares that rank; ranks have no gaps. An integer
    `generator` is a seed: give each prompt its own. Raises BadInput on golds, noise or ties that are not finite.
    """
    if not all(math.isfinite(gold) for gold in golds):
        raise BadInput(f"a labeler cannot rank golds that are not finite: {list(golds)}; drop the broken response")
    if not (math.isfinite(noise) and noise >= 0):
        raise BadInput(f"the labeler's noise is {noise}; it must be 0 or more, for example rank.noise=0.45")
    if not (math.isfinite(ties) and ties >= 0):
        raise BadInput(f"the labeler's tie width is {ties}; it must be 0 or more, for example 0.05")
    drawn = np.random.default_rng(generator).gumbel(0.0, 1.0, len(golds))
    perturbed = np.asarray(golds, dtype=np.float64) + noise * drawn
    ranks, place, best = [0] * len(golds), 0, math.inf
    for index in np.argsort(-perturbed, kind="stable"):
        if place == 0 or (perturbed[index] != best and best - perturbed[index] >= ties):
            place, best = place + 1, float(perturbed[index])
        ranks[index] = place
    return ranks


def oracle_accuracy(golds: Sequence[Sequence[float]], ranks: Sequence[Sequence[int]]) -> float:
    """The share of labeled pairs, ties and padding (rank 0) apart, that the true gold order gets right.

    What a perfect reward model would reach against these labels; equal golds count half. Raises BadInput where no pair
    is left.
    """
    return _share(
        0.5 if better == worse else float(better > worse)
        for golds_K, ranks_K in zip(golds, ranks, strict=True)
        for better, worse in _pairs(golds_K, ranks_K)
    )


def agreement(left: Sequence[Sequence[int]], right: Sequence[Sequence[int]]) -> float:
    """The share of pairs that two labelers order alike, of the pairs that neither ties (InstructGPT section 3.4).

    Raises BadInput where no pair is left.
    """
    return _share(
        float(better < worse)
        for left_K, right_K in zip(left, right, strict=True)
        for better, worse in _pairs(left_K, right_K)
        if better != worse and min(better, worse) > 0
    )


def _pairs(values: Sequence[float], ranks: Sequence[int]) -> Iterator[tuple[float, float]]:
    """(value of the better, value of the worse) of every pair of one prompt whose ranks differ."""
    for (one, first), (other, second) in combinations(zip(values, ranks, strict=True), 2):
        if first > 0 and second > 0 and first != second:
            yield (one, other) if first < second else (other, one)


def _share(hits: Iterator[float]) -> float:
    """The mean of `hits`; raises BadInput where there are none."""
    found = list(hits)
    if not found:
        raise BadInput("no pair is left to compare: every pair is a tie or padding; rank more prompts")
    return sum(found) / len(found)
