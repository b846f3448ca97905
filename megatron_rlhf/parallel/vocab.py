"""Log-probs and entropy of targets where each tensor-parallel rank holds a slice of the vocabulary.

N rows, V columns of the slice. One all-gather of four numbers a row; the backward pass communicates nothing.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_rlhf.ops import logprob


def logprobs(
    logits: Tensor,
    targets: Tensor,
    *,
    vocab_start: int,
    vocab_size: int,
    group: dist.ProcessGroup | None = None,
    temperature: float = 1.0,
    entropy: bool = False,
    inplace: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """(log-probs, entropy or None) of `targets` [...] under softmax(logits / temperature), float32, equal on all ranks.

    `logits` [..., V/tp] of any float dtype (float64 is computed in float64) are the words from `vocab_start` on; words
    from `vocab_size` on are padding and never read. A negative target gives 0 and no gradient; one outside the
    vocabulary gives NaN. `group` None is a vocabulary held whole. `inplace` writes the gradient over the logits.

    Collective: `group` (tp).
    """
    turned = logits.dim() == 3 and not logits.is_contiguous() and logits.transpose(0, 1).is_contiguous()
    if turned:
        logits, targets = logits.transpose(0, 1), targets.transpose(0, 1)
    shape = targets.shape
    row_logprobs, row_entropy = _Logprobs.apply(
        logits.reshape(-1, logits.shape[-1]),
        targets.reshape(-1).to(logits.device),
        vocab_start,
        vocab_size,
        group,
        temperature,
        entropy,
        inplace,
    )
    answers = [rows.reshape(shape) for rows in (row_logprobs, row_entropy) if rows is not None]
    if turned:
        answers = [rows.transpose(0, 1) for rows in answers]
    return answers[0], answers[1] if entropy else None


class _Logprobs(torch.autograd.Function):
    """The local statistics, their gather in rank order, and the gradient of the local slice."""

    @staticmethod
    def forward(
        ctx: Any,
        logits_NV: Tensor,
        targets_N: Tensor,
        vocab_start: int,
        vocab_size: int,
        group: dist.ProcessGroup | None,
        temperature: float,
        entropy: bool,
        inplace: bool,
    ) -> tuple[Tensor, Tensor | None]:
        columns = max(0, min(logits_NV.shape[1], vocab_size - vocab_start))
        where = {"vocab_start": vocab_start, "columns": columns, "temperature": temperature}
        local = logprob.stats(logits_NV, targets_N, **where)  # type: ignore[arg-type]
        log_sum_N, mean_N, target_N = _combine(_gather(local, group))
        ignored = targets_N < 0
        result_N = (target_N - log_sum_N).masked_fill(targets_N >= vocab_size, torch.nan).masked_fill(ignored, 0)
        entropy_N = (log_sum_N - mean_N).masked_fill(ignored, 0) if entropy else None
        ctx.save_for_backward(logits_NV, targets_N, log_sum_N, entropy_N)
        ctx.where, ctx.inplace = where, inplace
        ctx.set_materialize_grads(False)
        return result_N, entropy_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor | None, entropy_grad_N: Tensor | None) -> tuple[Tensor | None, ...]:
        logits_NV, targets_N, log_sum_N, entropy_N = ctx.saved_tensors
        if grad_N is None and entropy_grad_N is None:
            return (None,) * 8
        out_NV = logits_NV.detach() if ctx.inplace else torch.empty_like(logits_NV)
        logprob.backward(logits_NV, targets_N, log_sum_N, entropy_N, grad_N, entropy_grad_N, out_NV=out_NV, **ctx.where)
        return (out_NV,) + (None,) * 7


def _gather(local: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """[tp, 4, N]: every rank's statistics in rank order. Collective: `group`."""
    if group is None or group.size() == 1:
        return local[None]
    parts = [torch.empty_like(local) for _ in range(group.size())]
    dist.all_gather(parts, local, group=group)
    return torch.stack(parts)


def _combine(stats_P4N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(log sum e^x, mean of x under the softmax, x at the target) of the whole vocabulary from P slices."""
    largest_PN, sums_PN, weighted_PN, target_PN = stats_P4N.unbind(1)
    largest_N = largest_PN.amax(0)
    scale_PN = (largest_PN - largest_N).exp()
    total_N = (sums_PN * scale_PN).sum(0)
    return largest_N + total_N.log(), (weighted_PN * scale_PN).sum(0) / total_N, target_PN.sum(0)
