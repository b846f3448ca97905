"""One rank: the source in Megatron's parameter buffer, a target for ours and one for the rivals, and their turns.

Run as `python -m benchmarks.movers.side TASK`. A turn lets every side move the weights once, and the machine the bare
bytes, whoever was last first in the next turn. Before each, all ranks flip the sign of the source's weights, so that a
target left as it was is seen. The first turn builds each side from nothing, the last one measures memory once more;
after both every target parameter is compared, by checksum, with what the layout's own initialisation had put there.
"""

from __future__ import annotations

import sys
import time
import zlib
from collections.abc import Callable, Iterable
from typing import Protocol

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

from benchmarks.harness.turns import Channel
from benchmarks.movers import memory
from benchmarks.movers.gathered import Gathered
from benchmarks.movers.loopback import Loopback
from benchmarks.movers.megatron import Megatron
from benchmarks.movers.ours import Ours
from benchmarks.movers.task import FLOOR, SIDES, Task
from megatron_rlhf.config.layout import Layout
from megatron_rlhf.models import transformer
from megatron_rlhf.models.transformer import Network
from megatron_rlhf.parallel import collectives, cpu, grid
from megatron_rlhf.reshard import grouping, layout, plan
from megatron_rlhf.reshard.message import Piece, RankPlan
from megatron_rlhf.reshard.topology import Cluster


class Way(Protocol):
    """One way to move the weights, and the bytes of this rank it took."""

    received: int
    sent: int

    def run(self) -> None:
        """The target holds the source's weights."""


class Side:
    """The networks of one rank and the ways that take turns on them."""

    def __init__(self, task: Task) -> None:
        """Builds the networks; the sides are built in the first turn. Collective: world."""
        self.task = task
        world = collectives.world_size()
        train = Layout.parse(task.source, world)
        tensors = layout.specs(task.model, task.vocabulary)
        generate = grouping.grouped(train, Layout.parse(task.target, world), tensors, tensors)
        planned = plan.plan(tensors, train, tensors, generate, Cluster(node=world)).rank(collectives.rank())
        self.source = self._network(train)
        self.stage = _buffered(self.source)
        self.targets = {"ours": self._network(generate), "rivals": self._network(generate)}
        self.expected = checksums(self.targets["ours"])
        loopback = Loopback(traffic(planned, self.source))
        self.bound = _most(loopback.received)
        self.ways: dict[str, Way] = {FLOOR: loopback}
        self.held: dict[str, int] = {}
        self.order = [*SIDES, FLOOR]

    def _network(self, words: Layout) -> Network:
        return transformer.build(self.task.model, grid.build(words), rows=self.task.vocabulary, seed=1)

    def first(self, name: str) -> dict[str, float]:
        """Seconds and memory of building a way and of its first run. Collective: world."""
        target = self.targets["ours" if name == "ours" else "rivals"]
        with torch.no_grad():
            for parameter in target.parameters.values():
                parameter.fill_(torch.nan)
        networks = occupied(self.source, target)
        peak = memory.Peak()
        seconds = _timed(lambda: self._made(name, target).run())
        growth = max(0, peak.growth)
        self.held[name] = peak.kept - (occupied(self.source, target) - networks)
        way = self.ways[name]
        wrong = self._wrong(target)
        return {
            "seconds": seconds,
            "peak": _most(growth),
            "received": _most(way.received),
            "sent": _most(way.sent),
            "networks": _most(occupied(self.source, target)),
            "bound": self.bound,
            "wrong": wrong,
        }

    def steady(self, name: str) -> dict[str, float]:
        """Seconds of one run more, and of the proof where there is one. Collective: world."""
        way = self.ways[name]
        found = {"seconds": _timed(way.run)}
        return found | {"proof": _most(way.proof())} if isinstance(way, Ours) else found

    def last(self, name: str) -> dict[str, float]:
        """Memory of one run more: what the way keeps between runs and what it takes in one. Collective: world."""
        memory.keep_freed(False)
        peak = memory.Peak()
        self.ways[name].run()
        growth = peak.growth
        return {
            "peak": _most(max(0, self.held[name] + growth)),
            "wrong": self._wrong(self.targets["ours" if name == "ours" else "rivals"]),
        }

    def turn(self, measure: Callable[[str], dict[str, float]], flip: bool) -> dict[str, dict[str, float]]:
        """What `measure` gives of each side. Collective: world."""
        found = {}
        if flip:
            with torch.no_grad():
                for parameter in self.source.parameters.values():
                    parameter.neg_()
        for name in self.order:
            dist.barrier()
            if name in SIDES or measure == self.steady:
                found[name] = measure(name)
        self.order.reverse()
        return found

    def _made(self, name: str, target: Network) -> Way:
        made: Way
        if name == "ours":
            made = Ours(self.source, target, self.task.staging)
        elif name == "megatron":
            made = Megatron(self.stage, target.chunks[0])
        else:
            made = Gathered(self.source, target)
        self.ways[name] = made
        return made

    def _wrong(self, target: Network) -> float:
        found = checksums(target)
        return collectives.total(sum(found[name] != self.expected[name] for name in self.expected))


