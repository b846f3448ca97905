"""The plainest plan that moves weights between two layouts: an oracle beside the planner, pure and without thought.

Each piece comes from the lowest rank that holds it; every two ranks of a component meet once, by the circle method.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from megatron_rlhf.config.layout import Layout
from megatron_rlhf.reshard.layout import TensorSpec, shard_shape, spans, stage
from megatron_rlhf.reshard.message import Piece, RankPlan, Round

Messages = dict[tuple[int, int], list[Piece]]
"""What each sender owes each receiver."""


def naive(
    source_tensors: Sequence[TensorSpec], source: Layout, target_tensors: Sequence[TensorSpec], target: Layout
) -> dict[int, RankPlan]:
    """The plan of every rank of either layout."""
    origins = {spec.name: spec for spec in source_tensors}
    order = {spec.name: -number for number, spec in enumerate(source_tensors)}
    ranks = [rank for rank in range(1024) if source.coordinate(rank) or target.coordinate(rank)]
    sources = {rank: held(source_tensors, source, rank) for rank in ranks}
    aliased: dict[int, list[str]] = {rank: [] for rank in ranks}
    copied: dict[int, list[Piece]] = {rank: [] for rank in ranks}
    messages: Messages = {}
    for rank in ranks:
        for name, wanted in held(target_tensors, target, rank).items():
            spec, mine = origins[name], sources[rank].get(name)
            same = shard_shape(spec, source.tp) == shard_shape(wanted, target.tp)
            if (
                mine
                and same
                and spans(spec, source.tp, place(source, rank)) == spans(wanted, target.tp, place(target, rank))
            ):
                aliased[rank].append(name)
                continue
            for piece in pieces(spec, source.tp, wanted, target.tp, place(target, rank)):
                owners = [other for other in ranks if name in sources[other] and holds(spec, source, other, piece)]
                if rank in owners:
                    copied[rank].append(piece)
                else:
                    messages.setdefault((owners[0], rank), []).append(piece)
    for message in messages.values():
        message.sort(key=lambda piece: (order[piece.name], piece.start))
    found = {}
    for component in components(ranks, messages):
        for rank in component:
            rounds = tuple(
                Round(peer, tuple(messages.get((rank, peer), ())), tuple(messages.get((peer, rank), ())))
                for peer in circle(component, rank)
                if (rank, peer) in messages or (peer, rank) in messages
            )
            members = component if len(component) > 1 else ()
            found[rank] = RankPlan(rank, members, tuple(aliased[rank]), tuple(copied[rank]), rounds)
    return found


def place(layout: Layout, rank: int) -> int:
    """The tp rank of a world rank inside the layout."""
    coordinate = layout.coordinate(rank)
    assert coordinate is not None
    return coordinate[0]


def held(tensors: Sequence[TensorSpec], layout: Layout, rank: int) -> dict[str, TensorSpec]:
    """What a rank holds under the layout, by name."""
    coordinate = layout.coordinate(rank)
    if coordinate is None:
        return {}
    chunks = (stage(tensors, layout, coordinate[1], chunk) for chunk in range(layout.vp))
    return {spec.name: spec for chunk in chunks for spec in chunk}


def pieces(spec: TensorSpec, tp: int, wanted: TensorSpec, wanted_tp: int, wanted_rank: int) -> Iterator[Piece]:
    """The shard of `wanted` cut where blocks and shards of the source begin."""
    for start, end in spans(wanted, wanted_tp, wanted_rank):
        ranges = {part for tp_rank in range(tp) for part in spans(spec, tp, tp_rank)}
        for low, high in sorted(ranges):
            if max(low, start) < min(high, end):
                yield Piece(spec.name, max(low, start), min(high, end))


def holds(spec: TensorSpec, layout: Layout, rank: int, piece: Piece) -> bool:
    """Whether the shard of a rank that has the tensor has the piece."""
    ranges = spans(spec, layout.tp, place(layout, rank))
    return any(start <= piece.start and piece.end <= end for start, end in ranges)


def components(ranks: Sequence[int], messages: Messages) -> list[tuple[int, ...]]:
    """The ranks by who is connected with whom through messages."""
    belongs = {rank: {rank} for rank in ranks}
    for sender, receiver in messages:
        joined = belongs[sender] | belongs[receiver]
        for rank in joined:
            belongs[rank] = joined
    return sorted({tuple(sorted(component)) for component in belongs.values()})


def circle(component: tuple[int, ...], rank: int) -> Iterator[int]:
    """Whom a rank meets, one a round: in round k places i and j with i + j = k modulo an odd number of places, while
    the last place of an even component meets the one that would meet itself."""
    count = len(component)
    places = count - 1 + count % 2
    mine = component.index(rank)
    for number in range(places):
        if mine == places:
            other = next(i for i in range(places) if 2 * i % places == number)
        else:
            other = (number - mine) % places
            other = places if other == mine else other
        if other < count:
            yield component[other]
