"""Our side: the plan and the `Mover` that the product switches phases with, made as in `reshard/switch.py`."""

from __future__ import annotations

import time

from megatron_rlhf.models.transformer import Network
from megatron_rlhf.parallel import collectives
from megatron_rlhf.reshard import proof
from megatron_rlhf.reshard.layout import specs
from megatron_rlhf.reshard.move import Mover
from megatron_rlhf.reshard.plan import plan
from megatron_rlhf.reshard.topology import Cluster


class Ours:
    """Specs from the settings, a plan that all ranks agree on, the mover with its groups and buffers."""

    def __init__(self, source: Network, target: Network, staging: int) -> None:
        """Plans and allocates; `staging` bytes are those of both staging buffers. Collective: world."""
        self.ends = source, target
        before, after = (specs(end.model, end.rows) for end in self.ends)
        machine = Cluster(node=collectives.world_size())
        planned = plan(before, source.grid.layout, after, target.grid.layout, machine)
        collectives.agree(int(planned.sha256[:15], 16))
        self.mover = Mover(source, target, planned.rank(collectives.rank()), staging=staging // 2)
        self.received = self.sent = 0

    def run(self) -> None:
        """The target holds the source's weights. Collective: world."""
        moved = self.mover.run()
        self.received, self.sent = moved.received, moved.sent

    def proof(self) -> float:
        """Seconds of the proof that the product adds to a switch: a digest of both networks. Collective: world."""
        began = time.perf_counter()
        proof.same(*self.ends)
        return time.perf_counter() - began
