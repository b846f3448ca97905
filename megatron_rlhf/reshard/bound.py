"""What a reshard must move at least, and what a plan of it moves: bytes and seconds. Pure, no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_rlhf.reshard.deal import Transfers
from megatron_rlhf.reshard.routes import holders, needers
from megatron_rlhf.reshard.shares import Share
from megatron_rlhf.reshard.topology import Cluster, Ints, Seats


@dataclass(frozen=True, slots=True)
class Summary:
    """A plan in numbers; bytes are of one rank, seconds of the slowest."""

    recv_bytes_max: int
    """Received by the rank that receives most."""
    recv_bound_max: int
    """The same at least: what a rank needs and does not hold."""
    send_bytes_max: int
    """Sent by the rank that sends most, what it hands on inside its node included."""
    send_bytes_mean: float
    """Sent by a rank of the source on average."""
    need_bytes_max: int
    """The largest target shards."""
    kept_bytes_min: int
    """What a rank of the target already holds of its shards, at least."""
    peak_extra_bytes: int
    """Memory beside the two networks: two staging buffers, 0 where every piece is a whole shard on both sides."""
    node_time_s: float
    """The busiest NIC, sending or receiving, at its rated speed."""
    node_bound_s: float
    """What the GPUs of a node need and none of them holds, over all NICs of that node."""
    nvlink_time_s: float
    """The busiest GPU inside its node, sending or receiving."""
    plan_seconds: float
    """Processor time of the plan."""
    plan_sha256: str
    """Equal on two ranks exactly when their plans are."""


@dataclass(frozen=True, slots=True, eq=False)
class Bound:
    """What no plan can do without, by rank and by node, in bytes."""

    need: Ints
    """The target shards of each rank, as far as the source has them."""
    lack: Ints
    """What it does not hold of them."""
    node: Ints
    """What the ranks of each node need and none of them holds, each byte once."""


def least(shares: Sequence[Share], source: Seats, target: Seats, cluster: Cluster) -> Bound:
    """The bound of `shares` that are not merged, so that no byte is in two of them."""
    world = len(source.tp)
    node = np.arange(world) // cluster.node
    need, lack, unique = np.zeros(world, np.int64), np.zeros(world, np.int64), np.zeros(node[-1] + 1, np.int64)
    for share in shares:
        holds, needs = holders(share, source), needers(share, target)
        need += share.size * needs
        lack += share.size * (needs & ~holds)
        served = np.unique(node[holds])
        unique[np.setdiff1d(node[needs], served)] += share.size
    return Bound(need, lack, unique)


def summary(
    shares: Sequence[Share], seats: tuple[Seats, Seats], table: Transfers, cluster: Cluster,
    *, extra: int, seconds: float, sha256: str,
) -> Summary:  # fmt: skip
    """The numbers of the plan whose transfers are `table`; `shares` are not merged, `extra` is its staging."""
    source, target = seats
    world = len(source.tp)
    bound = least(shares, source, target, cluster)
    outside = table.source // cluster.node != table.target // cluster.node
    sent, received = _by_rank(table, table.source, world), _by_rank(table, table.target, world)
    nic, nvlink = (
        max(int(_by_rank(part, part.source, world).max()), int(_by_rank(part, part.target, world).max()))
        for part in (table.where(np.flatnonzero(outside)), table.where(np.flatnonzero(~outside)))
    )
    senders = int((source.tp >= 0).sum())
    return Summary(
        recv_bytes_max=int(received.max()),
        recv_bound_max=int(bound.lack.max()),
        send_bytes_max=int(sent.max()),
        send_bytes_mean=float(sent.sum() / senders),
        need_bytes_max=int(bound.need.max()),
        kept_bytes_min=int((bound.need - bound.lack)[target.tp >= 0].min()),
        peak_extra_bytes=extra,
        node_time_s=nic / cluster.nic,
        node_bound_s=int(bound.node.max()) / (cluster.nic * cluster.node),
        nvlink_time_s=nvlink / cluster.nvlink,
        plan_seconds=seconds,
        plan_sha256=sha256,
    )


def _by_rank(table: Transfers, ranks: Ints, world: int) -> Ints:
    return np.bincount(ranks, weights=table.size, minlength=world).astype(np.int64)
