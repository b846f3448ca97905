"""Sentiment of a text by VADER (vaderSentiment, MIT). Without the package the gold preference cannot be formed.

Not here: how much of it the gold preference counts (`eval/gold.py`).
"""

from __future__ import annotations

from collections.abc import Sequence

from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

_ANALYZER = SentimentIntensityAnalyzer()


def compounds(texts: Sequence[str]) -> list[float]:
    """VADER's compound sentiment of each text, from -1 (very negative) to 1 (very positive)."""
    return [float(_ANALYZER.polarity_scores(text)["compound"]) for text in texts]
