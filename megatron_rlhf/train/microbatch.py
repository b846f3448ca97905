"""Cutting a global batch into a replica's micro-batches of one shape."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from typing_extensions import Self

from megatron_rlhf.batch import Rows
from megatron_rlhf.parallel.grid import Grid


class Batch(Protocol):
    """What an engine takes: any noun of `batch` that has rows and can be selected from."""

    @property
    def rows(self) -> Rows:
        """The token rows, one or several an element."""

    def select(self, index: Tensor) -> Self:
        """The elements `index`; -1 gives an empty one."""

    def __len__(self) -> int:
        """Elements."""


@dataclass(frozen=True, slots=True)
class Part:
    """One micro-batch: elements of the batch, where they stand in it (-1 pads) and the common row length."""

    batch: Batch
    index_e: Tensor
    length: int
    width: int


def cut(batch: Batch, grid: Grid, rows_each: int) -> list[Part]:
    """This replica's micro-batches of at most `rows_each` rows; all replicas get the same number and shape.

    Elements are dealt longest first, so that replicas share the work; empty elements fill what does not divide.
    """
    rows = batch.rows
    each = len(rows) // len(batch)
    longest_e = rows.lengths_B.view(len(batch), each).amax(1)
    order = torch.argsort(longest_e, descending=True, stable=True)
    dp = grid.layout.dp
    local = math.ceil(len(batch) / dp)
    count = math.ceil(local / max(1, rows_each // each))
    if grid.layout.vp > 1:
        # Interleaved stages take micro-batches in groups of pp; what is missing runs empty.
        count = math.ceil(count / grid.layout.pp) * grid.layout.pp
    size = math.ceil(local / count)
    index = torch.full((count * size * dp,), -1, dtype=torch.int64)
    index[: len(batch)] = order
    mine = index[grid.dp_rank :: dp]
    tp = grid.layout.tp if grid.layout.sp else 1
    length = math.ceil(max(2, int(rows.lengths_B.max())) / tp) * tp
    return [Part(batch.select(chosen), chosen, length, rows.width) for chosen in mine.split(size)]


def tokens(part: Part) -> Tensor:
    """The part's token rows padded or trimmed to its length, [rows, length]."""
    tokens_bT = part.batch.rows.tokens_BT
    missing = part.length - tokens_bT.shape[1]
    return torch.nn.functional.pad(tokens_bT, (0, missing)) if missing > 0 else tokens_bT[:, : part.length]
