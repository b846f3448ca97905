"""Megatron-Core's own way, `swap_model_weights` of 0.16.1 with its gloo service: its planner, executor and transport as
they are.

It needs no facade here. `parallel/cpu.py` gives its service a stream that does nothing in place of
`torch.cuda.Stream`, the models are single chunks (it moves `model[0]` alone), and both padded vocabularies are equal
(it raises otherwise). Bytes are those of the operations in the plan it leaves on the target.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from megatron.core.resharding.copy_services.gloo_copy_service import GlooCopyService
from megatron.core.resharding.refit import swap_model_weights
from megatron.core.resharding.utils import ReshardPlan, TransferOp
from torch import nn


class Megatron:
    """A service with a gloo group of its own, as its cache of services would make it."""

    def __init__(self, source: nn.Module, target: nn.Module) -> None:
        """Makes the service; the plan comes with the first run. Collective: world."""
        self.source, self.target = source, target
        self.service = GlooCopyService()

    def run(self) -> None:
        """The target holds the source's weights. Collective: world."""
        swap_model_weights([self.source], [self.target], self.service)

    @property
    def received(self) -> int:
        """Bytes that came from other ranks in one run."""
        return _bytes(self.target, self._plan.recv_ops)

    @property
    def sent(self) -> int:
        """Bytes that went to other ranks in one run."""
        return _bytes(getattr(self.source, "module", self.source), self._plan.send_ops)

    @property
    def _plan(self) -> ReshardPlan:
        return self.target._cached_reshard_plan


def _bytes(module: nn.Module, operations: Sequence[TransferOp]) -> int:
    parameters: dict[str, torch.Tensor] = dict(module.named_parameters())
    mine = dist.get_rank()
    return sum(
        parameters[op.param_name].data[op.my_slice].numel() * parameters[op.param_name].element_size()
        for op in operations
        if op.peer_rank != mine
    )
