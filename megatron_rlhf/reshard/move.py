"""Weights from one network into another, whatever the two layouts: what a plan says, on torch.distributed.

Every rank receives what its shards need and does not have: straight into place where that is one range of memory, else
through two staging buffers of a bounded size. NCCL and gloo run the same code.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import zip_longest

import torch
import torch.distributed as dist

from megatron_rlhf.config.rules import BadInput
from megatron_rlhf.models.names import EMBEDDING, Entry
from megatron_rlhf.models.transformer import Network
from megatron_rlhf.parallel.collectives import device, gather_objects
from megatron_rlhf.parallel.grid import TIMEOUT
from megatron_rlhf.reshard.exchange import ALIGNED, Exchange, Staging, exchange, fill
from megatron_rlhf.reshard.message import Piece, RankPlan
from megatron_rlhf.reshard.plan import plan
from megatron_rlhf.reshard.storage import Bucket, Storage, flatten, tensors
from megatron_rlhf.reshard.topology import Cluster

_VOCABULARY = (EMBEDDING, "output_layer.weight")
"""Tensors of a row a token, of which networks pad more or fewer."""
_LEAST = 1024
_USUAL = 64 << 20


@dataclass(frozen=True, slots=True)
class Moved:
    """Bytes of this rank in one move: over the wire, kept in its own memory, and through the staging buffers."""

    received: int
    sent: int
    kept: int
    staged: int
    seconds: float


class Mover:
    """Brings a source network's weights into a target network as one plan says, any number of times.

    All is prepared once: a move allocates nothing. `flat` holds the target's weights by dtype, `buffers` are the two
    for staging and `exchanges` what a move sends and receives, in order.
    """

    def __init__(
        self,
        source: Network,
        target: Network,
        planned: RankPlan,
        *,
        staging: int = _USUAL,
        check: bool = False,
        fresh: tuple[str, ...] = (),
        in_place: bool = False,
    ) -> None:
        """Take over the target's memory: one flat buffer a dtype, but for shards that the plan aliases to the source's.

        With `in_place` the target's shards stay where they are and are copies. `staging` is the size in bytes of each
        of two buffers, which exist where they are needed; with `check` a checksum travels with every bucket. Tensors
        in `fresh` keep their weights. Raises RuntimeError naming tensors that have no source, are not alike, or of
        which the plan does not bring all. Collective: world.
        """
        if staging < _LEAST:
            raise BadInput(f"staging={staging} is too small for a bucket; write for example staging={_USUAL}")
        alike(source, target, fresh)
        self.source = Storage(source)
        planned = _unaliased(planned, self.source) if in_place else planned
        lent = {name: self.source.shards[name] for name in planned.aliased}
        self.flat = {} if in_place else flatten(target, lent)
        self.target = Storage(target)
        _complete(planned, self.source, self.target, fresh)
        self._from = [self.source.view(piece) for piece in planned.copied]
        self._to = [self.target.view(piece) for piece in planned.copied]
        self._kept = sum(tensor.nbytes for tensor in (*lent.values(), *self._to))
        meetings = list(self._meetings(planned, staging // (2 * ALIGNED) * ALIGNED))
        outgoing = Staging([sends for *_, sends, _ in meetings])
        incoming = Staging([receives for *_, receives in meetings])
        self.buffers = outgoing.buffer, incoming.buffer
        group = _group(planned.component)
        self.exchanges = [
            exchange(peer, group, waits, outgoing.side(sends, turn, check), incoming.side(receives, turn, check))
            for turn, (peer, waits, sends, receives) in enumerate(meetings)
        ]

    @torch.no_grad()
    def run(self) -> Moved:
        """What was moved when the target holds the source's present weights.

        Raises RuntimeError where shards lie elsewhere than when this was built and, with `check`, naming the ranks and
        tensors of a bucket that did not arrive as it was sent. Collective: the ranks of the plan's component.
        """
        start = time.perf_counter()
        self.source.verify()
        self.target.verify()
        fill(self._to, self._from)
        faults = [fault for fault in self._exchanged() if fault]
        if device().type == "cuda":
            torch.cuda.current_stream().synchronize()
        if faults:
            raise RuntimeError("; ".join(faults))
        return self._moved(time.perf_counter() - start)

    def _exchanged(self) -> Iterator[str]:
        """What is wrong with each exchange; one is packed and one put into place while another travels."""
        before: tuple[Exchange, list[dist.Work]] | None = None
        for each in self.exchanges:
            if before is not None and each.waits:
                yield before[0].land(before[1])
                before = None
            works = each.start()
            if before is not None:
                yield before[0].land(before[1])
            before = each, works
        if before is not None:
            yield before[0].land(before[1])

    def _moved(self, seconds: float) -> Moved:
        sent = [each.send for each in self.exchanges if each.send]
        received = [each.receive for each in self.exchanges if each.receive]
        staged = sum(side.through for side in (*sent, *received))
        return Moved(
            sum(side.buffer.nbytes for side in received),
            sum(side.buffer.nbytes for side in sent),
            self._kept,
            staged,
            seconds,
        )

    def _meetings(self, planned: RankPlan, size: int) -> Iterator[tuple[int, bool, Bucket | None, Bucket | None]]:
        """Peer, whether to wait first, and the buckets of every exchange of all rounds."""
        for each in planned.rounds:
            origin = self.target if each.relayed else self.source
            sides = zip_longest(origin.buckets(each.send, size), self.target.buckets(each.receive, size))
            for number, (sends, receives) in enumerate(sides):
                yield each.peer, each.relayed and number == 0, sends, receives


def alike(source: Network, target: Network, fresh: tuple[str, ...] = ()) -> None:
    """Returns where every tensor of `target` but those in `fresh` has one of its shape and dtype in `source`.

    A vocabulary may be padded to another number of rows. Raises RuntimeError naming the tensors and both sides.
    """
    missing = [name for name in target.directory if name not in source.directory and name not in fresh]
    if missing:
        raise RuntimeError(f"no weights for {', '.join(missing)}: the source has no tensor of that name")
    tokens = source.model.vocabulary, target.model.vocabulary
    if tokens[0] != tokens[1]:
        raise RuntimeError(f"the source's vocabulary has {tokens[0]} tokens and the target's {tokens[1]}")
    for name, entry in target.directory.items():
        if name in fresh:
            continue
        origin = source.directory[name]
        shapes = [_full_shape(each)[name in _VOCABULARY :] for each in (origin, entry)]
        if shapes[0] != shapes[1] or origin.dtype != entry.dtype:
            raise RuntimeError(
                f"{name} is {_full_shape(origin)} {origin.dtype} in the source "
                f"and {_full_shape(entry)} {entry.dtype} here"
            )


def _unaliased(planned: RankPlan, source: Storage) -> RankPlan:
    """The plan with copies in place of aliases."""
    pieces = (Piece(name, start, end) for name in planned.aliased for start, end in source.spans(name))
    return replace(planned, aliased=(), copied=(*planned.copied, *pieces))


def _complete(planned: RankPlan, source: Storage, target: Storage, fresh: tuple[str, ...]) -> None:
    """Returns where the plan brings every row of this rank's shards that the source has, exactly once."""
    brought: dict[str, list[tuple[int, int]]] = {name: [] for name in target.shards}
    for piece in (*planned.copied, *(piece for each in planned.rounds for piece in each.receive)):
        brought.setdefault(piece.name, []).append((piece.start, piece.end))
    for name in planned.aliased:
        brought[name] += source.spans(name)
    for name, found in brought.items():
        if name in fresh and not found:
            continue
        rows = source.specs[name].shape[source.specs[name].dim or 0]
        spans = target.spans(name) if name in target.shards else ()
        needed = [(start, min(end, rows)) for start, end in spans if start < rows]
        if _merged(found) != _merged(needed):
            raise RuntimeError(f"the plan brings {_merged(found)} of {name}, and {_merged(needed)} is needed")


