"""Log-probs straight from hidden states, for a head so wide that its logits should never exist: [N, V/tp] ≫ [N, H].

N rows, H hidden, V columns of this rank's slice. The logits are made `rows` rows at a time, in the forward pass for
their statistics and once more in the backward pass for the gradient, which is multiplied on at once: one product more,
and memory of `rows` x V instead of N x V. Rows without a target are left out before the product.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_rlhf.ops import logprob
from megatron_rlhf.parallel.vocab import Part, statistics


def linear_logprobs(
    hidden: Tensor,
    weight_VH: Tensor,
    targets: Tensor,
    *,
    vocab_start: int,
    vocab_size: int,
    group: dist.ProcessGroup | None = None,
    temperature: float = 1.0,
    entropy: bool = False,
    rows: int = 256,
) -> tuple[Tensor, Tensor | None]:
    """What `vocab.logprobs(hidden @ weight.T, targets, ...)` says, [N, V/tp] never being held.

    `hidden` [..., H] is whole and equal on the ranks of the group. Its gradient is this rank's share, of its slice's
    words: the sum over the group is the caller's, as it is of Megatron-Core's column-parallel layers (their input's
    all-reduce, or reduce-scatter under sequence parallelism). The weight's gradient is whole. Rows with a target are
    `rows` at a time; every rank must have the same targets.

    Collective: `group` (tp), once for every `rows` rows.
    """
    shape = targets.shape
    kept = (targets.reshape(-1) >= 0).nonzero().squeeze(1).to(hidden.device)
    hidden_NH = hidden.reshape(-1, hidden.shape[-1]).index_select(0, kept)
    targets_N = targets.reshape(-1).to(hidden.device).index_select(0, kept)
    part = Part(vocab_start, vocab_size, group, temperature)
    found = _Head.apply(hidden_NH, weight_VH, targets_N, part, rows)
    whole = [answer.new_zeros(targets.numel()).index_copy(0, kept, answer).reshape(shape) for answer in found]
    return whole[0], whole[1] if entropy else None


class _Head(torch.autograd.Function):
    """Product, statistics and gradient of a few rows at a time."""

    @staticmethod
    def forward(
        ctx: Any, hidden_NH: Tensor, weight_VH: Tensor, targets_N: Tensor, part: Part, rows: int
    ) -> tuple[Tensor, Tensor]:
        found = []
        for piece_NH, piece_N in zip(hidden_NH.split(rows), targets_N.split(rows), strict=True):
            logprobs_N, _, sums = statistics(piece_NH @ weight_VH.T, None, piece_N, part)
            found.append(torch.cat([torch.stack([logprobs_N, sums.entropy_N]), sums.sums_3N]))
        empty = hidden_NH.new_zeros((5, 0), dtype=torch.promote_types(hidden_NH.dtype, torch.float32))
        logprobs_N, entropy_N, *sums_3N = torch.cat(found, 1) if found else empty
        ctx.save_for_backward(hidden_NH, weight_VH, targets_N, torch.stack(sums_3N))
        ctx.part, ctx.rows = part, rows
        ctx.set_materialize_grads(False)
        return logprobs_N, entropy_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor | None, entropy_grad_N: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden_NH, weight_VH, targets_N, sums_3N = ctx.saved_tensors
        if grad_N is None and entropy_grad_N is None:
            return (None,) * 5
        out_NH, out_VH = torch.zeros_like(hidden_NH), torch.zeros_like(weight_VH, dtype=sums_3N.dtype)
        where = ctx.part.where(len(weight_VH))
        for start in range(0, len(hidden_NH), ctx.rows):
            at = slice(start, start + ctx.rows)
            logits_NV = hidden_NH[at] @ weight_VH.T
            logprob.backward(
                logits_NV,
                None,
                targets_N[at],
                sums_3N[:, at],
                None,
                None if grad_N is None else grad_N[at],
                None if entropy_grad_N is None else entropy_grad_N[at],
                None,
                out_NV=logits_NV,
                **where,
            )
            out_NH[at] = logits_NV @ weight_VH
            out_VH += logits_NV.T @ hidden_NH[at]
        return out_NH, out_VH.to(weight_VH.dtype), None, None, None
