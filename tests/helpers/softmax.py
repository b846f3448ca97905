"""Logits with everything a row may have, what plain torch says of them, and the measure of an error.

N rows, V columns. A row is ordinary, ignored (negative target, NaN logits), or has words of -inf.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_rlhf.ops import logprob
from tests.helpers.device import assert_same

SIZES = (1003, 6288, 50304, 128256)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROWS = 12
IGNORED = [3, 7]
ABSENT = [9, 10, 11]
"""Rows whose odd words are -inf."""
Numbers = dict[str, Tensor]
MEASURES = {"root mean square": lambda x: x.square().mean().sqrt(), "largest": torch.max}


@dataclass(frozen=True, slots=True)
class Case:
    """Logits, a near reference, targets, and gradients of log-prob, entropy and KL that add up to 1 a row."""

    logits_NV: Tensor
    reference_NV: Tensor
    targets_N: Tensor
    grads_3N: Tensor
    temperature: float

    def to(self, kind: torch.dtype | str) -> Case:
        """The case with logits of another dtype, or on another device."""
        others = (self.targets_N, self.grads_3N)
        if isinstance(kind, str):
            others = (self.targets_N.to(kind), self.grads_3N.to(kind))
        return Case(self.logits_NV.to(kind), self.reference_NV.to(kind), *others, self.temperature)


def draw(columns: int, dtype: torch.dtype, temperature: float = 1.0, offset: float = 0.0, holes: bool = True) -> Case:
    """A case on the CPU, the same at every call; `holes` gives it ignored rows and words of -inf."""
    source = torch.Generator().manual_seed(columns)
    logits = torch.randn(ROWS, columns, generator=source) * 3 + offset
    reference = logits + 0.2 * torch.randn(ROWS, columns, generator=source)
    targets = torch.randint(0, columns, (ROWS,), generator=source)
    grads = torch.randn(3, ROWS, generator=source)
    grads /= grads.abs().sum(0)
    if holes:
        targets[IGNORED], logits[IGNORED], reference[IGNORED] = -100, torch.nan, torch.inf
        targets[ABSENT] -= targets[ABSENT] % 2
        for row in ABSENT:
            logits[row, 1::2] = reference[row, 1::2] = -torch.inf
    return Case(logits.to(dtype), reference.to(dtype), targets, grads, temperature)


def eager(case: Case, dtype: torch.dtype) -> Numbers:
    """What plain torch, computing in `dtype`, says of a case with holes; of the words that are there, 0 elsewhere."""
    where = [i for i in range(ROWS) if i not in (*IGNORED, *ABSENT)]
    names = ("gradient of 1", "gradient of 2", "gradient of 3")
    found = {name: torch.zeros(ROWS, dtype=dtype) for name in ("log-prob", "entropy", "KL")}
    found |= {name: torch.zeros(case.logits_NV.shape, dtype=dtype) for name in names}
    for rows, step in ((where, 1), (ABSENT, 2)):
        part = Case(
            case.logits_NV[rows, ::step].to(dtype),
            case.reference_NV[rows, ::step].to(dtype),
            case.targets_N[rows] // step,
            case.grads_3N[:, rows].to(dtype),
            case.temperature,
        )
        for name, numbers in plain(part).items():
            if name in names:
                whole = torch.zeros(len(rows), case.logits_NV.shape[1], dtype=dtype)
                whole[:, ::step] = numbers
                numbers = whole
            found[name][rows] = numbers
    return found


def plain(case: Case) -> Numbers:
    """What plain torch says in the logits' own dtype, gradients by autograd; for rows without holes."""
    logits = case.logits_NV.detach().requires_grad_()
    log_p, log_q = ((x / case.temperature).log_softmax(1) for x in (logits, case.reference_NV))
    p = log_p.exp()
    chosen = log_p.gather(1, case.targets_N[:, None])[:, 0]
    entropy, kl = -(p * log_p).sum(1), (p * (log_p - log_q)).sum(1)
    found = {"log-prob": chosen, "entropy": entropy, "KL": kl}
    for count in (1, 2, 3):
        total = sum((x * g.to(x)).sum() for x, g in zip(list(found.values())[:count], case.grads_3N, strict=False))
        assert isinstance(total, Tensor)
        (found[f"gradient of {count}"],) = torch.autograd.grad(total, logits, retain_graph=True)
    return {name: x.detach() for name, x in found.items()}


def local(case: Case) -> Numbers:
    """What the local pass over a whole vocabulary says; gradients before they are rounded to the logits' dtype.

    Asserts on the way that the pass without a reference says the same, and that a gradient of 16-bit logits is the
    float32 gradient of those logits, rounded once.
    """
    logits, targets, dtype = case.logits_NV, case.targets_N, case.logits_NV.dtype
    where: dict[str, Any] = {"vocab_start": 0, "columns": logits.shape[1], "temperature": case.temperature}
    numbers = logprob.kl_stats(logits, case.reference_NV, targets, **where)
    m, S, Z, t, D, reference_m, reference_S, _ = numbers.double()
    alone = logprob.stats(logits, targets, **where)
    torch.testing.assert_close(alone, numbers[:4], rtol=3e-7 if logits.device.type == "cpu" else 2e-6, atol=0)
    real = alone.dtype
    sums = torch.stack([m, S, Z / S]).to(real), torch.stack([reference_m, D / S]).to(real)
    entropy, kl = S.log() - Z / S, D / S - S.log() + reference_S.log()
    found = {"log-prob": (t - m) - S.log(), "entropy": entropy, "KL": kl}
    g, h, k = case.grads_3N.to(real)
    wide = case.to(real)
    for count, given in ((1, (g, None, None)), (2, (g, h, None)), (3, (g, h, k))):
        rest = (*sums, *given)
        out = torch.full_like(wide.logits_NV, 7)
        exact = logprob.backward(wide.logits_NV, wide.reference_NV, targets, *rest, **where, out_NV=out)
        out = torch.full_like(logits, 7)
        rounded = logprob.backward(logits, case.reference_NV, targets, *rest, **where, out_NV=out)
        assert_same(rounded, exact.to(dtype))
        found[f"gradient of {count}"] = exact
    return found


def assert_at_most_twice(ours: Numbers, theirs: Numbers, exact: Numbers) -> None:
    """Our error, its root mean square and its largest, is at most twice that of eager's, both against float64.

    A rounding of the result itself is granted: eager may have been lucky.
    """
    assert ours.keys() == theirs.keys() == exact.keys()
    for name, right in exact.items():
        wrong, allowed = ((x[name].detach().cpu().double() - right).abs() for x in (ours, theirs))
        for what, of in MEASURES.items():
            error, limit = of(wrong), of(allowed)
            assert error <= 2 * limit + 2**-24 * of(right.abs()), f"{name}: {what} {error:.2e}, eager {limit:.2e}"
