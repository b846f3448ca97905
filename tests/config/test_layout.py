"""Proves that layout words are read, refused and printed as one sentence says, and that coordinates are a bijection.

Not proved here: the process groups made of them (parallel).
"""

from __future__ import annotations

import pytest

from megatron_rlhf.config.layout import ORDERS, Layout, LayoutError


@pytest.mark.parametrize(
    ("words", "world", "layout"),
    [
        ("tp1", 1, Layout()),
        ("", 4, Layout(dp=4)),
        ("tp2 pp2", 4, Layout(tp=2, pp=2)),
        ("tp2 pp2", 8, Layout(tp=2, pp=2, dp=2)),
        ("pp2 tp2 sp dp1", 4, Layout(tp=2, pp=2, sp=True)),
        ("tp8 pp16 dp8 vp2 sp", 1024, Layout(tp=8, pp=16, dp=8, vp=2, sp=True)),
        ("tp2 @2-3", 4, Layout(tp=2, first=2, partial=True)),
        ("tp2 @4-7 order=tp-pp-dp", 8, Layout(tp=2, dp=2, first=4, order="tp-pp-dp", partial=True)),
        ("tp1 @0-0", 4, Layout(partial=True)),
    ],
)
def test_words_become_degrees(words: str, world: int, layout: Layout) -> None:
    """A missing dp takes the ranks that are left, in the world or in the range."""
    assert Layout.parse(words, world) == layout


@pytest.mark.parametrize(
    ("words", "world", "sentence"),
    [
        ("tp2 xp2", 4, "layout word 'xp2' in 'tp2 xp2' is unknown; write for example 'tp2 pp2 dp1 sp'"),
        ("tp-2", 4, "layout word 'tp-2' in 'tp-2' is unknown; write for example 'tp2 pp2 dp1 sp'"),
        ("tp0", 4, "layout word 'tp0' in 'tp0' must be at least tp1"),
        ("tp2 pp2 dp2", 6, "tp2 pp2 dp2 is 8 ranks, the world has 6"),
        ("tp3", 4, "tp3 pp1 dp1 is 3 ranks, the world has 4"),
        ("tp2 pp2 @0-2", 4, "tp2 pp2 dp1 is 4 ranks, the range @0-2 has 3"),
        ("tp2 @3-4", 4, "'tp2 @3-4' spans ranks 3-4, the world has 4"),
        ("tp2 @3-2", 4, "'tp2 @3-2' spans ranks 3-2, the world has 4"),
        (
            "tp2 order=planned",
            4,
            "'order=planned' in 'tp2 order=planned' is what a planned layout is printed as and cannot be asked for; "
            "leave it out, or write order=tp-dp-pp",
        ),
        ("order=dp-tp-pp", 4, "rank order 'dp-tp-pp' in 'order=dp-tp-pp' is unknown; write one of tp-dp-pp, tp-pp-dp"),
    ],
)
def test_wrong_words_are_one_sentence(words: str, world: int, sentence: str) -> None:
    """What is wrong, where it stands, and what would work."""
    with pytest.raises(LayoutError) as found:
        Layout.parse(words, world)
    assert str(found.value) == sentence


@pytest.mark.parametrize(
    "words",
    [
        "tp1 pp1 dp8",
        "tp2 pp2 dp2",
        "tp4 pp2 dp1 sp",
        "tp2 pp4 dp1 vp2 sp order=tp-pp-dp",
        "tp2 pp1 dp1 @6-7",
        "tp2 pp1 dp2 @0-3",
    ],
)
def test_printed_words_are_read_back(words: str) -> None:
    """`str` and `parse` are inverse in the same world."""
    layout = Layout.parse(words, 8)
    assert str(layout) == words
    assert Layout.parse(str(layout), 8) == layout


@pytest.mark.parametrize("order", ORDERS)
def test_coordinates_are_a_bijection(order: str) -> None:
    """Every rank of the range has one coordinate, ranks outside have none; tp is always innermost."""
    layout = Layout(tp=2, pp=3, dp=4, first=5, order=order)
    places = {layout.rank(t, p, d): (t, p, d) for t in range(2) for p in range(3) for d in range(4)}
    assert sorted(places) == list(range(5, 29))
    assert all(layout.coordinate(rank) == place for rank, place in places.items())
    assert layout.coordinate(4) is None
    assert layout.coordinate(29) is None
    assert layout.rank(1, 0, 0) == layout.rank(0, 0, 0) + 1
    neighbour = layout.rank(0, 0, 1) if order == "tp-dp-pp" else layout.rank(0, 1, 0)
    assert neighbour == layout.rank(0, 0, 0) + 2


def test_places_stand_in_for_the_order() -> None:
    """Slot by slot the rank that was dealt to it, there and back; printed as planned, whatever the order was."""
    layout = Layout(tp=2, dp=2, first=4, order="tp-pp-dp", places=(6, 4, 5, 7))
    slots = [(0, 0, 0), (1, 0, 0), (0, 0, 1), (1, 0, 1)]
    assert [layout.rank(*slot) for slot in slots] == [6, 4, 5, 7]
    assert [layout.coordinate(rank) for rank in (6, 4, 5, 7)] == slots
    assert (layout.coordinate(3), layout.coordinate(8)) == (None, None)
    assert str(layout) == "tp2 pp1 dp2 order=planned"
    assert len({layout, Layout(tp=2, dp=2, first=4, order="tp-pp-dp", places=(6, 4, 5, 7)), Layout(tp=2)}) == 2


@pytest.mark.parametrize("places", [(0, 1), (0, 1, 2, 2), (1, 2, 3, 4)])
def test_places_are_every_rank_once(places: tuple[int, ...]) -> None:
    """Too few, one twice, and one of another range."""
    with pytest.raises(LayoutError, match="the places of 'tp2 pp1 dp2 order=planned' must be each of its 4 ranks once"):
        Layout(tp=2, dp=2, places=places)
