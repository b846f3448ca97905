"""What ranks hand one another when weights move: the nouns between the planner and the executor. Pure, no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, order=True)
class Piece:
    """The range [start, end) of the logical tensor `name` along the dimension that tp splits, dimension 0 where it is
    replicated; it lies inside one block of one shard on both sides."""

    name: str
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Round:
    """What a rank sends to and receives from one peer at the same time; either may be empty.

    Elements travel in the order of the pieces, each piece row by row. The sender of a `relayed` round reads what
    earlier rounds brought into its target shards, not its source shards.
    """

    peer: int
    send: tuple[Piece, ...]
    receive: tuple[Piece, ...]
    relayed: bool = False


@dataclass(frozen=True, slots=True)
class RankPlan:
    """What one rank does: every element that its target shards need is aliased, copied or received, exactly once.

    Two ranks meet in the same order in both their plans, so rounds run without deadlock.
    """

    rank: int
    component: tuple[int, ...]
    """The ranks that are connected with it by messages, in rising order, itself among them; () where it has none."""
    aliased: tuple[str, ...]
    """Tensors whose target shard is the source shard of the same rank."""
    copied: tuple[Piece, ...]
    """What it holds as source but in a shard of another shape."""
    rounds: tuple[Round, ...]
    """In the order in which they run."""
