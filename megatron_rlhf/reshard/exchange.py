"""What travels between two ranks at a time: a bucket each way, from where it lies or through a staging buffer."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rlhf.parallel.collectives import device
from megatron_rlhf.reshard.storage import Bucket

ALIGNED = 256
"""Bytes that the halves of a staging buffer are a multiple of."""


@dataclass(frozen=True, slots=True)
class Side:
    """One direction: `buffer` travels as bytes; `staged` are its parts, () where it is the bucket's own memory."""

    bucket: Bucket
    buffer: Tensor
    staged: tuple[Tensor, ...]
    checksum: Tensor | None

    @property
    def through(self) -> int:
        """Bytes that go through a staging buffer."""
        return self.buffer.nbytes if self.staged else 0


@dataclass(frozen=True, slots=True)
class Exchange:
    """A bucket to a peer and one from it at the same time; either may be missing."""

    peer: int
    waits: bool
    """Whether what it sends came in an earlier exchange, all of which must have landed."""
    send: Side | None
    receive: Side | None
    operations: list[dist.P2POp]

    def start(self) -> list[dist.Work]:
        """Pack what is sent and start both directions. Collective: the peer."""
        if self.send is not None:
            fill(self.send.staged, self.send.bucket.parts)
            if self.send.checksum is not None:
                self.send.checksum.fill_(checksum(self.send.bucket))
        return dist.batch_isend_irecv(self.operations)

    def land(self, works: Iterable[dist.Work]) -> str:
        """Wait for both directions and put what came into place; "", or the ranks and tensors whose checksum differs.

        Collective: the peer.
        """
        for work in works:
            work.wait()
        if self.receive is None:
            return ""
        bucket = self.receive.bucket
        if self.receive.staged:
            fill(bucket.parts, self.receive.staged)
        if self.receive.checksum is None or int(self.receive.checksum) == checksum(bucket):
            return ""
        return f"what rank {self.peer} sent of {', '.join(bucket.names)} is not what rank {dist.get_rank()} has now"


class Staging:
    """A buffer of two halves, used in turn by the buckets of one direction that do not travel from where they lie."""

    def __init__(self, buckets: Iterable[Bucket | None]) -> None:
        """Allocate what the longest of them needs, nothing where all travel from where they lie."""
        longest = max((bucket.bytes for bucket in buckets if bucket and bucket.whole is None), default=0)
        self.half = -(-longest // ALIGNED) * ALIGNED
        self.buffer = torch.empty(2 * self.half, dtype=torch.uint8, device=device())

    def side(self, bucket: Bucket | None, turn: int, check: bool) -> Side | None:
        """One direction of exchange number `turn`."""
        if bucket is None:
            return None
        sums = torch.zeros(1, dtype=torch.int64, device=device()) if check else None
        if (whole := bucket.whole) is not None:
            return Side(bucket, whole.view(torch.uint8), (), sums)
        start = turn % 2 * self.half
        buffer, at, staged = self.buffer[start : start + bucket.bytes], 0, []
        for part in bucket.parts:
            staged.append(buffer[at : at + part.nbytes].view(part.dtype).view(part.shape))
            at += part.nbytes
        return Side(bucket, buffer, tuple(staged), sums)


def exchange(
    peer: int, group: dist.ProcessGroup | None, waits: bool, send: Side | None, receive: Side | None
) -> Exchange:
    """The exchange with its operations: at most a bucket and a checksum each way."""
    operations = [
        dist.P2POp(operation, tensor, peer, group)
        for operation, side in ((dist.isend, send), (dist.irecv, receive))
        if side is not None
        for tensor in (side.buffer, side.checksum)
        if tensor is not None
    ]
    return Exchange(peer, waits, send, receive, operations)


def fill(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copies each source into the target of the same place and shape, without a call of Python for each."""
    if targets:
        torch._foreach_copy_(list(targets), list(sources))


def checksum(bucket: Bucket) -> int:
    """The CRC-32 of the bucket's bytes where they lie."""
    value = 0
    for part in bucket.parts:
        value = zlib.crc32(part.contiguous().view(-1).view(torch.uint8).cpu().numpy().data, value)
    return value
