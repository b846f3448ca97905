"""Which moments of a stage a run is killed at: its saved states, and places by chance for as long as they last."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from statistics import median

from tools.resume.process import Event, Point

PLACES = (
    *("generation", "saving", "backward", "reshard", "update", "taking up", "annotation", "publishing", "scoring"),
)
WRITING = "writing"
"""The place in which a rank's files are written, beside the run where states are saved so."""
MOST = 3
"""The latest time that a launch comes to a place at which it may be killed."""
LEAST = 0.05
"""Seconds that a place is taken to last at least: what a kill misses of it, it finds in the next."""


def of(events: Sequence[Event], stages: Sequence[str]) -> list[Event]:
    """What a launch of the whole chain announced while it was in one of `stages`."""
    found, stage = [], ""
    for event in events:
        if event.text.startswith("anew "):
            stage = event.text.removeprefix("anew ")
        if stage in stages:
            found.append(event)
    return found


def boundaries(events: Sequence[Event], number: int, chance: random.Random) -> list[Point]:
    """`number` saved states in their order: one of every stage where that suffices, then one of every phase."""
    states = [event.text for event in events if event.text.startswith("saved ")]
    by_phase: dict[tuple[str, str], list[str]] = {}
    for state in states:
        _, stage, place = state.split(" ")
        by_phase.setdefault((stage, place.partition(".")[2]), []).append(state)
    chosen = [chance.choice(those) for those in by_phase.values()]
    chance.shuffle(chosen)
    stages = [state.split(" ")[1] for state in chosen]
    turns = {state: stages[:place].count(stages[place]) for place, state in enumerate(chosen)}
    chosen = sorted(chosen, key=lambda state: turns[state])[:number]
    return [Point(state) for state in sorted(chosen, key=states.index)]


def middle(events: Sequence[Event]) -> Point:
    """The saved state in the middle."""
    states = [event.text for event in events if event.text.startswith("saved ")]
    return Point(states[len(states) // 2 - 1])


def moments(events: Sequence[Event], number: int, chance: random.Random) -> list[Point]:
    """`number` moments inside the places of a stage, each place in turn, by chance within what it usually takes."""
    lasting = {place: list(_seconds(events, place)) for place in PLACES}
    turns = [place for place in PLACES if lasting[place]]
    return [_moment(turns[turn % len(turns)], lasting, chance) for turn in range(number)]


def writing(number: int, chance: random.Random) -> list[Point]:
    """`number` moments soon after rank 0 began to write a state, before the run has taken it in."""
    return [
        Point(f"begins {WRITING}", chance.randint(1, MOST), round(chance.uniform(0, LEAST), 4)) for _ in range(number)
    ]


def _moment(place: str, lasting: dict[str, list[float]], chance: random.Random) -> Point:
    times = lasting[place]
    delay = chance.uniform(0, max(median(times), LEAST))
    return Point(f"begins {place}", chance.randint(1, min(MOST, len(times))), round(delay, 4))


def _seconds(events: Sequence[Event], place: str) -> Iterator[float]:
    began = 0.0
    for event in events:
        if event.text == f"begins {place}":
            began = event.time
        elif event.text == f"ends {place}":
            yield event.time - began