def _merged(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The ranges in order, neighbours as one; those that overlap stay apart."""
    found: list[tuple[int, int]] = []
    for start, end in sorted(ranges):
        if found and found[-1][1] == start:
            found[-1] = found[-1][0], end
        else:
            found.append((start, end))
    return found


def _group(component: tuple[int, ...]) -> dist.ProcessGroup | None:
    """The group of this rank's component, None where it has none. Collective: world.

    All ranks make all groups, as elsewhere: torch names a group that its members make alone by how many each of them
    is in (2.13 distributed_c10d.py:5467), which differs between ranks, and they would wait for each other for ever.
    """
    groups = {ranks: _connected(ranks) for ranks in sorted(set(gather_objects(component))) if ranks}
    return groups.get(component)


@cache
def _connected(ranks: tuple[int, ...]) -> dist.ProcessGroup | None:
    """A group that has communicated, as NCCL asks before some of its ranks may send to each other."""
    group = dist.new_group(list(ranks), timeout=TIMEOUT)
    if dist.get_rank() not in ranks:
        return None
    dist.all_reduce(torch.zeros(1, device=device()), group=group)
    return group


def copy(source: Network, target: Network, *, fresh: tuple[str, ...] = ()) -> int:
    """Fill every tensor of `target` from the tensor of the same name in `source`; the bytes a rank received at most.

    The target's shards stay where they are. Tensors named in `fresh` (a new head) keep their initial weights. Raises
    RuntimeError naming the tensors that have no source, or whose shape or dtype differs: nothing is ever silently left
    as it was. Collective: world.
    """
    alike(source, target, fresh)
    mover = Mover(source, target, between(source, target, fresh=fresh), fresh=fresh, in_place=True)
    most = torch.tensor(mover.run().received, device=device())
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return int(most)


def between(
    source: Network, target: Network, cluster: Cluster | None = None, *, fresh: tuple[str, ...] = ()
) -> RankPlan:
    """What this rank does to bring the weights of one network into another."""
    sides = [(tuple(tensors(network).values()), network.grid.layout) for network in (source, target)]
    whole = plan(*sides[0], *sides[1], cluster or Cluster(), fresh=fresh)
    rank = dist.get_rank()
    return whole.rank(rank) if rank < whole.world else RankPlan(rank, (), (), (), ())


@torch.no_grad()
def whole(network: Network, name: str) -> torch.Tensor:
    """The full logical tensor `name` on every rank. Collective: world."""
    return _gathered(network.parameters.get(name), network.directory[name])


def _gathered(parameter: torch.nn.Parameter | None, entry: Entry) -> torch.Tensor:
    shards = []
    for owner in entry.owners:
        if dist.get_rank() == owner:
            assert parameter is not None
            shard = parameter.detach().clone().contiguous()
        else:
            shard = torch.empty(entry.shard_shape, dtype=entry.dtype, device=device())
        dist.broadcast(shard, owner)
        shards.append(shard)
    return entry.split.join(shards)


def _full_shape(entry: Entry) -> tuple[int, ...]:
    return entry.split.whole_shape(entry.shard_shape, len(entry.owners))
