"""The train phase of one role: forward, accumulate, update over a global batch.

Between phases every rank holds the whole batch; an engine slices it by its own place, and the global result comes back
on every rank, so no result depends on the layout and roles of different layouts meet without re-dealing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rlhf.checkpoint.pieces import Piece, Stored
from megatron_rlhf.config.schema import Adam, Compute, Learning
from megatron_rlhf.models.roles import Read
from megatron_rlhf.models.transformer import Network
from megatron_rlhf.observe.stats import Stats
from megatron_rlhf.parallel.collectives import assemble, device
from megatron_rlhf.train import schedule
from megatron_rlhf.train.microbatch import Batch, Part, cut
from megatron_rlhf.train.optimizer import Average, Optimizer, accompany
from megatron_rlhf.train.shards import Shard

Loss = Callable[[Tensor, Any, Any], tuple[Tensor, Stats]]


class Engine:
    """One role's network with what it reads; frozen without `learning`."""

    def __init__(
        self,
        network: Network,
        read: Read,
        compute: Compute,
        *,
        adam: Adam | None = None,
        learning: Learning | None = None,
        averaged: bool = False,
        seed: int = 0,
    ) -> None:
        """Make the gradient buffers and the optimizer where the role learns, the weight average where asked."""
        self.network = network
        self.read = read
        self.compute = compute
        self.learning = learning
        self.seed = seed
        self.updates = 0
        self.lent = False
        """Whether another role's weights are in the place of these (train/offload.py)."""
        self._passes = 0
        self._followed = 0
        self.optimizer: Optimizer | None = None
        self.average: Average | None = None
        if learning is not None and adam is not None:
            if not network.grid.inside:
                accompany()
                return
            self.optimizer = Optimizer(network, adam, learning.epsilon)
            if averaged:
                self.average = Average(self.optimizer)

    @property
    def open(self) -> bool:
        """Whether gradients have been accumulated since the last update."""
        return self._passes > 0

    def forward(self, batch: Batch, read: Read | None = None) -> Tensor:
        """What `read` finds for every element of the batch, on every rank, fp32. Collective: world."""
        self.present()
        read = read or self.read
        rows = batch.rows
        each = len(rows) // len(batch)
        trailing = (each, *read.trailing(rows.width)) if each > 1 else read.trailing(rows.width)
        found, index = torch.zeros(0, *trailing), torch.zeros(0, dtype=torch.int64)
        if self.network.grid.inside:
            compute = self.compute
            calls = cut(batch, self.network.grid, compute.forward_micro_batch, buckets=compute.buckets)
            with torch.no_grad():
                outputs = self._run(calls, lambda output, part: self._read(read, output, part).cpu(), forward_only=True)
            if self.network.grid.speaks:
                found = torch.cat(outputs).reshape(-1, *trailing)
                index = torch.cat([part.index_e for parts in calls for part in parts])
        return assemble(found, index, len(batch), self.network.grid.speaks)

    def accumulate(self, batch: Batch, loss: Loss, weight: float = 1.0, *, packable: bool = False) -> Stats:
        """Add the gradient of `weight` x loss over the batch to the buffers; its statistics, on every rank.

        `loss(read, part, whole)` gets what the role reads of a micro-batch, the micro-batch and the whole batch, and
        divides by counts of the whole. An empty batch runs nothing. Rows that are `packable` lie end to end where
        `compute.packing` says so; what `loss` gets is the same. Collective: world.
        """
        if len(batch) == 0:
            return Stats()
        self.present()
        stats = Stats()
        self._passes += 1
        if self.network.grid.inside:
            assert self.optimizer is not None, "a frozen role does not learn"
            self.optimizer.present()
            compute = self.compute
            calls = cut(
                batch,
                self.network.grid,
                compute.micro_batch,
                buckets=compute.buckets,
                packed=packable and compute.packing,
                pack_tokens=compute.pack_tokens,
            )
            self.network.grid.seed(self.seed + 7919 * self._passes + 104729 * self.updates)

            def finish(output: Tensor, part: Part) -> tuple[Tensor, Tensor, Stats]:
                value, found = loss(self._read(self.read, output, part), part.batch, batch)
                return value * weight, torch.zeros((), dtype=torch.int, device=output.device), _detached(found)

            for kept in self._run(calls, finish, forward_only=False):
                stats += kept
        return _reduced(stats, self.network)

    def update(self, multiplier: float = 1.0) -> Stats:
        """Take one optimizer step at `multiplier` x the peak rate; `grad_norm` and `lr`. Collective: world.

        In fp16 also `overflow`, 1 where the step was skipped, and `loss_scale`; a skipped step is not counted: the
        number of updates stays, on every rank. Raises FloatingPointError, weights unchanged, when a gradient is not
        finite, in fp16 only where a smaller loss scale does not help.
        """
        assert self.learning is not None
        self.present()
        rate, found = self.learning.rate * multiplier, torch.zeros(3, dtype=torch.float64, device=device())
        if self.optimizer is not None:
            taken = self.optimizer.step(rate)
            if dist.get_rank() == self.network.grid.layout.first:
                found += torch.tensor([taken.norm, taken.scale, taken.overflow], dtype=found.dtype, device=found.device)
        dist.all_reduce(found)
        norm, scale, overflow = found.tolist()
        self.updates += 0 if overflow else 1
        self._passes = 0
        stats = Stats.of(grad_norm=(norm, 1 - overflow), lr=(rate, 1))
        if self.network.model.precision == "fp16":
            stats += Stats.of(overflow=(overflow, 1), loss_scale=(scale, 1))
        return stats

    def follow(self, rule: Callable[[list[Tensor], list[Tensor]], None], *, when: bool = True) -> None:
        """Let the average follow the live weights by `rule(average, live)`, on the shards where they lie.

        Without an update since the last time, as where fp16 skipped it, there is nothing to follow.
        """
        if when and self.updates > self._followed:
            self._followed = self.updates
            if self.average is not None:
                self.average.follow(rule)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The network holds the averaged weights inside, the live ones again after. Collective: dp."""
        if self.average is None:
            yield
            return
        with self.average.applied():
            yield

    def counts(self) -> dict[str, int]:
        """What it has counted, equal on all ranks."""
        return {"updates": self.updates, "followed": self._followed}

    def scaling(self) -> dict[str, Any] | None:
        """Its loss scale, equal on all ranks of its grid; None outside."""
        return self.optimizer.scaling() if self.optimizer else None

    def pieces(self) -> list[Piece]:
        """The optimizer's state as it lies: the live tensors of this rank, each tensor once over all ranks.

        Raises RuntimeError where gradients have been accumulated that no update has used: they would be lost.
        """
        self.present()
        if self.open:
            raise RuntimeError("accumulated gradients would be lost: call update() before the state is saved")
        return [shard.piece() for shard in self._held() if shard.ours]

    def restore(self, stored: Stored) -> None:
        """Go on from a state that any layout wrote. Raises BadInput for another model's. Collective: dp."""
        self.updates, self._followed = stored.counts["updates"], stored.counts["followed"]
        if self.optimizer:
            for shard in self._held():
                shard.put(stored.read(shard.where))
            self.optimizer.rescale(stored.scaling())
            self.optimizer.publish()

    def _held(self) -> list[Shard]:
        return self.optimizer.held(self.average.shards if self.average else ()) if self.optimizer else []

    def present(self) -> None:
        """Raises RuntimeError while another role's weights are in the place of these."""
        if self.lent:
            raise RuntimeError("another role's weights are in this role's place; leave its `with resident(role)` first")

    def _read(self, read: Read, output: Tensor, part: Part) -> Tensor:
        return read.of(self.network, output, part.rows, part.width)

    def _run(self, calls: list[list[Part]], finish: schedule.Finish, *, forward_only: bool) -> list[Any]:
        stages: list[torch.nn.Module] = list(self.optimizer.stages if self.optimizer else self.network.chunks)
        for stage, chunk in zip(stages, self.network.chunks, strict=True):
            # Setting the mode walks all modules, which takes milliseconds. A generator may have set the chunk's alone.
            if forward_only in (stage.training, chunk.training):
                stage.train(not forward_only)
        found: list[Any] = []
        for parts in calls:
            found += schedule.run(self.network, stages, parts, finish, forward_only=forward_only)
        return found


def _detached(stats: Stats) -> Stats:
    return Stats({k: float(v) for k, v in stats.sums.items()}, {k: float(v) for k, v in stats.weights.items()})


def _reduced(stats: Stats, network: Network) -> Stats:
    """The Stats of every replica added, on every rank; sums travel as one float64 tensor."""
    grid = network.grid
    speaker = grid.layout.rank(0, grid.layout.pp - 1, 0)
    box: list[list[str] | None] = [sorted(stats.sums) if dist.get_rank() == speaker else None]
    dist.broadcast_object_list(box, speaker)
    names = box[0] or []
    table = torch.zeros(2, len(names), dtype=torch.float64, device=device())
    if grid.speaks:
        table[0] = torch.tensor([stats.sums[name] for name in names], dtype=torch.float64)
        table[1] = torch.tensor([stats.weights[name] for name in names], dtype=torch.float64)
    dist.all_reduce(table)
    return Stats(dict(zip(names, table[0].tolist(), strict=True)), dict(zip(names, table[1].tolist(), strict=True)))
