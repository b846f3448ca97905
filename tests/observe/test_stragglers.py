"""Proves which rank is called the slowest, by how much and in which phase.

Not proved here: where the seconds come from (tests/recipes/test_stragglers.py).
"""

from __future__ import annotations

from megatron_rlhf.observe.stragglers import Slowest, aligned, slowest


def test_the_rank_with_the_most_seconds_and_the_phase_where_it_exceeds_the_others() -> None:
    names = ["annotate", "generate", "policy"]
    own = [[1.0, 5.0, 2.0], [1.1, 5.1, 2.0], [0.9, 5.0, 2.1], [1.0, 5.2, 5.0]]
    found = slowest(names, own)
    assert found == Slowest(3, 11.2 / 8.1, "policy"), "generate takes longest, and everywhere"
    assert found.row() == {"slowest.rank": 3, "slowest.ratio": 1.383, "slowest.phase": "policy"}


def test_one_rank_or_nothing_timed_has_no_slowest() -> None:
    assert slowest(["a"], [[1.0]]) is None
    assert slowest([], [[], []]) is None
    assert slowest(["a"], [[0.0], [0.0]]) is None


def test_where_most_ranks_have_nothing_the_ratio_is_one() -> None:
    assert slowest(["a"], [[0.0], [0.0], [2.0]]) == Slowest(2, 1.0, "a")


def test_names_come_in_one_order() -> None:
    assert aligned({"b": 2.0, "a": 1.0}) == aligned({"a": 1.0, "b": 2.0}) == (["a", "b"], [1.0, 2.0])
