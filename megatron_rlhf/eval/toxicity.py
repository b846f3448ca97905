"""Probability that a text is offensive, by a linear classifier trained on people's labels (alt-profanity-check, MIT).

Without the package neither the gold preference nor the quickstart's filter of demonstrations can be formed.
"""

from __future__ import annotations

from collections.abc import Sequence

from profanity_check import predict_prob

BATCH = 4096


def probabilities(texts: Sequence[str]) -> list[float]:
    """The probability of each text to be offensive, from 0 to 1; computed in batches of `BATCH` texts."""
    found: list[float] = []
    for start in range(0, len(texts), BATCH):
        found += [float(value) for value in predict_prob(list(texts[start : start + BATCH]))]
    return found
