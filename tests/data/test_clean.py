"""Splits leak no user, caps hold, duplicates go, counters add up, over generated users; text is normalised.

Not proved here: the quality of what is kept.
"""

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rlhf.data import clean

QUICK = settings(deadline=None, max_examples=50)
USERS = st.lists(st.integers(0, 30).map(str), min_size=1, max_size=200)


@QUICK
@given(users=USERS, limit=st.integers(1, 8))
def test_the_cap_holds_and_keeps_the_first(users, limit):
    kept, dropped = clean.cap(users, limit)
    counts = Counter(users[place] for place in kept)
    assert counts == {user: min(count, limit) for user, count in Counter(users).items()}
    assert len(kept) + dropped == len(users)
    assert all(users[:place].count(users[place]) < limit for place in kept)


@QUICK
@given(prompts=st.lists(st.lists(st.integers(0, 2), max_size=6), max_size=40), tokens=st.integers(1, 4))
def test_no_two_kept_prompts_share_a_prefix(prompts, tokens):
    kept, dropped = clean.drop_shared_prefix(prompts, tokens)
    prefixes = [tuple(prompts[place][:tokens]) for place in kept]
    assert len(set(prefixes)) == len(prefixes)
    assert set(prefixes) == {tuple(prompt[:tokens]) for prompt in prompts}
    assert len(kept) + dropped == len(prompts)
    assert kept == sorted(kept)


def test_a_shorter_prompt_is_dropped_only_where_equal():
    prompts = [[1, 2, 3, 4], [1, 2, 3, 5], [1, 2], [1, 2], [1, 2, 3]]
    assert clean.drop_shared_prefix(prompts, 3) == ([0, 2], 3)
    assert clean.drop_shared_prefix(prompts, 4) == ([0, 1, 2, 4], 1)


def test_lengths_are_inclusive():
    assert clean.drop_long([0, 2, 3, 5, 6], least=2, most=5) == ([1, 2, 3], 2)


@QUICK
@given(users=USERS, share=st.floats(0.0, 1.0), seed=st.integers(0, 3))
def test_the_split_leaves_users_on_both_sides(users, share, seed):
    held = clean.split(users, share, seed)
    assert held <= set(users)
    assert held == clean.split(sorted(set(users)), share, seed)
    if len(set(users)) > 1:
        assert 0 < len(held) < len(set(users))


def test_the_split_is_stable_while_users_come_and_go():
    first = [f"user {number}" for number in range(1000)]
    more = [*first[200:], *(f"late {number}" for number in range(1000))]
    assert clean.split(first, 0.1, 1) & set(more) == clean.split(more, 0.1, 1) & set(first)
    assert 60 < len(clean.split(first, 0.1, 1)) < 140
    assert clean.split(first, 0.1, 1) != clean.split(first, 0.1, 2)


@QUICK
@given(pairs=st.lists(st.frozensets(st.integers(0, 15).map(str), min_size=1, max_size=3), min_size=1, max_size=60))
def test_linked_users_are_split_without_leak(pairs):
    groups = Counter(pairs)
    held = clean.split_linked(groups, 0.2, seed=1)
    users = frozenset().union(*pairs)
    train = [group for group in pairs if not group & held]
    valid = [group for group in pairs if group <= held]
    assert not frozenset().union(*train) & frozenset().union(*valid)
    assert held < users or len(users) == 1
    assert held == clean.split_linked(Counter(reversed(pairs)), 0.2, seed=1)


def test_linked_users_who_keep_to_themselves_are_held_out_together():
    draw = random.Random(0)
    groups = Counter(
        frozenset(f"{circle} {user}" for user in draw.sample(range(10), 2)) for circle in range(10) for _ in range(100)
    )
    groups[frozenset(["0 0", "1 0"])] += 1
    held = clean.split_linked(groups, 0.099, seed=2)
    inside = sum(count for group, count in groups.items() if group <= held)
    mixed = sum(count for group, count in groups.items() if group & held and not group <= held)
    assert len({user.split()[0] for user in held}) == 1
    assert inside >= 0.099 * groups.total()
    assert mixed == 0


def test_someone_who_talks_with_everyone_is_not_held_out():
    groups = Counter(
        {
            frozenset([f"{circle} {one}", f"{circle} {two}"]): 3
            for circle in "abcde"
            for one in range(6)
            for two in range(one)
        }
    )
    groups += Counter({frozenset(["hub", f"{circle} {one}"]): 1 for circle in "abcde" for one in range(6)})
    held = clean.split_linked(groups, 0.15, seed=3)
    assert len(held) == 6
    assert "hub" not in held
    assert len({user[0] for user in held}) == 1


@pytest.mark.parametrize(
    ("raw", "clear"),
    [
        ("  Sooooo   GOOD!!!!\n", "soo good!!"),
        ("yesss, all good", "yess, all good"),
        ("It\u2019s \u201cfine\u201d \u2026 ok \u2014 yes \U0001f600", 'it\'s "fine" .. ok - yes'),
        ("2000000 is *big* [sic]", "2000000 is big sic"),
        ("\U0001f600", ""),
    ],
)
def test_normalisation(raw, clear):
    assert clean.normalize(raw) == clear
    assert clean.normalize(clear) == clear


@QUICK
@given(st.text())
def test_normalisation_is_idempotent_and_plain(text):
    clear = clean.normalize(text)
    assert clean.normalize(clear) == clear
    assert clear == clear.strip()
    assert clear.isascii()
    assert clear == clear.lower()


def test_spread_of_sizes():
    assert clean.spread([1, 2, 3, 4, 5]) == {"mean": 3, "deviation": 1.4, "25%": 2, "50%": 3, "75%": 4, "max": 5}
    assert clean.spread([7])["50%"] == 7
