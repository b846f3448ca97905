"""The floor: how fast this machine's gloo moves the same bytes between the same ranks, with nothing else to do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
import torch.distributed as dist

_MESSAGE = 64 << 20


class Loopback:
    """Large messages with every peer, `traffic` being (sent, received) bytes by peer.

    All parts of all messages are sent from one buffer and received into one, so the memory they need is small.
    """

    def __init__(self, traffic: Mapping[int, tuple[int, int]]) -> None:
        """Allocates and touches the buffers, makes a group of its own, and connects its ranks. Collective: world."""
        self.traffic = dict(sorted(traffic.items()))
        most = [max((pair[way] for pair in traffic.values()), default=0) for way in range(2)]
        self.out, self.into = (torch.ones(min(_MESSAGE, size), dtype=torch.uint8) for size in most)
        self.sent, self.received = (sum(pair[way] for pair in traffic.values()) for way in range(2))
        self.group = dist.new_group()
        self.run()

    def run(self) -> None:
        """All messages are posted at once, in both directions and with all peers. Collective: the peers."""
        works = []
        for peer, (sent, received) in self.traffic.items():
            works += [dist.isend(self.out[:size], peer, group=self.group) for size in _parts(sent)]
            works += [dist.irecv(self.into[:size], peer, group=self.group) for size in _parts(received)]
        for work in works:
            work.wait()


def _parts(size: int) -> Iterator[int]:
    for start in range(0, size, _MESSAGE):
        yield min(_MESSAGE, size - start)
