"""Which rank sends which bytes to which, from where the shares of two layouts lie. Pure, no torch.

A rank that needs what a GPU of its node holds has it from there. What no GPU of a node holds is cut among those that
need it: each pulls one part from outside over its own NIC and hands it on inside the node.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from megatron_rlhf.reshard.deal import Transfers, dealt
from megatron_rlhf.reshard.shares import ANY, Share
from megatron_rlhf.reshard.topology import OUTSIDE, Cluster, Ints, Seats

Mask = NDArray[np.bool_]


def routes(shares: Sequence[Share], source: Seats, target: Seats, cluster: Cluster) -> Transfers:
    """Every byte of `shares` that a rank needs and does not hold reaches it once, from a rank that holds or relays it.

    Outside sources are the rank's own replica where that keeps the senders even, else all owners send the same.
    """
    board = _Board(source, target, cluster)
    for number, share in enumerate(shares):
        board.ask(number, share)
    near = dealt(shares, *board.near())
    far = dealt(shares, *board.far())
    found = Transfers.joined([near, far, *board.relays])
    found = found.where(np.flatnonzero(found.size))
    return found.where(np.lexsort((found.begin, found.share, found.target, found.source, found.relayed)))


def holders(share: Share, seats: Seats) -> Mask:
    """Which ranks hold the share in the source layout."""
    return _seated(seats, share.held, share.source)


def needers(share: Share, seats: Seats) -> Mask:
    """Which ranks need the share in the target layout."""
    return _seated(seats, share.needed, share.target)


def _seated(seats: Seats, stages: tuple[int, ...], tp: int) -> Mask:
    return np.isin(seats.pp, stages) & ((seats.tp == tp) | ((tp == ANY) & (seats.tp != OUTSIDE)))


class _Board:
    """What has been asked for, by whom, and who may hand it out."""

    def __init__(self, source: Seats, target: Seats, cluster: Cluster) -> None:
        self.relays: list[Transfers] = []
        self._source, self._target = source, target
        self._node = np.arange(len(source.tp)) // cluster.node
        self._pools: dict[tuple[tuple[int, ...], int, int], int] = {}
        self._owners: list[Ints] = []
        self._asked: dict[bool, list[tuple[Transfers, Ints]]] = {True: [], False: []}

    def near(self) -> tuple[Transfers, Ints, list[Ints]]:
        """The transfers inside nodes with a first choice of their sources, their pools, and all pools."""
        return self._all(True)

    def far(self) -> tuple[Transfers, Ints, list[Ints]]:
        """The same for transfers between nodes."""
        return self._all(False)

    def ask(self, number: int, share: Share) -> None:
        """Add what the ranks that need share `number` and do not hold it must be sent."""
        holds = holders(share, self._source)
        lacks = np.flatnonzero(needers(share, self._target) & ~holds)
        owners = np.flatnonzero(holds)
        nodes = np.unique(self._node[owners])
        served = np.isin(self._node[lacks], nodes)
        if served.any():
            self._ask_inside(number, share, owners, lacks[served])
        if not served.all():
            self._ask_outside(number, share, owners, lacks[~served])

    def _ask_inside(self, number: int, share: Share, owners: Ints, ranks: Ints) -> None:
        node = self._node[ranks]
        first = np.searchsorted(self._node[owners], node)
        count = np.searchsorted(self._node[owners], node, side="right") - first
        source = owners[first + ranks % count]
        pool = np.empty(len(ranks), dtype=np.int64)
        for here in np.unique(node):
            key = (share.held, share.source, int(here))
            pool[node == here] = self._pool(key, owners[self._node[owners] == here])
        self._asked[True].append((self._rows(number, np.zeros_like(ranks), share.size, source, ranks), pool))

    def _ask_outside(self, number: int, share: Share, owners: Ints, ranks: Ints) -> None:
        pool = self._pool((share.held, share.source, OUTSIDE), owners)
        _, inverse, counts = np.unique(self._node[ranks], return_inverse=True, return_counts=True)
        for count in np.unique(counts):
            # [nodes, count]: who pulls which part
            group = ranks[counts[inverse] == count].reshape(-1, count)
            cuts = share.snapped(np.arange(count + 1) * share.size // count)
            begin, end = np.broadcast_to(cuts[:-1], group.shape), np.broadcast_to(cuts[1:], group.shape)
            source = self._own_replica(share, group)
            pulls = self._rows(number, begin.ravel(), end.ravel(), source.ravel(), group.ravel())
            self._asked[False].append((pulls, np.full(group.size, pool)))
            for turn in range(1, count):
                to = np.roll(group, -turn, axis=1)
                hand = self._rows(number, begin.ravel(), end.ravel(), group.ravel(), to.ravel(), relayed=1)
                self.relays.append(hand)

    def _own_replica(self, share: Share, ranks: Ints) -> Ints:
        """For each rank an owner in the source replica that it is itself part of, or that its place answers to."""
        tp, _, dp = self._source.ranks.shape
        target_tp, _, target_dp = self._target.ranks.shape
        answers = self._target.dp[ranks] * dp // target_dp if dp > target_dp else self._target.dp[ranks] % dp
        replica = np.where(self._source.dp[ranks] == OUTSIDE, answers, self._source.dp[ranks])
        shard = np.where(
            self._source.tp[ranks] == OUTSIDE, self._target.tp[ranks] * tp // target_tp, self._source.tp[ranks]
        )
        if share.source != ANY:
            shard = np.full_like(ranks, share.source)
        stage = np.array(share.held)[self._target.dp[ranks] % len(share.held)]
        return self._source.ranks[shard, stage, replica]

    def _rows(
        self, number: int, begin: Ints, end: Ints | int, source: Ints, target: Ints, relayed: int = 0
    ) -> Transfers:
        def full(value: Ints | int) -> Ints:
            return np.array(np.broadcast_to(value, target.shape), dtype=np.int64)

        return Transfers(full(number), full(begin), full(end), source, target, full(relayed))

    def _pool(self, key: tuple[tuple[int, ...], int, int], owners: Ints) -> int:
        if key not in self._pools:
            self._pools[key] = len(self._owners)
            self._owners.append(owners)
        return self._pools[key]

    def _all(self, inside: bool) -> tuple[Transfers, Ints, list[Ints]]:
        asked = self._asked[inside]
        pools = np.concatenate([pool for _, pool in asked]) if asked else np.zeros(0, dtype=np.int64)
        return Transfers.joined([table for table, _ in asked]), pools, self._owners
