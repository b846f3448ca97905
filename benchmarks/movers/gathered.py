"""Gather, then slice: what most frameworks do, in the best form that keeps the idea.

Inside each replica of the train layout the shards of a layer travel together as one flat buffer: a broadcast over the
pipeline from the stage that has them, a gather over tensor parallelism, and every rank cuts out its part of each full
tensor. Replicas work at the same time; shapes and owners are known beforehand, the buffer is allocated once, no Python
object travels. The gather is a broadcast from each rank at once, straight into place: on gloo that takes a third of the
time of its all-gather, which copies twice.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rlhf.models.names import Entry
from megatron_rlhf.models.transformer import Network

_LAYER = re.compile(r"decoder\.layers\.\d+\.")


@dataclass(frozen=True, slots=True)
class Unit:
    """Tensors of one stage that travel together, and the numbers in a rank's shards of them."""

    stage: int
    entries: dict[str, Entry]
    size: int


class Gathered:
    """A buffer for the shards of all tensor-parallel ranks of the largest layer."""

    def __init__(self, source: Network, target: Network) -> None:
        """Allocates the buffer and joins groups of its own. Collective: world."""
        self.source, self.target = source, target
        layout = source.grid.layout
        self.tp, self.mine = layout.tp, source.grid.pp_rank
        self.pp_group = _group(source.grid.groups.pp)
        self.tp_group = _group(source.grid.groups.tp)
        self.units = list(_units(source))
        largest = max(unit.size for unit in self.units)
        dtype = next(iter(source.directory.values())).dtype
        self.buffer = torch.zeros(self.tp * largest, dtype=dtype)
        width = dtype.itemsize
        elsewhere = sum(unit.size for unit in self.units if unit.stage != self.mine)
        here = sum(unit.size for unit in self.units if unit.stage == self.mine)
        gathering = (self.tp - 1) * (here + elsewhere)
        self.received = width * (elsewhere + gathering)
        self.sent = width * ((layout.pp - 1) * here + gathering)

    @torch.no_grad()
    def run(self) -> None:
        """The target holds the source's weights. Collective: world."""
        for unit in self.units:
            shards, at = self.buffer[: self.tp * unit.size].view(self.tp, unit.size), 0
            self._travel(unit, shards)
            for name, entry in unit.entries.items():
                size = _numbers(entry)
                if name in self.target.parameters:
                    self._slice(name, entry, [shard[at : at + size].view(entry.shard_shape) for shard in shards])
                at += size

    def _travel(self, unit: Unit, shards: Tensor) -> None:
        mine = shards[self.source.grid.tp_rank]
        if unit.stage == self.mine:
            torch.cat([self.source.parameters[name].flatten() for name in unit.entries], out=mine)
        if self.source.grid.layout.pp > 1:
            dist.broadcast(mine, group=self.pp_group, group_src=unit.stage)
        if self.tp > 1:
            works = [dist.broadcast(shards[t], group=self.tp_group, group_src=t, async_op=True) for t in range(self.tp)]
            for work in works:
                work.wait()

    def _slice(self, name: str, entry: Entry, shards: list[Tensor]) -> None:
        grid = self.target.grid
        whole = entry.split.join(shards)
        self.target.parameters[name].copy_(entry.split.part(whole, grid.layout.tp, grid.tp_rank))


def _units(source: Network) -> Iterator[Unit]:
    """Each layer, and each tensor outside the layers for itself."""
    grouped: dict[str, dict[str, Entry]] = {}
    for name, entry in source.directory.items():
        layer = _LAYER.match(name)
        grouped.setdefault(layer.group() if layer else name, {})[name] = entry
    for entries in grouped.values():
        place = source.grid.layout.coordinate(next(iter(entries.values())).owners[0])
        assert place is not None
        yield Unit(place[1], entries, sum(_numbers(entry) for entry in entries.values()))


def _numbers(entry: Entry) -> int:
    return torch.Size(entry.shard_shape).numel()


def _group(made: dist.ProcessGroup) -> dist.ProcessGroup:
    """A group of the same ranks that nobody has used; its connections count as its own. Collective: world."""
    asked: list[list[int]] = [[]] * dist.get_world_size()
    dist.all_gather_object(asked, dist.get_process_group_ranks(made))
    found = None
    for ranks in sorted({tuple(ranks) for ranks in asked}):
        group = dist.new_group(list(ranks))
        if dist.get_rank() in ranks:
            found = group
    assert found is not None
    return found
