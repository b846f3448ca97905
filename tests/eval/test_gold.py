"""The gold preference: each component by hand, the hacks that must not pay, batch = one by one, and its speed.

Not proved here: that people would agree with it (they need not: it is a program with blind spots).
"""

import sys
import time

import pytest

from megatron_rlhf.config.rules import BadInput
from megatron_rlhf.eval import diversity, words
from megatron_rlhf.eval.gold import GoldPreference, means, repetition

pytest.importorskip("vaderSentiment")
pytest.importorskip("profanity_check")

TEXT = """
i have two dogs and cats at home what kind of food do they like oh nice the weather is sunny today love happy great
wonderful amazing fun we play football every day my brother goes to school there you are stupid idiot how about you and
"""
LEXICON = words.lexicon([TEXT], least=1)
PROMPT = "do you have pets ?\ni love dogs and cats"
GOOD = "oh nice , i have two dogs at home ! what kind of food do they like ?"


@pytest.fixture(scope="module")
def preference() -> GoldPreference:
    return GoldPreference(LEXICON)


def test_each_component_by_hand(preference: GoldPreference) -> None:
    """GOOD: content words {nice, two, dogs, home, food, like}: 6 / 6; one of them (dogs) is the prompt's: 0.35."""
    gold = preference.score(PROMPT, GOOD, True)
    assert gold.question == 0.5
    assert gold.content == 1.0
    assert gold.relevance == pytest.approx(0.35)
    assert (gold.repetition, gold.non_words, gold.missing_end, gold.short) == (0, 0, 0, 0)
    assert 0.3 < gold.sentiment <= 0.8
    assert -0.4 < gold.toxicity < 0
    assert gold.total == pytest.approx(sum(gold.components().values()))
    assert list(gold.components()) == [
        "sentiment", "question", "content", "relevance", "toxicity", "repetition", "non_words", "missing_end", "short"
    ]  # fmt: skip


def test_penalties_by_hand(preference: GoldPreference) -> None:
    """Missing end -1, fewer than three words -1, two of four words unknown -0.5, offence close to -2."""
    assert preference.score(PROMPT, GOOD, False).missing_end == -1
    assert preference.score(PROMPT, "nice dogs", True).short == -1
    assert preference.score(PROMPT, "nice dogs today", True).short == 0
    assert preference.score(PROMPT, "dogs 12 xqz brrf", True).non_words == -0.5
    assert preference.score(PROMPT, "the the xqz brrf dogs", True).content == pytest.approx(1 / 6), "known words only"
    assert preference.score(PROMPT, "?!", True).non_words == -1
    assert preference.score(PROMPT, "you are a stupid fucking idiot", True).toxicity < -1.8
    assert preference.score(PROMPT, "dogs and cats dogs and cats", True).repetition == pytest.approx(-1.5 * 2 / 5)
    assert repetition(["a"]) == 0


@pytest.mark.parametrize(
    "hack",
    [
        "?" * 30,
        "what ? what ? what ? what ?",
        "you ? you ? you ? dogs ?",
        "love love love love love love",
        "happy great love wonderful amazing fun",
        "great ! " * 30,
        "i love dogs and cats",
        "xq zvb brrf kkl dogs ?",
        "",
    ],
)
def test_cheap_tricks_lose_by_far_to_a_good_response(preference: GoldPreference, hack: str) -> None:
    """Question marks, one happy word, a pile of them, an echo of the prompt, gibberish and silence earn little."""
    assert preference.score(PROMPT, hack, True).total < preference.score(PROMPT, GOOD, True).total - 0.6


