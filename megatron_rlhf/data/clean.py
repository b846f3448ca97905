"""What is kept of raw data: normalised text, lengths, duplicates, a cap a user, a split by user (section 3.2).

Every filter returns the kept indices in order and the number it dropped.
"""

from __future__ import annotations

import hashlib
import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence

Kept = tuple[list[int], int]

_PLAIN = str.maketrans({"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u2013": "-", "\u2014": "-"})
_ODD = re.compile(r"[^a-z0-9 .,?!'\"():;/$%&+-]+")
_REPEATED = re.compile(r"([a-z.,?!'\"():;/$%&+-])\1{2,}")
_STARTS = 16


def normalize(text: str) -> str:
    """Lower-cased `text` in plain ASCII: runs of one letter or mark are two long at most, white space is one space."""
    text = text.translate(_PLAIN).replace("\u2026", "..").lower()
    text = _REPEATED.sub(r"\1\1", _ODD.sub(" ", text))
    return " ".join(text.split())


def drop_long(lengths: Sequence[int], *, most: int, least: int = 0) -> Kept:
    """Keeps what has `least` to `most` tokens."""
    return _kept([least <= length <= most for length in lengths])


def drop_shared_prefix(prompts: Sequence[Sequence[int]], tokens: int) -> Kept:
    """Keeps the first of the prompts with the same first `tokens` tokens; shorter ones are dropped where equal."""
    seen: set[tuple[int, ...]] = set()
    new = []
    for prompt in prompts:
        prefix = tuple(prompt[:tokens])
        new.append(prefix not in seen)
        seen.add(prefix)
    return _kept(new)


def cap(users: Sequence[str], limit: int) -> Kept:
    """Keeps the first `limit` elements of every user."""
    counts: Counter[str] = Counter()
    within = []
    for user in users:
        counts[user] += 1
        within.append(counts[user] <= limit)
    return _kept(within)


def chance(seed: int, key: str) -> float:
    """A number in [0, 1) that depends on (`seed`, `key`) alone, uniform over keys."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{key}".encode()).digest()[:8], "big") / 2**64


def split(users: Iterable[str], share: float, seed: int) -> frozenset[str]:
    """The held-out users: those whose `chance` is below `share`, whoever else is there.

    At least one user is held out and one is not, where there are two.
    """
    ordered = sorted(set(users), key=lambda user: (chance(seed, user), user))
    held = sum(chance(seed, user) < share for user in ordered)
    return frozenset(ordered[: min(max(held, 1), len(ordered) - 1)])


def split_linked(groups: Mapping[frozenset[str], int], share: float, seed: int) -> frozenset[str]:
    """The held-out users where elements belong to several users: `groups` counts the elements of each set of users.

    Elements of users on both sides belong to neither, so users are held out who keep to themselves: from a start, the
    user with the largest part of his elements inside joins, until `share` of all elements is inside. The best of
    16 starts is the one that splits the fewest elements.
    """
    users = sorted({user for group in groups for user in group}, key=lambda user: (chance(seed, user), user))
    grown = [_grow(groups, [start, *users], share) for start in users[:_STARTS]]
    return min(grown, key=lambda held: _mixed(groups, held), default=frozenset())


def spread(sizes: Sequence[int]) -> dict[str, float]:
    """Mean, standard deviation, quartiles and largest of at least one size."""
    quartiles = statistics.quantiles(sizes, n=4, method="inclusive") if len(sizes) > 1 else [float(sizes[0])] * 3
    return {
        "mean": round(statistics.fmean(sizes), 1),
        "deviation": round(statistics.pstdev(sizes), 1),
        **dict(zip(("25%", "50%", "75%"), quartiles, strict=True)),
        "max": max(sizes),
    }


def _grow(groups: Mapping[frozenset[str], int], starts: Sequence[str], share: float) -> frozenset[str]:
    """Held-out users grown from the first of `starts`; from the next one where a circle of users is complete."""
    of: dict[str, list[frozenset[str]]] = defaultdict(list)
    for group in groups:
        for user in group:
            of[user].append(group)
    total = {user: sum(groups[group] for group in mine) for user, mine in of.items()}
    outside = {group: len(group) for group in groups}
    pull: Counter[str] = Counter()
    held: set[str] = set()
    inside, wanted = 0, share * sum(groups.values())
    queue = iter(starts)
    while inside < wanted and len(held) < len(of) - 1:
        near = [user for user, weight in pull.items() if weight and user not in held]
        user = max(near, key=lambda one: (pull[one] / total[one], one)) if near else next(queue)
        if user in held:
            continue
        held.add(user)
        for group in of[user]:
            outside[group] -= 1
            if not outside[group]:
                inside += groups[group]
            for other in group:
                pull[other] += groups[group]
    return frozenset(held)


def _mixed(groups: Mapping[frozenset[str], int], held: Collection[str]) -> int:
    return sum(count for group, count in groups.items() if len({user in held for user in group}) == 2)


def _kept(keep: Sequence[bool]) -> Kept:
    kept = [place for place, wanted in enumerate(keep) if wanted]
    return kept, len(keep) - len(kept)
