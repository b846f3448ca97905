"""Our side: the plan and the `Mover` the product switches phases with."""

from __future__ import annotations

from megatron_rlhf.models.transformer import Network
from megatron_rlhf.reshard import layout, move, plan


class Ours:
    """Built as the product builds it: specs from the settings, a plan, the mover with its groups and buffers."""

    def __init__(self, source: Network, target: Network, staging: int) -> None:
        """Plans and allocates. Collective: world."""
        before = layout.specs(source.model, source.rows)
        after = layout.specs(target.model, target.rows)
        planned = plan.plan(before, source.grid.layout, after, target.grid.layout).rank(move.dist.get_rank())
        self.mover = move.Mover(source, target, planned, staging=staging)
        self.received = self.sent = 0

    def run(self) -> None:
        """The target holds the source's weights. Collective: world."""
        moved = self.mover.run()
        self.received, self.sent = moved.received, moved.sent