def traffic(planned: RankPlan, source: Network) -> dict[int, tuple[int, int]]:
    """Bytes that a rank sends to and receives from each peer under its plan."""
    entries = source.directory
    found: dict[int, tuple[int, int]] = {}

    def size(pieces: Iterable[Piece]) -> int:
        total = 0
        for piece in pieces:
            entry = entries[piece.name]
            along = entry.split.dim or 0
            numbers = torch.Size(entry.shard_shape).numel() // entry.shard_shape[along]
            total += (piece.end - piece.start) * numbers * entry.dtype.itemsize
        return total

    for step in planned.rounds:
        sent, received = found.get(step.peer, (0, 0))
        found[step.peer] = sent + size(step.send), received + size(step.receive)
    return found


def checksums(network: Network) -> dict[str, int]:
    """A checksum of every parameter's bytes on this rank."""
    return {
        name: zlib.crc32(parameter.detach().contiguous().view(torch.uint8).flatten().numpy())
        for name, parameter in network.parameters.items()
    }


def occupied(*networks: Network) -> int:
    """Bytes of the storages the networks' parameters lie in, each counted once."""
    storages = [parameter.untyped_storage() for network in networks for parameter in network.parameters.values()]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _buffered(source: Network) -> DistributedDataParallel:
    """The source's stage, its weights in Megatron's parameter buffer, the gradient buffer freed as in the switch."""
    (chunk,) = source.chunks
    config = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=True)
    stage = DistributedDataParallel(source.config, config, chunk, pg_collection=source.grid.groups)
    for buffer in stage.buffers:
        buffer.grad_data.untyped_storage().resize_(0)
    return stage


def _timed(run: Callable[[], None]) -> float:
    """Seconds until every rank has come through."""
    dist.barrier()
    began = time.perf_counter()
    run()
    dist.barrier()
    return time.perf_counter() - began


def _most(value: float) -> float:
    found = torch.tensor(float(value), dtype=torch.float64)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return float(found)


def main() -> None:
    """Prepares, then answers the first turn, `turns` steady ones and the last."""
    channel = Channel()
    task = Task.parse(sys.argv[1])
    cpu.install()
    grid.connect()
    memory.keep_freed(False)
    memory.check()
    side = Side(task)
    memory.keep_freed(True)
    leads = collectives.rank() == 0
    if leads:
        channel.say()
    measures = [side.first, *[side.steady] * task.turns, side.last]
    for number, measure in enumerate(measures):
        if not collectives.any_rank(leads and channel.my_turn()):
            return
        found = side.turn(measure, flip=number > 0)
        if leads:
            channel.say(**found)


if __name__ == "__main__":
    main()
