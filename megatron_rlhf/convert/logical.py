"""What every format is read into and written from: whole tensors by global name, and the card that says of what model.

A logical tensor is unsharded and has no vocabulary padding: `reshard.layout.specs(model, model.vocabulary)` lists the
names and shapes, fused as Megatron-Core's layers hold them (`self_attention.linear_qkv`: query heads of a group, its
key, its value, group after group; `mlp.linear_fc1` of a gated block: gate, then up).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from megatron_rlhf.config.schema import Model
from megatron_rlhf.reshard import layout

ROLES = ("policy", "reward", "value")
"""What a network ends in: a policy in its vocabulary, the other two in the scalar head."""


@dataclass(frozen=True, slots=True)
class Card:
    """What a checkpoint is of: its architecture, its role, and the files of its tokenizer by name, as bytes."""

    model: Model
    role: str = "policy"
    tokenizer: Mapping[str, bytes] = field(default_factory=dict)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every logical tensor with its shape, in the order of the pipeline."""
        specs = layout.specs(self.model, self.model.vocabulary, scalar=self.role != "policy")
        return {spec.name: spec.shape for spec in specs}


class Source(Protocol):
    """A checkpoint that is read tensor by tensor."""

    card: Card

    def read(self, name: str) -> Tensor:
        """One whole logical tensor in the dtype it is stored in."""

    def leftover(self) -> list[str]:
        """Tensors of the files that belong to no logical tensor."""

    def missing(self) -> list[str]:
        """Logical tensors that the files do not have."""


Tensors = Iterator[tuple[str, Tensor]]
Write = Callable[[Path, Card, Tensors, torch.dtype], None]
"""Writes a checkpoint of a card at a path from its tensors, which come once, in the card's order, in the dtype asked
for; the path appears whole or not at all."""
