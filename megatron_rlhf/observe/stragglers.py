"""Which rank is slow: the one with the most seconds of its own, those in which it did not wait for others. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median


@dataclass(frozen=True, slots=True)
class Slowest:
    """The rank that took the most seconds of its own, over the median of all ranks, and the phase that cost it most."""

    rank: int
    ratio: float
    phase: str

    def row(self) -> dict[str, int | float | str]:
        """The same under the names of log.jsonl."""
        return {"slowest.rank": self.rank, "slowest.ratio": round(self.ratio, 3), "slowest.phase": self.phase}


def slowest(names: Sequence[str], own: Sequence[Sequence[float]]) -> Slowest | None:
    """The slowest of the ranks, whose seconds by `names` are `own[rank]`; None of one rank, or where nothing was timed.

    The phase is the one in which it is furthest above the median of that phase. A pipeline's last stage and the ranks
    that hold a role others do not are slower by design: a ratio that grows says more than one that stands.
    """
    totals = [sum(seconds) for seconds in own]
    if len(own) < 2 or not names or max(totals) <= 0:
        return None
    rank, middle = totals.index(max(totals)), median(totals)
    excess = {name: own[rank][place] - median(seconds[place] for seconds in own) for place, name in enumerate(names)}
    return Slowest(rank, totals[rank] / middle if middle > 0 else 1.0, max(excess, key=lambda name: excess[name]))


def aligned(own: Mapping[str, float]) -> tuple[list[str], list[float]]:
    """Names in an order that is the same on every rank, and the seconds of each."""
    names = sorted(own)
    return names, [own[name] for name in names]
