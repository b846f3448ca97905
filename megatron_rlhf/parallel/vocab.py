"""Log-probs, entropy, exact KL and draws where each tensor-parallel rank holds a slice of the vocabulary.

N rows, V columns of the slice. One all-gather of a few numbers a row; the backward pass communicates nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_rlhf.ops import logprob, sample


@dataclass(frozen=True, slots=True)
class Part:
    """Which words a slice holds, and the group that holds the others; `group` None is a vocabulary held whole."""

    vocab_start: int
    vocab_size: int
    group: dist.ProcessGroup | None
    temperature: float

    def where(self, width: int) -> dict[str, Any]:
        """What the local pass of `width` columns must know."""
        columns = max(0, min(width, self.vocab_size - self.vocab_start))
        return {"vocab_start": self.vocab_start, "columns": columns, "temperature": self.temperature}


@dataclass(frozen=True, slots=True)
class Sums:
    """Entropy and KL of a row, and what its gradient needs of the whole vocabulary: (m, S, Z / S), (m', D / S)."""

    entropy_N: Tensor
    sums_3N: Tensor
    kl_N: Tensor | None = None
    reference_sums_2N: Tensor | None = None


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
    Never above 0 and ln V, never below 0 the entropy.

    Collective: `group` (tp).
    """
    part = Part(vocab_start, vocab_size, group, temperature)
    found = _rows(logits, None, targets, part, entropy, inplace)
    return found[0], found[1] if entropy else None


def kl(
    logits: Tensor,
    reference_logits: Tensor,
    targets: Tensor,
    *,
    vocab_start: int,
    vocab_size: int,
    group: dist.ProcessGroup | None = None,
    temperature: float = 1.0,
    inplace: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(log-probs, entropy, KL(policy || reference), reference log-probs) of `targets`, float32, equal on all ranks.

    The KL is the exact sum over the vocabulary, never below 0; exactly 0 where both logits are the same. As `logprobs`
    otherwise; `reference_logits` has the shape and dtype of the logits and gets no gradient, nor has its log-prob one.

    Collective: `group` (tp).
    """
    part = Part(vocab_start, vocab_size, group, temperature)
    found = _rows(logits, reference_logits.detach(), targets, part, True, inplace)
    return found[0], found[1], found[2], found[3]


def draw(
    logits: Tensor,
    keys_2N: Tensor | None,
    *,
    vocab_start: int,
    vocab_size: int,
    group: dist.ProcessGroup | None = None,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Words [N] drawn from softmax(logits / temperature) and their log-probs [N] float32, equal on all ranks.

    Noise is keyed by `random.row_keys` and the word alone, so a draw does not depend on the split; without keys the
    most probable word is taken. `logits` [N, V/tp] as in `logprobs`.

    Collective: `group` (tp).
    """
    where = Part(vocab_start, vocab_size, group, temperature).where(logits.shape[1])
    stats_P5N = _gather(sample.best(logits.detach(), keys_2N, **where), group)
    winner_1N = stats_P5N[:, 0].argmax(0, keepdim=True)
    largest_N, sum_N, _ = _sums(stats_P5N[:, 2], stats_P5N[:, 3], None)
    chosen_N = stats_P5N[:, 4].gather(0, winner_1N)[0].double()
    logprobs_N = ((chosen_N - largest_N) - sum_N.log()).clamp(max=0).float()
    return stats_P5N[:, 1].gather(0, winner_1N)[0].long(), logprobs_N


def _rows(
    logits: Tensor, reference: Tensor | None, targets: Tensor, part: Part, entropy: bool, inplace: bool
) -> list[Tensor]:
    """The answers of `_Rows` that were asked for, in the shape of the targets."""
    turned = logits.dim() == 3 and not logits.is_contiguous() and logits.transpose(0, 1).is_contiguous()
    if turned:
        logits, targets = logits.transpose(0, 1), targets.transpose(0, 1)
        reference = None if reference is None else reference.transpose(0, 1)
    shape = targets.shape
    found = _Rows.apply(
        logits.reshape(-1, logits.shape[-1]),
        None if reference is None else reference.reshape(-1, reference.shape[-1]),
        targets.reshape(-1).to(logits.device),
        part,
        entropy,
        inplace,
    )
    answers = [rows.reshape(shape) for rows in found]
    return [rows.transpose(0, 1) for rows in answers] if turned else answers


class _Rows(torch.autograd.Function):
    """The local statistics, their gather in rank order, and the gradient of the local slice."""

    @staticmethod
    def forward(
        ctx: Any,
        logits_NV: Tensor,
        reference_NV: Tensor | None,
        targets_N: Tensor,
        part: Part,
        entropy: bool,
        inplace: bool,
    ) -> tuple[Tensor, ...]:
        logprobs_N, reference_N, sums = statistics(logits_NV, reference_NV, targets_N, part)
        entropy_N = sums.entropy_N if entropy else None
        ctx.save_for_backward(logits_NV, reference_NV, targets_N, sums.sums_3N, sums.reference_sums_2N)
        ctx.part, ctx.inplace = part, inplace
        ctx.set_materialize_grads(False)
        if reference_N is not None:
            ctx.mark_non_differentiable(reference_N)
        # torch.compile traces no backward pass of an output that is None
        return tuple(rows for rows in (logprobs_N, entropy_N, sums.kl_N, reference_N) if rows is not None)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads_N: Tensor | None) -> tuple[Tensor | None, ...]:
        logits_NV, *given = ctx.saved_tensors
        # log-prob, then entropy where it was asked for, then KL where there is a reference
        logprob_entropy_kl = (*grads_N, None, None)[:3]
        if all(grad is None for grad in logprob_entropy_kl):
            return (None,) * 6
        out_NV = logits_NV.detach() if ctx.inplace else torch.empty_like(logits_NV)
        where = ctx.part.where(logits_NV.shape[1])
        logprob.backward(logits_NV, *given, *logprob_entropy_kl, out_NV=out_NV, **where)
        return (out_NV,) + (None,) * 5


def statistics(
    logits_NV: Tensor, reference_NV: Tensor | None, targets_N: Tensor, part: Part
) -> tuple[Tensor, Tensor | None, Sums]:
    """Log-probs [N], the reference's [N], and the sums a gradient needs. Collective: the part's group."""
    where = part.where(logits_NV.shape[1])
    if reference_NV is None:
        local = logprob.stats(logits_NV, targets_N, **where)
    else:
        local = logprob.kl_stats(logits_NV, reference_NV, targets_N, **where)
    return combine(_gather(local, part.group), targets_N, part.vocab_size)


def combine(stats_PKN: Tensor, targets_N: Tensor, vocab_size: int) -> tuple[Tensor, Tensor | None, Sums]:
    """What `statistics` says, of the numbers of P slices (4 a row, or 8 with a reference), put together in float64.

    Rounding may leave the range of an entropy or a KL; they are put back into it.
    """
    dtype, ignored_N, outside_N = stats_PKN.dtype, targets_N < 0, targets_N >= vocab_size
    m_PN, S_PN, Z_PN, t_PN, *more = stats_PKN.unbind(1)
    m_N, S_N, Z_N = _sums(m_PN, S_PN, Z_PN)
    ln_S_N = S_N.log()

    def rounded(x_N: Tensor) -> Tensor:
        return x_N.masked_fill(ignored_N, 0).to(dtype)

    def at_target(t_PN: Tensor, m_N: Tensor, ln_S_N: Tensor) -> Tensor:
        x_N = ((t_PN.double().sum(0) - m_N) - ln_S_N).clamp(max=0)
        return rounded(x_N.masked_fill(outside_N, torch.nan))

    mean_N = Z_N / S_N
    sums_3N = torch.stack([m_N, S_N, mean_N]).to(dtype)
    entropy_N = rounded((ln_S_N - mean_N).clamp(0, math.log(max(vocab_size, 1))))
    if not more:
        return at_target(t_PN, m_N, ln_S_N), None, Sums(entropy_N, sums_3N)
    D_PN, reference_m_PN, reference_S_PN, reference_t_PN = more
    reference_m_N, reference_S_N, _ = _sums(reference_m_PN, reference_S_PN, None)
    by_PN = (m_PN.double() - m_N) - (reference_m_PN.double() - reference_m_N)
    D_N = _moved(D_PN, S_PN, by_PN, (m_PN.double() - m_N).exp())
    reference_ln_S_N = reference_S_N.log()
    mean_apart_N = D_N / S_N
    kl_N = rounded((mean_apart_N - ln_S_N + reference_ln_S_N).clamp(min=0))
    reference_sums_2N = torch.stack([reference_m_N, mean_apart_N]).to(dtype)
    return (
        at_target(t_PN, m_N, ln_S_N),
        at_target(reference_t_PN, reference_m_N, reference_ln_S_N),
        Sums(entropy_N, sums_3N, kl_N, reference_sums_2N),
    )


def _sums(m_PN: Tensor, S_PN: Tensor, Z_PN: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """m, S and Z of the whole vocabulary in float64; Z is 0 where it was not asked for."""
    m_N = m_PN.double().amax(0)
    by_PN = m_PN.double() - m_N
    scale_PN = by_PN.exp()
    S_N = _moved(S_PN, S_PN, torch.zeros_like(by_PN), scale_PN)
    Z_N = torch.zeros_like(S_N) if Z_PN is None else _moved(Z_PN, S_PN, by_PN, scale_PN)
    return m_N, S_N, Z_N


def _moved(sum_PN: Tensor, S_PN: Tensor, by_PN: Tensor, scale_PN: Tensor) -> Tensor:
    """The sum over slices of e^d (sum + d S); a slice of weight 0 counts for nothing, its m may be -inf."""
    moved_PN = (sum_PN.double() + by_PN * S_PN.double()) * scale_PN
    return moved_PN.masked_fill((S_PN == 0) | (scale_PN == 0), 0).sum(0)


def _gather(local: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """[tp, K, N]: every rank's statistics in rank order. Collective: `group`."""
    if group is None or group.size() == 1:
        return local[None]
    if local.shape[-1] == 0:  # on all ranks
        return local.expand(group.size(), *local.shape)
    parts = [torch.empty_like(local) for _ in range(group.size())]
    dist.all_gather(parts, local, group=group)
    return torch.stack(parts)