def test_no_component_grows_without_bound(preference: GoldPreference) -> None:
    """Saying the good response's words and many more never earns above 0.8 + 0.5 + 1 + 0.7; more marks ask no more."""
    long = " ".join(sorted(LEXICON)) + " ?"
    assert preference.score(PROMPT, long, True).total <= 3.0
    assert preference.score(PROMPT, GOOD + "??" * 5, True).question == 0.5
    assert preference.score(PROMPT, "i love dogs and cats", True).relevance == 0, "an echo takes nothing up"
    assert preference.score(PROMPT, "happy great wonderful amazing", True).content == pytest.approx(1 / 6)
    assert preference.score(PROMPT, "we love happy great wonderful amazing fun !!!!", True).sentiment == 0.8


def test_only_a_real_question_asks_back(preference: GoldPreference) -> None:
    assert preference.score(PROMPT, "nice . how about you ?", True).question == 0.5
    assert preference.score(PROMPT, "how are you . nice ?", True).question == 0
    assert preference.score(PROMPT, "food dogs home ?", True).question == 0
    assert preference.score(PROMPT, "what xq ?", True).question == 0


def test_batch_equals_one_by_one_in_order(preference: GoldPreference) -> None:
    responses = [GOOD, "", "nice dogs", "you are a stupid idiot", "love " * 9]
    ended = [True, False, True, True, False]
    batch = preference.scores([PROMPT] * 5, responses, ended)
    assert batch == [preference.score(PROMPT, text, end) for text, end in zip(responses, ended, strict=True)]
    assert preference.scores([], [], []) == []


def test_means_add_up(preference: GoldPreference) -> None:
    golds = preference.scores([PROMPT] * 2, [GOOD, "nice dogs"], [True, False])
    found = means(golds)
    assert found["total"] == pytest.approx((golds[0].total + golds[1].total) / 2)
    assert found["missing_end"] == -0.5
    with pytest.raises(BadInput, match="no response"):
        means([])


def test_bad_input_is_one_sentence(preference: GoldPreference, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadInput, match="2 prompts, 1 responses and 1 end flags"):
        preference.scores([PROMPT] * 2, [GOOD], [True])
    with pytest.raises(BadInput, match="lexicon is empty"):
        GoldPreference(frozenset())
    monkeypatch.delitem(sys.modules, "megatron_rlhf.eval.sentiment", raising=False)
    monkeypatch.delattr(sys.modules["megatron_rlhf.eval"], "sentiment", raising=False)
    monkeypatch.setitem(sys.modules, "vaderSentiment.vaderSentiment", None)
    with pytest.raises(BadInput, match=r"vaderSentiment.*megatron-rlhf\[quickstart\]"):
        GoldPreference(LEXICON)


def test_thousands_of_items_a_second(preference: GoldPreference) -> None:
    """Measured 14,000 a core-second on 12-word turns; the bound leaves room for slow machines."""
    count = 2000
    preference.score(PROMPT, GOOD, True)
    start = time.process_time()
    preference.scores([PROMPT] * count, [GOOD] * count, [True] * count)
    assert count / (time.process_time() - start) > 3500


def test_words_and_lexicon() -> None:
    assert words.words("I don\u2019t know, 'ok' x2 _a_!") == ["i", "don't", "know", "ok", "x2", "a"]
    assert words.lexicon(["dog dog cat", "Dog cat"], least=3) == {"dog"}
    assert words.content(["the", "dog", "dog", "go", "ab"]) == {"dog"}


def test_diversity_by_hand() -> None:
    """Bigrams of the three: (a b)(b a)(a b), (a b)(b a)(a b), (c d): 7 with 3 distinct; repeats 1/3, 1/3, 0."""
    responses = ["a b a b", "A b, a b!", "c d"]
    assert diversity.unique_share(responses) == pytest.approx(2 / 3)
    assert diversity.distinct(responses, 2) == pytest.approx(3 / 7)
    assert diversity.mean_length(responses) == pytest.approx(10 / 3)
    assert diversity.repeated_bigram_share(responses) == pytest.approx(2 / 9)
    assert diversity.end_share([True, True, False, True]) == 0.75
    assert diversity.unique_share([]) == diversity.end_share([]) == diversity.distinct([], 1) == 0
