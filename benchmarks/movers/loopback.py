"""The floor: how fast this machine's gloo moves the same bytes between the same ranks, with nothing else to do."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping

import torch
import torch.distributed as dist

_MESSAGES = (16 << 20, 64 << 20)


class Loopback:
    """Buffers of what this rank exchanges with each peer, `traffic` being (sent, received) bytes by peer."""

    def __init__(self, traffic: Mapping[int, tuple[int, int]]) -> None:
        """Allocates and touches the buffers and makes a group of its own. Collective: world."""
        self.buffers = {
            peer: (torch.ones(sent, dtype=torch.uint8), torch.ones(received, dtype=torch.uint8))
            for peer, (sent, received) in sorted(traffic.items())
        }
        self.group = dist.new_group()

    def seconds(self, times: int = 5) -> float:
        """Seconds of one exchange, the median of `times`, with the message size that is fastest. Collective: world."""
        return min(self._median(message, times) for message in _MESSAGES)

    def _median(self, message: int, times: int) -> float:
        self._exchange(message)
        return statistics.median(self._exchange(message) for _ in range(times))

    def _exchange(self, message: int) -> float:
        """All messages are posted at once, in both directions and with all peers."""
        dist.barrier()
        began = time.perf_counter()
        works = []
        for peer, (out, into) in self.buffers.items():
            works += [dist.isend(part, peer, group=self.group) for part in out.split(message) if len(part)]
            works += [dist.irecv(part, peer, group=self.group) for part in into.split(message) if len(part)]
        for work in works:
            work.wait()
        dist.barrier()
        return time.perf_counter() - began
