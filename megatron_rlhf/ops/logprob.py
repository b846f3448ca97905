"""The local pass of a log-prob over a slice of the vocabulary: statistics of each row, and its gradient.

N rows, V columns of this slice, of which the first `columns` are words and the rest padding; T is the temperature.
Knows no group: parallel/vocab.py combines the statistics of the slices. float64 is computed in float64, any other
dtype in float32, a few rows at a time, so that no second copy of the logits ever exists. A row with a negative target
is ignored, and on a CPU not even read: prompts and padding are often more than half of a batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

_CHUNK = 1 << 20
"""Elements computed at once: 4 MiB in float32, which stays in a CPU's cache."""


def stats(logits_NV: Tensor, targets_N: Tensor, *, vocab_start: int, columns: int, temperature: float) -> Tensor:
    """[4, N] rows m, S, Z, t of x = logits / T: m = max x, S = sum e^(x-m), Z = sum x e^(x-m), t = x at the target.

    A target outside [vocab_start, vocab_start + columns) gives t = 0; a slice without words gives m = -inf, S = Z = 0.
    The statistics of an ignored row are finite where there are words, and mean nothing.
    """
    dtype = _dtype(logits_NV)
    result = torch.zeros((4, len(logits_NV)), dtype=dtype, device=logits_NV.device)
    if columns <= 0:
        result[0] = -torch.inf
        return result
    result[1] = 1
    for rows in _chunks(logits_NV, targets_N):
        x = _copied(logits_NV, rows, columns, dtype).div_(temperature)
        column, inside = _local(targets_N[rows], vocab_start, columns)
        result[3, rows] = torch.where(inside, x.gather(1, column[:, None])[:, 0], 0)
        largest = x.amax(1)
        weights = (x - largest[:, None]).exp_()
        result[0, rows] = largest
        result[1, rows] = weights.sum(1)
        result[2, rows] = x.mul_(weights).sum(1)
    return result


def backward(
    logits_NV: Tensor,
    targets_N: Tensor,
    log_sum_N: Tensor,
    entropy_N: Tensor | None,
    grad_N: Tensor | None,
    entropy_grad_N: Tensor | None,
    *,
    vocab_start: int,
    columns: int,
    temperature: float,
    out_NV: Tensor,
) -> Tensor:
    """`out_NV` filled with (1/T) [g (1_y - p) - h p (x - lse + H)] of log-prob gradient g and entropy gradient h.

    `out_NV` may be `logits_NV`. Padding columns and ignored rows become exactly 0.
    """
    dtype = _dtype(logits_NV)
    words = max(columns, 0)
    out_NV[:, words:] = 0
    for rows in _chunks(logits_NV, targets_N) if words else ():
        log_p = _copied(logits_NV, rows, words, dtype).div_(temperature).sub_(log_sum_N[rows, None])
        p = log_p.exp()
        if entropy_grad_N is not None:
            assert entropy_N is not None
            slope = log_p.add_(entropy_N[rows, None]).mul_(entropy_grad_N[rows, None])
            slope = slope if grad_N is None else slope.add_(grad_N[rows, None])
            gradient = slope.mul_(p).neg_()
        else:
            assert grad_N is not None
            gradient = p.mul_(grad_N[rows, None]).neg_()
        if grad_N is not None:
            column, inside = _local(targets_N[rows], vocab_start, words)
            gradient.scatter_add_(1, column[:, None], torch.where(inside, grad_N[rows], 0)[:, None])
        out_NV[rows, :words] = gradient.div_(temperature).to(out_NV.dtype)
    return out_NV.masked_fill_((targets_N < 0)[:, None], 0)


def _dtype(logits_NV: Tensor) -> torch.dtype:
    return torch.float64 if logits_NV.dtype == torch.float64 else torch.float32


def _chunks(logits_NV: Tensor, targets_N: Tensor) -> list[slice] | list[Tensor]:
    """The rows a few at a time; on a CPU the ignored ones are left out, on a GPU finding them would stop its queue."""
    size = max(1, _CHUNK // max(1, logits_NV.shape[1]))
    if logits_NV.device.type == "cpu" and bool((targets_N < 0).any()):
        return list((targets_N >= 0).nonzero().squeeze(1).split(size))
    return [slice(start, start + size) for start in range(0, len(logits_NV), size)]


def _copied(logits_NV: Tensor, rows: slice | Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    """The rows' words as a tensor of their own; selecting rows by number makes one already."""
    return logits_NV[rows, :columns].to(dtype, copy=isinstance(rows, slice))


def _local(targets_N: Tensor, vocab_start: int, columns: int) -> tuple[Tensor, Tensor]:
    """Each target's column in this slice, clamped into it, and whether it really lies inside."""
    column = targets_N - vocab_start
    return column.clamp(0, columns - 1), (column >= 0) & (column < columns) & (targets_N >= 0)
