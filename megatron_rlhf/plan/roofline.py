"""Seconds by cause, and how fast a cluster's parts work: rated speeds times what is reached of them. Pure, no torch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from operator import attrgetter

from megatron_rlhf.config.layout import Layout
from megatron_rlhf.config.schema import Cluster


@dataclass(frozen=True, slots=True)
class Seconds:
    """Seconds of the busiest GPU by what they go to; sums and multiples are by cause."""

    gemm: float = 0.0
    """Matrix products."""
    memory: float = 0.0
    """Reads and writes of GPU memory that no product hides."""
    nvlink: float = 0.0
    """Messages inside a node."""
    nic: float = 0.0
    """Messages between nodes."""
    launch: float = 0.0
    """The host starts kernels more slowly than they run."""
    bubble: float = 0.0
    """Waiting for other stages of the pipeline."""
    host: float = 0.0
    """Copies to host memory, and Adam there."""
    disk: float = 0.0
    """Writing to storage."""
    straggler: float = 0.0
    """Waiting for the slowest GPU."""

    def __add__(self, other: Seconds) -> Seconds:
        """Both, one after the other."""
        return Seconds(*(mine + theirs for mine, theirs in zip(_values(self), _values(other), strict=True)))

    def __mul__(self, times: float) -> Seconds:
        """`times` of it, one after the other."""
        return Seconds(*(times * value for value in _values(self)))

    __rmul__ = __mul__

    @property
    def total(self) -> float:
        """All causes together."""
        return math.fsum(_values(self))

    def by_cause(self) -> dict[str, float]:
        """The causes that take time."""
        return {name: value for name, value in zip(CAUSES, _values(self), strict=True) if value}


CAUSES = tuple(cause.name for cause in fields(Seconds))
# dataclasses.astuple copies deeply, which is most of a search's time
_values: Callable[[Seconds], tuple[float, ...]] = attrgetter(*CAUSES)


@dataclass(frozen=True, slots=True)
class Roof:
    """What a cluster reaches: each rate is a rated speed times its factor."""

    cluster: Cluster

    @property
    def flops(self) -> float:
        """Operations a second of large products."""
        return self.cluster.flops * self.cluster.factors.gemm

    @property
    def bandwidth(self) -> float:
        """Bytes a second of GPU memory."""
        return self.cluster.bandwidth * self.cluster.factors.memory

    @property
    def nvlink(self) -> float:
        """Bytes a second inside a node."""
        return self.cluster.nvlink * self.cluster.factors.nvlink

    @property
    def nic(self) -> float:
        """Bytes a second between nodes."""
        return self.cluster.nic * self.cluster.factors.nic

    def product(self, work: float, weights: float) -> Seconds:
        """A matrix product of `work` operations that reads `weights` bytes: the longer of the two, the roofline
        (Williams et al. 2009). What waits for memory is `memory`."""
        compute, reading = work / self.flops, weights / self.bandwidth
        return Seconds(gemm=compute, memory=max(0.0, reading - compute))

    def touched(self, moved: float) -> Seconds:
        """`moved` bytes of GPU memory read or written."""
        return Seconds(memory=moved / self.bandwidth)

    def launched(self, found: Seconds, kernels: float) -> Seconds:
        """`found`, or the time the host takes to start its `kernels` where that is longer."""
        return replace(found, launch=max(0.0, kernels * self.cluster.factors.launch - found.gemm - found.memory))

    def reduced(self, moved: float, ranks: int, near: bool) -> Seconds:
        """An all-reduce of `moved` bytes: each rank sends 2 (n - 1)/n of them round the ring (Thakur et al. 2005)."""
        return self._link(2 * (ranks - 1) / ranks * moved, near) if ranks > 1 else Seconds()

    def gathered(self, moved: float, ranks: int, near: bool, cards: int = 1) -> Seconds:
        """An all-gather to, or reduce-scatter of, `moved` bytes: half an all-reduce.

        A ring between nodes uses as many network cards a node, `cards`, as it has ranks there.
        """
        return self._link((ranks - 1) / ranks * moved, near, cards) if ranks > 1 else Seconds()

    def sent(self, moved: float, near: bool) -> Seconds:
        """One message of `moved` bytes."""
        return self._link(moved, near)

    def _link(self, moved: float, near: bool, cards: int = 1) -> Seconds:
        latency = self.cluster.factors.latency
        if near:
            return Seconds(nvlink=moved / self.nvlink + latency)
        return Seconds(nic=moved / min(self.nvlink, cards * self.nic) + latency)


@dataclass(frozen=True, slots=True)
class Reach:
    """Which groups of a layout stay inside a node, and how many of a replica group's ranks share one."""

    tp: bool
    pp: bool
    dp: bool
    cards: int

    @classmethod
    def of(cls, layout: Layout, node: int) -> Reach:
        """The reach of the layout's groups on nodes of `node` GPUs, in its rank order."""
        tp, pp, dp = layout.tp, layout.pp, layout.dp
        pipeline, replica = (tp * dp, tp) if layout.order == "tp-dp-pp" else (tp, tp * pp)
        return cls(
            tp=tp <= node,
            pp=pipeline * pp <= node,
            dp=replica * dp <= node,
            cards=min(dp, max(1, node // replica)),
        )
