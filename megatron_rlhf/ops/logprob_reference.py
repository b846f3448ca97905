"""The Python reference of ops/logprob.py: the same functions with the same results up to rounding, on any device.

float64 is computed in float64, any other dtype in float32, a few rows at a time, so that no second copy of the logits
ever exists. On a CPU ignored rows are not even read: prompts and padding are often more than half of a batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

_CHUNK = 1 << 20
"""Elements computed at once: 4 MiB in float32, which stays in a CPU's cache."""


def stats(logits_NV: Tensor, targets_N: Tensor, *, vocab_start: int, columns: int, temperature: float) -> Tensor:
    """[4, N] rows m, S, Z, t, as `logprob.stats`."""
    result = _empty(logits_NV, 4)
    for rows in _chunks(logits_NV, targets_N) if columns > 0 else ():
        x = _scaled(logits_NV, rows, columns, temperature)
        result[3, rows] = _at_target(x, targets_N[rows], vocab_start)
        largest, shifted = _shifted(x)
        weights = shifted.exp()
        result[0, rows], result[1, rows] = largest, _sum(weights)
        result[2, rows] = _weighted(shifted, weights)
    return _ignored(result, targets_N, columns)


def kl_stats(
    logits_NV: Tensor, reference_NV: Tensor, targets_N: Tensor, *, vocab_start: int, columns: int, temperature: float
) -> Tensor:
    """[8, N] rows m, S, Z, t, D, m', S', t', as `logprob.kl_stats`."""
    result = _empty(logits_NV, 8)
    for rows in _chunks(logits_NV, targets_N) if columns > 0 else ():
        x = _scaled(logits_NV, rows, columns, temperature)
        y = _scaled(reference_NV, rows, columns, temperature)
        result[3, rows] = _at_target(x, targets_N[rows], vocab_start)
        result[7, rows] = _at_target(y, targets_N[rows], vocab_start)
        (largest, dx), (reference_largest, dy) = _shifted(x), _shifted(y)
        weights = dx.exp()
        result[0, rows], result[1, rows] = largest, _sum(weights)
        result[4, rows] = _weighted(dx - dy, weights)
        result[2, rows] = _weighted(dx, weights)
        result[5, rows], result[6, rows] = reference_largest, _sum(dy.exp())
    return _ignored(result, targets_N, columns)


def backward(
    logits_NV: Tensor,
    reference_NV: Tensor | None,
    targets_N: Tensor,
    sums_3N: Tensor,
    reference_sums_2N: Tensor | None,
    grad_N: Tensor | None,
    entropy_grad_N: Tensor | None,
    kl_grad_N: Tensor | None,
    *,
    vocab_start: int,
    columns: int,
    temperature: float,
    out_NV: Tensor,
) -> Tensor:
    """`out_NV` filled with the gradient of the slice, as `logprob.backward`."""
    words = max(columns, 0)
    out_NV[:, words:] = 0
    for rows in _chunks(logits_NV, targets_N) if words else ():
        m_N1, S_N1, mean_N1 = sums_3N[:, rows, None]
        dx = _scaled(logits_NV, rows, words, temperature).sub_(m_N1)
        p, slope = dx.exp().div_(S_N1), torch.zeros_like(dx)
        if kl_grad_N is not None:
            assert reference_NV is not None and reference_sums_2N is not None
            reference_m_N1, mean_apart_N1 = reference_sums_2N[:, rows, None]
            dy = _scaled(reference_NV, rows, words, temperature).sub_(reference_m_N1)
            slope.add_((dx - dy).sub_(mean_apart_N1).mul_(kl_grad_N[rows, None]))
        if entropy_grad_N is not None:
            slope.sub_(dx.sub_(mean_N1).mul_(entropy_grad_N[rows, None]))
        if grad_N is not None:
            slope.sub_(grad_N[rows, None])
        gradient = slope.mul_(p).masked_fill_(p == 0, 0)
        if grad_N is not None:
            column, inside = _local(targets_N[rows], vocab_start, words)
            gradient.scatter_add_(1, column[:, None], torch.where(inside, grad_N[rows], 0)[:, None])
        out_NV[rows, :words] = gradient.div_(temperature).to(out_NV.dtype)
    return out_NV.masked_fill_((targets_N < 0)[:, None], 0)


def _empty(logits_NV: Tensor, count: int) -> Tensor:
    """Numbers a row of a slice without words."""
    dtype = torch.float64 if logits_NV.dtype == torch.float64 else torch.float32
    result = torch.zeros((count, len(logits_NV)), dtype=dtype, device=logits_NV.device)
    result[0] = -torch.inf
    if count > 4:
        result[5] = -torch.inf
    return result


def _ignored(result_KN: Tensor, targets_N: Tensor, columns: int) -> Tensor:
    """The numbers with m = 0, S = 1 and the rest 0 in ignored rows, where there are words."""
    if columns <= 0:
        return result_KN
    plain_K1 = torch.zeros((len(result_KN), 1), dtype=result_KN.dtype, device=result_KN.device)
    plain_K1[1] = 1
    if len(result_KN) > 4:
        plain_K1[6] = 1
    return torch.where(targets_N < 0, plain_K1, result_KN)


def _chunks(logits_NV: Tensor, targets_N: Tensor) -> list[slice] | list[Tensor]:
    """The rows a few at a time; on a CPU the ignored ones are left out, on a GPU finding them would stop its queue."""
    size = max(1, _CHUNK // max(1, logits_NV.shape[1]))
    if logits_NV.device.type == "cpu" and not torch.compiler.is_compiling() and bool((targets_N < 0).any()):
        return list((targets_N >= 0).nonzero().squeeze(1).split(size))
    return [slice(start, start + size) for start in range(0, len(logits_NV), size)]


def _scaled(logits_NV: Tensor, rows: slice | Tensor, columns: int, temperature: float) -> Tensor:
    """x = logits / T of the rows' words as a tensor of their own."""
    dtype = torch.float64 if logits_NV.dtype == torch.float64 else torch.float32
    # selecting rows by number makes a tensor of its own already
    return logits_NV[rows, :columns].to(dtype, copy=isinstance(rows, slice)).div_(temperature)


def _shifted(x: Tensor) -> tuple[Tensor, Tensor]:
    """(m, x - m), x itself where m is -inf; overwrites `x`."""
    largest = x.amax(1)
    return largest, x.sub_(largest.masked_fill(largest == -torch.inf, 0)[:, None])


def _weighted(x: Tensor, weights: Tensor) -> Tensor:
    """The sum of x by weights, where a weight of 0 counts for nothing even of an infinity; overwrites `x`."""
    return _sum(x.mul_(weights).masked_fill_(weights == 0, 0))


def _sum(x: Tensor) -> Tensor:
    """Sums of rows in float64: what they lose in float32 depends on where a vocabulary is cut."""
    return x.sum(1, dtype=torch.float64).to(x.dtype)


def _at_target(x: Tensor, targets_N: Tensor, vocab_start: int) -> Tensor:
    column, inside = _local(targets_N, vocab_start, x.shape[1])
    return torch.where(inside, x.gather(1, column[:, None])[:, 0], 0)


def _local(targets_N: Tensor, vocab_start: int, columns: int) -> tuple[Tensor, Tensor]:
    """Each target's column in this slice, clamped into it, and whether it really lies inside."""
    column = targets_N - vocab_start
    return column.clamp(0, columns - 1), (column >= 0) & (column < columns) & (targets_N >= 0)
