"""One range of one tensor as the optimizer holds it on this rank: main weight, Adam's moments, count and average."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_rlhf.checkpoint.pieces import STEP, Piece, Range

MAIN, AVERAGE = "main", "average"


@dataclass(frozen=True, slots=True)
class Shard:
    """Where it belongs, the fp32 main weight, the Adam that steps it with its parameter group, and the average where
    one follows.

    `ours` says whether this rank is the one that saves it: a tied or replicated tensor is saved once.
    """

    where: Range
    main: Tensor
    adam: torch.optim.Optimizer
    group: dict[str, Any]
    average: Tensor | None
    ours: bool

    def piece(self) -> Piece:
        """What is to be saved of it; the tensors are the live ones."""
        state = self.adam.state.get(self.main, {})
        values = {key: value for key, value in state.items() if key != STEP}
        # A fused Adam counts its steps in the parameter groups, torch's in each parameter's state.
        step = state.get(STEP, self.group.get(STEP))
        if step is not None:
            values[STEP] = torch.as_tensor(step, dtype=torch.float32)
        if self.average is not None:
            values[AVERAGE] = self.average
        return Piece(self.where, {MAIN: self.main.detach(), **values})

    @torch.no_grad()
    def put(self, values: Mapping[str, Tensor]) -> None:
        """Take what was saved. Raises KeyError without an average where one follows."""
        self.main.copy_(values[MAIN])
        if self.average is not None:
            self.average.copy_(values[AVERAGE])
        moments = {key: value for key, value in values.items() if key not in (MAIN, AVERAGE, STEP)}
        # A tensor of its own each: Megatron's loader would give all parameters one shared `step`
        # (mcore 0.16.1 distrib_optimizer.py:820), and Adam would race ahead.
        state: dict[str, Any] = {key: value.to(self.main.device, copy=True) for key, value in moments.items()}
        if STEP in values:
            if isinstance(self.adam, (torch.optim.Adam, torch.optim.AdamW)):
                state[STEP] = values[STEP].clone()
            else:
                self.group[STEP] = int(values[STEP])
        if state:
            self.adam.state[self.main] = state
        else:
            self.adam.state.pop(self.main, None)
