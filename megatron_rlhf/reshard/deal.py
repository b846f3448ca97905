"""Which owner hands out what, when several ranks hold the same bytes. Pure, no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from megatron_rlhf.reshard.shares import Share
from megatron_rlhf.reshard.topology import Ints

SLACK = 1.05
"""How much more than the level the busiest sender may send before its work is levelled, which costs messages."""


@dataclass(frozen=True, slots=True, eq=False)
class Transfers:
    """A table: bytes [begin, end) of share `share` go from rank `source` to rank `target`.

    A `relayed` one (1, else 0) is sent by a rank that itself receives those bytes in another transfer.
    """

    share: Ints
    begin: Ints
    end: Ints
    source: Ints
    target: Ints
    relayed: Ints

    @property
    def size(self) -> Ints:
        """Bytes of each transfer."""
        return self.end - self.begin

    @property
    def columns(self) -> tuple[Ints, ...]:
        """The columns in the order of their names above."""
        return tuple(getattr(self, column.name) for column in fields(self))

    def __len__(self) -> int:
        return len(self.share)

    def where(self, chosen: Ints) -> Transfers:
        """The transfers at the indices `chosen`."""
        return Transfers(*(column[chosen] for column in self.columns))

    @classmethod
    def joined(cls, tables: Sequence[Transfers]) -> Transfers:
        """The rows of all tables."""
        empty = np.zeros(0, dtype=np.int64)
        columns = zip(*(table.columns for table in tables), strict=True) if tables else [(empty,)] * 6
        return cls(*(np.concatenate(parts) for parts in columns))


def dealt(shares: Sequence[Share], wanted: Transfers, pool: Ints, pools: Sequence[Ints]) -> Transfers:
    """`wanted` with its sources: those it came with where no rank sends much more than it must, else levelled ones.

    Any rank of `pools[pool]` may be the source of a transfer.
    """
    if not len(wanted):
        return wanted
    demand = np.bincount(pool, weights=wanted.size, minlength=len(pools))
    level = max(total / len(owners) for total, owners in zip(demand, pools, strict=True))
    if _most(wanted) <= SLACK * level:
        return wanted
    levelled = _levelled(shares, wanted, pool, pools)
    return levelled if _most(levelled) * SLACK < _most(wanted) else wanted


def _most(transfers: Transfers) -> float:
    return float(np.bincount(transfers.source, weights=transfers.size).max())


def _levelled(shares: Sequence[Share], wanted: Transfers, pool: Ints, pools: Sequence[Ints]) -> Transfers:
    """The same bytes, cut where one owner has sent its part and the next begins; pools of few owners go first."""
    world = 1 + max(int(owners[-1]) for owners in pools)
    load = np.zeros(world)
    tables = []
    rows = np.argsort(pool, kind="stable")
    starts = np.searchsorted(pool[rows], np.arange(len(pools) + 1))
    for number in sorted(range(len(pools)), key=lambda number: (len(pools[number]), number)):
        mine = rows[starts[number] : starts[number + 1]]
        if len(mine):
            # work stays near the source it came with, so that messages stay few
            mine = mine[np.lexsort((wanted.begin[mine], wanted.share[mine], wanted.target[mine], wanted.source[mine]))]
            tables.append(_spread(wanted.where(mine), pools[number], load))
    return _snapped(shares, Transfers.joined(tables))


def _spread(wanted: Transfers, owners: Ints, load: np.ndarray) -> Transfers:
    """`wanted` laid end to end and cut into what each owner may take until all of them have the same load."""
    stops = np.cumsum(wanted.size)
    room = _room(load[owners], float(stops[-1]))
    load[owners] += room
    marks = np.rint(np.cumsum(room)).astype(np.int64)
    marks[-1] = stops[-1]
    cuts = np.union1d(np.concatenate([[0], stops]), marks)
    low, high = cuts[:-1], cuts[1:]
    row = np.searchsorted(stops, low, side="right")
    before = stops[row] - wanted.size[row]
    begin = wanted.begin[row] + low - before
    end = wanted.begin[row] + high - before
    source = owners[np.searchsorted(marks, low, side="right")]
    return Transfers(wanted.share[row], begin, end, source, wanted.target[row], wanted.relayed[row])


def _room(load: np.ndarray, total: float) -> np.ndarray:
    """What each owner takes of `total` so that the highest load is as low as can be."""
    ranked = np.sort(load)
    steps = np.arange(1, len(ranked) + 1)
    levels = (total + np.cumsum(ranked)) / steps
    # the level is set by the owners below it
    count = int(np.flatnonzero(levels > ranked)[-1])
    return np.maximum(0.0, levels[count] - load)


def _snapped(shares: Sequence[Share], transfers: Transfers) -> Transfers:
    """Cuts moved to the nearest boundary of a row."""
    begin, end = transfers.begin.copy(), transfers.end.copy()
    for number in np.unique(transfers.share):
        mine = transfers.share == number
        begin[mine], end[mine] = shares[number].snapped(begin[mine]), shares[number].snapped(end[mine])
    return Transfers(transfers.share, begin, end, transfers.source, transfers.target, transfers.relayed)
