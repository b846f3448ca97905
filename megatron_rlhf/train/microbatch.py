"""Cutting a global batch into a replica's micro-batches, of one shape in each call of the schedule.

b rows of a micro-batch, T positions of the batch, c lines (rows of the network's input) of S positions. A line holds
one row, or several end to end where the call packs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from typing_extensions import Self

from megatron_rlhf.batch import PackedRows, Rows
from megatron_rlhf.parallel.grid import Grid
from megatron_rlhf.train.packing import first_fit, groups

EMPTY = [-1]
"""A line of one empty element."""


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
    """One micro-batch: elements of the batch, where they stand in it (-1 pads), their rows as they lie in `lines`
    lines of `length` positions, and the batch's widest response."""

    batch: Batch
    index_e: Tensor
    rows: Rows
    lines: int
    length: int
    width: int


def cut(
    batch: Batch, grid: Grid, rows_each: int, *, buckets: int = 1, packed: bool = False, pack_tokens: int = 0
) -> list[list[Part]]:
    """This replica's micro-batches of at most `rows_each` lines, a list a call; all replicas get the same shapes.

    Lines are dealt longest first, so that replicas share the work; empty elements fill what does not divide. Calls, at
    most `buckets`, have each their own length; they begin where the fewest tokens are padding (`packing.groups`). With
    `packed` short rows share a line of the longest row's length, or of `pack_tokens` where that is longer.
    """
    rows, layout = batch.rows, grid.layout
    each = len(rows) // len(batch)
    lengths_e = rows.lengths_B.view(len(batch), each).amax(1).tolist()
    multiple = layout.tp if layout.sp else 1
    lines = [[element] for element in range(len(batch))]
    if packed:
        assert each == 1, "elements of several rows are not packed"
        lines = first_fit(lengths_e, _up(max([pack_tokens, *lengths_e]), multiple))
        packed = any(len(line) > 1 for line in lines)

    def filled(line: list[int]) -> int:
        return sum(lengths_e[element] for element in line if element >= 0)

    # Megatron's interleaved schedule takes micro-batches by the number of stages
    step = layout.pp if layout.vp > 1 else 1
    local = max(1, math.ceil(len(lines) / layout.dp))
    count = _up(math.ceil(local / max(1, rows_each // each)), step)
    size = math.ceil(local / count)
    dealt = sorted(lines, key=filled, reverse=True) + [EMPTY] * (count * size * layout.dp - len(lines))
    lengths = [_up(max(2, filled(line)), multiple) for line in dealt[:: size * layout.dp]]
    mine = dealt[grid.dp_rank :: layout.dp]

    calls: list[list[Part]] = []
    start = 0
    for many in groups(lengths, buckets, step):
        places = range(start * size, (start + many) * size, size)
        calls.append([_part(batch, mine[place : place + size], packed, lengths[start], rows.width) for place in places])
        start += many
    return calls


def tokens(part: Part) -> Tensor:
    """The part's token rows padded or trimmed to its length, or laid end to end, int64 [c, S]."""
    tokens_bT = part.rows.tokens_BT
    if isinstance(part.rows, PackedRows):
        return _laid(part, tokens_bT)
    missing = part.length - tokens_bT.shape[1]
    return torch.nn.functional.pad(tokens_bT, (0, missing)) if missing > 0 else tokens_bT[:, : part.length]


def positions(part: Part) -> Tensor:
    """The position of each token in its row, int64 [c, S]; 0 between packed rows."""
    if isinstance(part.rows, PackedRows):
        return _laid(part, torch.arange(part.rows.tokens_BT.shape[1]).expand_as(part.rows.tokens_BT))
    return torch.arange(part.length).expand(part.lines, -1)


def segments(part: Part) -> Tensor | None:
    """The row, from 1 on, that each position of a packed line belongs to, 0 for padding, int64 [c, S]; None where no
    line holds two rows."""
    if isinstance(part.rows, PackedRows):
        return _laid(part, torch.arange(1, len(part.rows) + 1)[:, None].expand_as(part.rows.tokens_BT))
    return None


def _part(batch: Batch, lines: Sequence[Sequence[int]], packed: bool, length: int, width: int) -> Part:
    index_e = torch.tensor([element for line in lines for element in line])
    chosen = batch.select(index_e)
    rows = chosen.rows
    if not packed:
        return Part(chosen, index_e, rows, len(rows), length, width)
    counts = torch.tensor([len(line) for line in lines])
    line_b = torch.arange(len(lines)).repeat_interleave(counts)
    before_b = rows.lengths_B.cumsum(0) - rows.lengths_B
    first_b = (counts.cumsum(0) - counts)[line_b]
    rows = PackedRows(rows.tokens_BT, rows.prompt_lengths_B, rows.lengths_B, line_b, before_b - before_b[first_b])
    return Part(chosen, index_e, rows, len(lines), length, width)


def _laid(part: Part, values_bT: Tensor) -> Tensor:
    """The values of the rows' own positions where those lie, 0 elsewhere, [c, S]."""
    line_b, start_b = part.rows.places()
    position_T = torch.arange(values_bT.shape[1])
    here_bT = position_T < part.rows.lengths_B[:, None]
    laid_cS = values_bT.new_zeros(part.lines, part.length)
    laid_cS[line_b[:, None].expand_as(here_bT)[here_bT], (start_b[:, None] + position_T)[here_bT]] = values_bT[here_bT]
    return laid_cS


def _up(number: int, divisor: int) -> int:
    return -(-number // divisor) * divisor
