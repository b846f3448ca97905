"""The gold preference of the quickstart: a program that prefers upbeat, engaging chat partners.

It ranks the comparison data (with noise) and judges the result; the reward model sees nothing of it but the ranks. Each
component is bounded, so that neither length nor repetition pays without end. It is no measure of quality: its blind
spots (word lists of happy words, easy questions) are known and belong beside every number it yields.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

from megatron_rlhf.config.rules import BadInput
from megatron_rlhf.eval.words import FUNCTION_WORDS, content, words

SENTIMENT_LIMIT = 0.8
"""More positive than this pays nothing: one friendly sentence reaches it, a pile of happy words gains no more."""
QUESTION = 0.5
CONTENT_WORDS = 6
RELEVANCE = 0.7
RELEVANT_WORDS = 2
TOXICITY = 2.0
REPETITION = 1.5
NON_WORDS = 1.0
MISSING_END = 1.0
SHORT = 1.0
SHORT_WORDS = 3

_QUESTION = re.compile(r"[^.!?\n]*\?")
_ASKING_TEXT = """
what what's whats who who's where where's when why how how's which whose do does did don't are is was were am can
could will would have has had should shall may any you your yours about
"""
_ASKING = frozenset(_ASKING_TEXT.split())


@dataclass(frozen=True, slots=True)
class Gold:
    """One response's gold components, each with its weight and sign applied: they add up to `total`."""

    sentiment: float
    """VADER compound, at most 0.8."""
    question: float
    """0.5 when a real question is asked back, however many."""
    content: float
    """Distinct content words / 6, at most 1; a pile of words counts no more than 1 + 2 for each function word in it."""
    relevance: float
    """0.35 for each content word taken up from the prompt, at most 0.7, and no more words than are newly said."""
    toxicity: float
    """-2 x the probability of being offensive."""
    repetition: float
    """-1.5 x the share of bigrams that are repeats."""
    non_words: float
    """Minus the share of words that are not in the lexicon."""
    missing_end: float
    """-1 without end token."""
    short: float
    """-1 under 3 words."""

    @property
    def total(self) -> float:
        """The gold score: the sum of the components."""
        return sum(self.components().values())

    def components(self) -> dict[str, float]:
        """The components by name, in the order of the fields."""
        return {item.name: getattr(self, item.name) for item in fields(self)}


class _Oracles(NamedTuple):
    """The two optional packages' answers to a list of texts."""

    sentiment: Callable[[Sequence[str]], list[float]]
    toxicity: Callable[[Sequence[str]], list[float]]


class GoldPreference:
    """Scores responses against a lexicon, the set of words that the training text knows (`eval.words.lexicon`).

    Raises BadInput when the packages of the extra `quickstart` are not installed or the lexicon is empty.
    """

    def __init__(self, lexicon: frozenset[str]) -> None:
        """Loads the sentiment lexicon and the toxicity classifier (about 2 s)."""
        if not lexicon:
            raise BadInput(
                "the gold preference's lexicon is empty; build it from the training text, eval.words.lexicon"
            )
        self.lexicon = lexicon
        self._oracles = _oracles()

    def score(self, prompt: str, response: str, ended: bool) -> Gold:
        """The gold components of one response; `ended` says whether it closed with the end token."""
        return self.scores([prompt], [response], [ended])[0]

    def scores(self, prompts: Sequence[str], responses: Sequence[str], ended: Sequence[bool]) -> list[Gold]:
        """The gold components of each response to the prompt at its place; raises BadInput on unequal lengths."""
        if not len(prompts) == len(responses) == len(ended):
            raise BadInput(
                f"gold scores need one prompt and one end flag a response: {len(prompts)} prompts, "
                f"{len(responses)} responses and {len(ended)} end flags were given"
            )
        sentiments = self._oracles.sentiment(responses)
        toxicities = self._oracles.toxicity(responses)
        return [self._gold(*parts) for parts in zip(prompts, responses, ended, sentiments, toxicities, strict=True)]

    def _gold(self, prompt: str, response: str, ended: bool, sentiment: float, toxicity: float) -> Gold:
        said = words(response)
        known = content(said) & self.lexicon
        taken_up = len(known & content(words(prompt)))
        relevant = min(taken_up, len(known) - taken_up, RELEVANT_WORDS)
        joined = 1 + 2 * len(FUNCTION_WORDS.intersection(said))
        return Gold(
            sentiment=min(sentiment, SENTIMENT_LIMIT),
            question=QUESTION * self._asks(response),
            content=min(len(known), joined, CONTENT_WORDS) / CONTENT_WORDS,
            relevance=RELEVANCE * relevant / RELEVANT_WORDS,
            toxicity=-TOXICITY * toxicity,
            repetition=-REPETITION * repetition(said),
            non_words=-NON_WORDS * self._non_words(said),
            missing_end=0.0 if ended else -MISSING_END,
            short=-SHORT if len(said) < SHORT_WORDS else 0.0,
        )

    def _asks(self, response: str) -> bool:
        """Whether a sentence that ends in a question mark has two known words, one of them a word that asks."""
        if "?" not in response:
            return False
        questions = (set(words(match.group())) for match in _QUESTION.finditer(response))
        return any(len(asked & self.lexicon) >= 2 and not asked.isdisjoint(_ASKING) for asked in questions)

    def _non_words(self, said: Sequence[str]) -> float:
        """The share of words outside the lexicon, numbers apart; 1 where nothing is said."""
        if not said:
            return 1.0
        return sum(word not in self.lexicon and not word.isdigit() for word in said) / len(said)


def repetition(said: Sequence[str]) -> float:
    """The share of a response's bigrams that occurred before in it, from 0 to just under 1."""
    bigrams = list(zip(said, said[1:], strict=False))
    return 1.0 - len(set(bigrams)) / len(bigrams) if bigrams else 0.0


def means(golds: Sequence[Gold]) -> dict[str, float]:
    """The mean of each component over responses, and of the `total`; raises BadInput where there are none."""
    if not golds:
        raise BadInput("gold components were asked of no response; score at least one")
    names = [item.name for item in fields(Gold)]
    found = {name: sum(getattr(gold, name) for gold in golds) / len(golds) for name in names}
    return found | {"total": sum(found.values())}


def _oracles() -> _Oracles:
    """Sentiment and toxicity; raises BadInput with the extra that brings a missing package."""
    try:
        from megatron_rlhf.eval import sentiment, toxicity
    except ImportError as missing:
        raise BadInput(
            f"the gold preference needs the package {missing.name}; pip install 'megatron-rlhf[quickstart]'"
        ) from missing
    return _Oracles(sentiment.compounds, toxicity.probabilities)
