"""Words of a text, which of them carry content, and the lexicon of a corpus."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

_WORD = re.compile(r"[^\W_]+(?:['\u2019][^\W_]+)*")

_FUNCTION_TEXT = """
a about after again all also always am an and any anyone anything are aren't as at away be because been before being
but by can can't could couldn't did didn't do does doesn't doing don't done else even ever every few for from get gets
getting go goes going gone gonna got had hadn't has hasn't have haven't having he he'd he's her here here's hers him
his how how's i i'd i'll i'm i've if im in into is isn't it it's its itself just kind let let's lot lots many may
maybe me might mine more most much my myself never no nor not now of off oh ok okay on once one ones only or other our
ours out over own per quite rather really same she she'd she's should shouldn't so some someone something still such
than that that's thats the their theirs them then there there's these they they'd they'll they're they've thing things
this those though through to too under until up us very wanna was wasn't way we we'd we'll we're we've well were
weren't what what's whatever when where where's which while who who's whom whose why will with won't would wouldn't
yeah yep yes yet you you'd you'll you're you've your yours yourself youre dont didnt cant ive ill hi hey hello lol
haha hahaha hmm um uh wow ah aw yo hm hmmm
"""
FUNCTION_WORDS = frozenset(_FUNCTION_TEXT.split())
"""Words that hold a sentence together, greetings and fillers: none of them says what the sentence is about."""


def words(text: str) -> list[str]:
    """The words and numbers of `text` in order, lower-cased, inner apostrophes kept (and made straight)."""
    return _WORD.findall(text.lower().replace("\u2019", "'"))


def content(found: Iterable[str]) -> set[str]:
    """The distinct words of at least three characters that are no function words."""
    return {word for word in found if len(word) > 2 and word not in FUNCTION_WORDS}


def lexicon(texts: Iterable[str], *, least: int = 3) -> frozenset[str]:
    """The words that occur at least `least` times in `texts`: a corpus' own dictionary, without its rare typos."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(words(text))
    return frozenset(word for word, count in counts.items() if count >= least)
