"""Layouts to reshard between, and a reshard plan run in one process: what every rank holds, sends and receives."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

import numpy as np

from megatron_rlhf.config.layout import ORDERS, Layout
from megatron_rlhf.config.schema import Model
from megatron_rlhf.reshard.layout import TensorSpec, spans, stage
from megatron_rlhf.reshard.message import Piece, RankPlan, Round
from megatron_rlhf.reshard.plan import Plan
from megatron_rlhf.reshard.shares import row_bytes


def layouts(ranks: int, first: int = 0) -> list[Layout]:
    """Every layout of `ranks` ranks with one or two virtual stages, in both orders where they differ."""
    found = []
    for tp in (degree for degree in range(1, ranks + 1) if ranks % degree == 0):
        for pp in (degree for degree in range(1, ranks // tp + 1) if ranks // tp % degree == 0):
            dp = ranks // tp // pp
            for vp in (1, 2) if pp > 1 else (1,):
                for order in ORDERS if pp > 1 and dp > 1 else ORDERS[:1]:
                    found.append(Layout(tp, pp, dp, vp, first=first, order=order))
    return found


def model(source: Layout, target: Layout, style: str, tied: bool) -> Model:
    """The smallest model that both layouts divide; 50 tokens, which few tp divide."""
    heads = math.lcm(source.tp, target.tp)
    return Model(
        layers=math.lcm(source.pp * source.vp, target.pp * target.vp), hidden=4 * heads, heads=heads, vocabulary=50,
        context=6, ffn=3 * heads, style=style, tied=tied, precision="bf16",
    )  # fmt: skip


class Shards:
    """For one rank and side, each tensor as the indices of its split dimension that it has, and how often written."""

    def __init__(self, tensors: tuple[TensorSpec, ...], layout: Layout, rank: int) -> None:
        self.written: dict[str, np.ndarray] = {}
        self.owned: dict[str, np.ndarray] = {}
        self.row: dict[str, int] = {}
        place = layout.coordinate(rank)
        for chunk in range(layout.vp if place else 0):
            tp_rank, pp_rank, _ = place
            for tensor in stage(tensors, layout, pp_rank, chunk):
                size = tensor.shape[tensor.dim or 0]
                owned = np.zeros(size, dtype=bool)
                for start, end in spans(tensor, layout.tp, tp_rank):
                    owned[start:end] = True
                self.owned[tensor.name], self.row[tensor.name] = owned, row_bytes(tensor)
                self.written[tensor.name] = np.zeros(size, dtype=np.int64)

    def has(self, piece: Piece) -> bool:
        return piece.name in self.owned and bool(self.owned[piece.name][piece.start : piece.end].all())

    def complete(self, piece: Piece) -> bool:
        return self.has(piece) and bool((self.written[piece.name][piece.start : piece.end] == 1).all())

    def write(self, piece: Piece) -> None:
        assert self.has(piece), f"{piece} is not part of the shard"
        self.written[piece.name][piece.start : piece.end] += 1


@dataclass
class Outcome:
    """What the emulation counted, in bytes by rank."""

    received: list[int]
    sent: list[int]
    plans: list[RankPlan]


def emulate(plan: Plan) -> Outcome:
    """Run all ranks' rounds with blocking meetings; raises AssertionError at the first thing that is not right.

    Every element of every target shard that the source has is written once, from a rank that owns it or was sent it.
    """
    world = plan.world
    plans = [plan.rank(rank) for rank in range(world)]
    sources = [Shards(plan.source_tensors, plan.source, rank) for rank in range(world)]
    targets = [Shards(plan.target_tensors, plan.target, rank) for rank in range(world)]
    rows = {tensor.name: tensor.shape[tensor.dim or 0] for tensor in plan.source_tensors}
    precise = {tensor.name: row_bytes(tensor) for tensor in plan.source_tensors}
    for mine, source, target in zip(plans, sources, targets, strict=True):
        for name in mine.aliased:
            assert np.array_equal(source.owned[name], target.owned[name]), f"{name} is another shard"
            target.written[name][target.owned[name]] += 1
        for piece in mine.copied:
            assert source.has(piece)
            target.write(piece)
    received, sent = [0] * world, [0] * world
    queues = [deque(mine.rounds) for mine in plans]
    while any(queues):
        moved = False
        for rank, queue in enumerate(queues):
            if not queue or queue[0].peer < rank:
                continue
            peer = queue[0].peer
            if not queues[peer] or queues[peer][0].peer != rank:
                continue
            one, other = queue.popleft(), queues[peer].popleft()
            assert (one.send, one.receive, one.relayed) == (other.receive, other.send, other.relayed)
            assert one.send or one.receive
            _deliver(one, sources[rank], targets[rank], targets[peer], precise, sent, received, (rank, peer))
            _deliver(other, sources[peer], targets[peer], targets[rank], precise, sent, received, (peer, rank))
            moved = True
        assert moved, "every rank waits for another one"
    for rank, target in enumerate(targets):
        for name, owned in target.owned.items():
            if name in plan.fresh:
                assert not target.written[name].any()
                continue
            known = np.arange(len(owned)) < rows[name]
            assert np.array_equal(target.written[name], (owned & known).astype(int)), f"{name} on rank {rank}"
    return Outcome(received, sent, plans)


def _deliver(
    round_: Round, source: Shards, relay: Shards, target: Shards, row: dict[str, int],
    sent: list[int], received: list[int], ranks: tuple[int, int],
) -> None:  # fmt: skip
    for piece in round_.send:
        assert relay.complete(piece) if round_.relayed else source.has(piece), f"{ranks[0]} does not have {piece}"
        target.write(piece)
        size = (piece.end - piece.start) * row[piece.name]
        sent[ranks[0]] += size
        received[ranks[1]] += size
