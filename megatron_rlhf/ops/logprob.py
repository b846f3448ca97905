"""The local pass of a log-prob over a slice of the vocabulary: statistics of each row, and its gradient.

N rows, V columns of this slice, of which the first `columns` are words and the rest padding; T is the temperature,
x = logits / T and y = reference / T. Knows no group: parallel/vocab.py combines the statistics of the slices. float64
is computed in float64, any other dtype in float32. A row with a negative target is ignored. Sums are relative to the
largest word, as in csrc/mrlhf.h: with plain x, H and the KL would lose their last digits to any offset of the logits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_rlhf.ops import library, logprob_reference


def stats(logits_NV: Tensor, targets_N: Tensor, *, vocab_start: int, columns: int, temperature: float) -> Tensor:
    """[4, N] rows m, S, Z, t: m = max x, S = sum e^(x-m), Z = sum (x-m) e^(x-m), t = x at the target.

    A target outside [vocab_start, vocab_start + columns) gives t = 0. A slice without words, or of -inf alone, gives
    m = -inf, S = Z = 0. An ignored row gives m = 0, S = 1, Z = t = 0. NaN among the words makes S NaN.
    """
    if not library.serves(logits_NV):
        return logprob_reference.stats(
            logits_NV, targets_N, vocab_start=vocab_start, columns=columns, temperature=temperature
        )
    return torch.ops.megatron_rlhf.logprob_stats(logits_NV, targets_N.contiguous(), vocab_start, columns, temperature)


def kl_stats(
    logits_NV: Tensor, reference_NV: Tensor, targets_N: Tensor, *, vocab_start: int, columns: int, temperature: float
) -> Tensor:
    """[8, N] rows m, S, Z, t as `stats`, D = sum ((x-m) - (y-m')) e^(x-m), and m', S', t' of y.

    `reference_NV` has the shape and dtype of the logits.
    """
    if not (library.serves(logits_NV) and library.serves(reference_NV)):
        return logprob_reference.kl_stats(
            logits_NV, reference_NV, targets_N, vocab_start=vocab_start, columns=columns, temperature=temperature
        )
    return torch.ops.megatron_rlhf.logprob_kl_stats(
        logits_NV, reference_NV, targets_N.contiguous(), vocab_start, columns, temperature
    )


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
    """`out_NV` filled with (1/T) [g (1_y - p) - h p (ln p + H) + k p (ln p - ln q - KL)], rounded once.

    g, h and k are the gradients of log-prob, entropy H and KL(p || q), None for 0. The sums are (m, S, Z / S) and
    (m', D / S) of the whole vocabulary: with p = e^(x-m) / S, ln p + H is (x-m) - Z / S, and ln p - ln q - KL is
    (x-m) - (y-m') - D / S. `out_NV` may be `logits_NV`. Padding columns and ignored rows become exactly 0.
    """
    given = (sums_3N, reference_sums_2N, grad_N, entropy_grad_N, kl_grad_N)
    served = library.serves(logits_NV) and library.serves(out_NV)
    if not served or (reference_NV is not None and not library.serves(reference_NV)):
        return logprob_reference.backward(
            logits_NV,
            reference_NV,
            targets_N,
            *given,
            vocab_start=vocab_start,
            columns=columns,
            temperature=temperature,
            out_NV=out_NV,
        )
    even = [numbers if numbers is None else numbers.to(sums_3N.dtype).contiguous() for numbers in given]
    torch.ops.megatron_rlhf.logprob_backward(
        logits_NV, reference_NV, targets_N.contiguous(), *even, vocab_start, columns, temperature, out_NV
    )
    # the kernel writes behind autograd's back; a second backward pass over overwritten logits must raise
    torch.autograd.graph.increment_version(out_NV)
    return out_NV


def _real(logits_NV: Tensor) -> torch.dtype:
    return torch.float64 if logits_NV.dtype == torch.float64 else torch.float32


if library.loaded():

    @torch.library.register_fake("megatron_rlhf::logprob_stats")
    def _stats_fake(logits: Tensor, targets: Tensor, vocab_start: int, columns: int, temperature: float) -> Tensor:
        return logits.new_empty((4, logits.shape[0]), dtype=_real(logits))

    @torch.library.register_fake("megatron_rlhf::logprob_kl_stats")
    def _kl_stats_fake(
        logits: Tensor, reference: Tensor, targets: Tensor, vocab_start: int, columns: int, temperature: float
    ) -> Tensor:
        return logits.new_empty((8, logits.shape[0]), dtype=_real(logits))

    @torch.library.register_fake("megatron_rlhf::logprob_backward")
    def _backward_fake(*arguments: object) -> None:
        return None
