"""The plan of a reshard: for every rank what it keeps, sends and receives, from two layouts alone. Pure, no torch.

A plan is computed for all ranks at once in classes of tensors (`shares.py`) and holds a table of transfers; what one
rank does is expanded from it when asked for. It is the same on every rank, as its sha256 says. Expert and context
parallelism are not planned: a layout has no such axis yet, and would add one to the seats and to a share's shards.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from megatron_rlhf.config.layout import Layout
from megatron_rlhf.reshard import bound
from megatron_rlhf.reshard.deal import Transfers
from megatron_rlhf.reshard.layout import TensorSpec, spans
from megatron_rlhf.reshard.message import Piece, RankPlan, Round
from megatron_rlhf.reshard.rounds import components, meeting
from megatron_rlhf.reshard.routes import routes
from megatron_rlhf.reshard.shares import ANY, Share, intersection, shares, stages
from megatron_rlhf.reshard.topology import OUTSIDE, Cluster, Ints, Seats

_H100 = Cluster()


@dataclass(frozen=True, eq=False)
class Plan:
    """Who moves what between two layouts of one model."""

    source_tensors: tuple[TensorSpec, ...]
    source: Layout
    target_tensors: tuple[TensorSpec, ...]
    target: Layout
    cluster: Cluster
    shares: tuple[Share, ...]
    transfers: Transfers
    merged: bool
    """Whether a stage's replicated tensors travel with its shards (`shares`)."""
    seconds: float
    """Processor time it took."""
    fresh: tuple[str, ...] = ()

    def rank(self, rank: int) -> RankPlan:
        """What world rank `rank` does; nothing where neither layout spans it."""
        if rank >= self.world:
            return RankPlan(rank, (), (), (), ())
        aliased, copied = self._kept(rank)
        return RankPlan(rank, self._component(rank), aliased, copied, tuple(self._rounds(rank)))

    @cached_property
    def sha256(self) -> str:
        """Equal on two ranks exactly when their plans are."""
        settings = (self.source, self.target, self.cluster, self.source_tensors, self.target_tensors, self.fresh)
        digest = hashlib.sha256(repr(settings).encode())
        for column in self.transfers.columns:
            digest.update(column.astype("<i8").tobytes())
        return digest.hexdigest()

    @cached_property
    def world(self) -> int:
        """Ranks up to the last one of either layout."""
        return _world(self.source, self.target)

    @cached_property
    def mirrored(self) -> bool:
        """Whether every piece is a whole shard of the same shape on both sides."""
        table = self.transfers
        whole = bool(((table.begin == 0) & (table.end == self._sizes[table.share])).all())
        wanted = {tensor.name: tensor.shape for tensor in self.target_tensors}
        same = all(tensor.shape == wanted.get(tensor.name, tensor.shape) for tensor in self.source_tensors)
        return self.merged and whole and same

    def summary(self, staging: int = 64 << 20) -> bound.Summary:
        """What the plan moves, what must be moved at least, and how long it takes at the cluster's speeds.

        `staging` is the bytes of one of the executor's two buffers.
        """
        loose = shares(self.source_tensors, self.source, self.target_tensors, self.target, fresh=self.fresh)
        return bound.summary(
            loose, self._seats, self.transfers, self.cluster,
            extra=0 if self.mirrored else 2 * staging, seconds=self.seconds, sha256=self.sha256,
        )  # fmt: skip

    @cached_property
    def _seats(self) -> tuple[Seats, Seats]:
        return Seats.of(self.source, self.world), Seats.of(self.target, self.world)

    @cached_property
    def _sizes(self) -> Ints:
        return np.array([share.size for share in self.shares], dtype=np.int64)

    @cached_property
    def _position(self) -> dict[str, int]:
        return {tensor.name: place for place, tensor in enumerate(self.source_tensors)}

    @cached_property
    def _components(self) -> Ints:
        pairs = np.unique(self.transfers.source * self.world + self.transfers.target)
        return components(zip((pairs // self.world).tolist(), (pairs % self.world).tolist(), strict=True), self.world)

    def _component(self, rank: int) -> tuple[int, ...]:
        ranks = np.flatnonzero(self._components == self._components[rank])
        return tuple(ranks.tolist()) if len(ranks) > 1 else ()

    @cached_property
    def _forms(self) -> tuple[dict[str, TensorSpec], dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
        """The target's tensors by name, and the stages of source and target that hold a tensor."""
        wanted = {tensor.name: tensor for tensor in self.target_tensors if tensor.name not in self.fresh}
        return wanted, stages(self.source_tensors, self.source), stages(self.target_tensors, self.target)

    def _kept(self, rank: int) -> tuple[tuple[str, ...], tuple[Piece, ...]]:
        """Tensors whose shard stays as it is, and the pieces that are held in a shard of another shape."""
        before, after = self._seats
        if OUTSIDE in (before.tp[rank], after.tp[rank]):
            return (), ()
        wanted, held, needed = self._forms
        aliased, copied = [], []
        for tensor in reversed(self.source_tensors):
            name = tensor.name
            if name not in wanted or before.pp[rank] not in held[name] or after.pp[rank] not in needed[name]:
                continue
            ours = spans(tensor, self.source.tp, int(before.tp[rank]))
            if ours == spans(wanted[name], self.target.tp, int(after.tp[rank])):
                aliased.append(name)
                continue
            for mine, theirs, start, end in intersection(tensor, self.source.tp, wanted[name], self.target.tp):
                if mine in (ANY, before.tp[rank]) and theirs in (ANY, after.tp[rank]):
                    copied.append(Piece(name, start, end))
        return tuple(aliased), tuple(copied)

    def _rounds(self, rank: int) -> Iterator[Round]:
        """Direct rounds, then relayed ones, each in the order of the circle method."""
        table = self.transfers
        mine = table.where(np.flatnonzero((table.source == rank) | (table.target == rank)))
        group = self._component(rank)
        place = {other: number for number, other in enumerate(group)}
        messages: dict[tuple[int, int, int], tuple[list[Piece], list[Piece]]] = {}
        for share, begin, end, source, target, relayed in zip(*(c.tolist() for c in mine.columns), strict=True):
            peer = target if source == rank else source
            key = (relayed, meeting(place[rank], place[peer], len(group)), peer)
            messages.setdefault(key, ([], []))[source != rank].extend(self.shares[share].cut(begin, end))
        for (relayed, _, peer), (send, receive) in sorted(messages.items()):
            yield Round(peer, self._ordered(send), self._ordered(receive), bool(relayed))

    def _ordered(self, pieces: list[Piece]) -> tuple[Piece, ...]:
        return tuple(sorted(pieces, key=lambda piece: (-self._position[piece.name], piece.start)))


def plan(
    source_tensors: Sequence[TensorSpec], source: Layout, target_tensors: Sequence[TensorSpec], target: Layout,
    cluster: Cluster = _H100, *, fresh: Sequence[str] = (),
) -> Plan:  # fmt: skip
    """The plan that moves `source_tensors` under `source` into `target_tensors` under `target`.

    Every rank receives exactly what it needs and does not hold; what `fresh` names stays as it is. Raises BadInput when
    a target tensor has no source or one of another form, and where a layout does not divide a tensor.
    """
    begun = time.process_time()
    source_tensors, target_tensors, fresh = tuple(source_tensors), tuple(target_tensors), tuple(fresh)
    world = _world(source, target)
    before, after = Seats.of(source, world), Seats.of(target, world)
    both = (before.tp != OUTSIDE) & (after.tp != OUTSIDE)
    merged = source.tp == target.tp and bool((before.tp == after.tp)[both].all())
    parts = shares(source_tensors, source, target_tensors, target, fresh=fresh, merged=merged)
    table = routes(parts, before, after, cluster)
    seconds = time.process_time() - begun
    return Plan(source_tensors, source, target_tensors, target, cluster, parts, table, merged, seconds, fresh)


def _world(source: Layout, target: Layout) -> int:
    return max(source.first + source.size, target.first + target.size)
