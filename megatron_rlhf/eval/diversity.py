"""Whether a policy's responses are degenerate: all alike, endless, or repeating themselves. Empty input gives 0."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_rlhf.eval.gold import repetition
from megatron_rlhf.eval.words import words


def unique_share(responses: Sequence[str]) -> float:
    """Distinct responses over responses; case, punctuation and spaces make no difference."""
    return len({tuple(words(response)) for response in responses}) / len(responses) if responses else 0.0


def end_share(ended: Sequence[bool]) -> float:
    """The share of responses that closed with the end token."""
    return sum(map(bool, ended)) / len(ended) if len(ended) else 0.0


def distinct(responses: Sequence[str], n: int) -> float:
    """Distinct n-grams of words over n-grams, across all responses (distinct-n, Li et al. 2016)."""
    found = [tuple(said[start : start + n]) for said in map(words, responses) for start in range(len(said) - n + 1)]
    return len(set(found)) / len(found) if found else 0.0


def mean_length(responses: Sequence[str]) -> float:
    """Words a response, on average."""
    return sum(len(words(response)) for response in responses) / len(responses) if responses else 0.0


def repeated_bigram_share(responses: Sequence[str]) -> float:
    """The share of a response's bigrams that occurred before in it, averaged over responses."""
    return sum(repetition(words(response)) for response in responses) / len(responses) if responses else 0.0
