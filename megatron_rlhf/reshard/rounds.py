"""In which order ranks meet, so that both ends of every message are there at the same time. Pure, no torch."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from megatron_rlhf.reshard.topology import Ints


def meeting(one: int, other: int, count: int) -> int:
    """The round in which players `one` and `other` of `count` meet: in a round nobody meets two (the circle method)."""
    circle = count - 1 if count % 2 == 0 else count
    low, high = sorted((one, other))
    return (2 * low if high == circle else low + high) % circle


def components(pairs: Iterable[tuple[int, int]], world: int) -> Ints:
    """For each rank the lowest rank it is connected with by `pairs`, itself where there is none."""
    parent = list(range(world))

    def root(rank: int) -> int:
        while parent[rank] != rank:
            parent[rank] = parent[parent[rank]]
            rank = parent[rank]
        return rank

    for one, other in pairs:
        low, high = sorted((root(one), root(other)))
        parent[high] = low
    return np.array([root(rank) for rank in range(world)], dtype=np.int64)
