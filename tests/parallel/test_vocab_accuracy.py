"""Proves how exact log-prob, entropy, exact KL and their gradients are over a vocabulary that is held whole or split
over two or four ranks: at most twice the error of eager code on the whole logits in float32, against float64, at real
widths, in every dtype, with ignored rows, absent words and padding; that the splits agree to 5e-7 max(1, |x|), numbers
and gradients alike, and that every rank has the same bits.

Not proved here: NCCL; ranges and extreme logits (test_vocab_ranges.py).
"""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rlhf.ops import library
from megatron_rlhf.parallel import vocab
from tests.helpers import softmax
from tests.helpers.grid import on_grid
from tests.helpers.softmax import Case, Numbers

QUICK = {(1003, 1.0), (1003, 0.7), (6288, 0.7)}
CASES = [
    pytest.param(columns, dtype, temperature, marks=[] if (columns, temperature) in QUICK else [pytest.mark.slow])
    for columns in softmax.SIZES
    for dtype in softmax.DTYPES
    for temperature in (1.0, 0.7)
]


def _answers(logits: Tensor, reference: Tensor, case: Case, where: dict[str, Any]) -> Numbers:
    """Numbers and the slice's gradients, each through the function that a caller would choose for it."""
    logits = logits.clone().requires_grad_()
    alone, _ = vocab.logprobs(logits, case.targets_N, **where)
    both = vocab.logprobs(logits, case.targets_N, **where, entropy=True)
    found = vocab.kl(logits, reference, case.targets_N, **where)
    assert both[1] is not None
    assert torch.equal(alone, both[0]) and torch.equal(alone, found[0])
    # sums beside a reference are grown at other tiles
    torch.testing.assert_close(found[1], both[1], rtol=3e-7, atol=5e-7)
    answers = {"log-prob": alone, "entropy": both[1], "KL": found[2]}
    for count, terms in ((1, (alone,)), (2, both), (3, found[:3])):
        total = sum((x * g).sum() for x, g in zip(terms, case.grads_3N, strict=False))  # type: ignore[union-attr]
        assert isinstance(total, Tensor)
        (answers[f"gradient of {count}"],) = torch.autograd.grad(total, logits, retain_graph=True)
    return {name: x.detach() for name, x in answers.items()}


def _whole(answers: Numbers, tp: int, columns: int) -> Numbers:
    """The answers with gradients of the whole vocabulary, padding left out. Collective: the world."""
    found = {}
    for name, mine in answers.items():
        parts = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, mine)
        if not name.startswith("gradient"):
            assert all(torch.equal(part, mine) for part in parts), f"{name} differs between ranks"
            found[name] = mine
        else:
            gradient = torch.cat(parts[:tp], 1)
            assert not gradient[:, columns:].any()
            found[name] = gradient[:, :columns]
    return found


@on_grid(4)
@pytest.mark.parametrize("path", ["kernels", "reference"])
@pytest.mark.parametrize(("columns", "dtype", "temperature"), CASES)
def test_error_and_agreement_of_every_split(path: str, columns: int, dtype: torch.dtype, temperature: float) -> None:
    """16-bit logits give the numbers of the same logits in float32, and their gradients are those, rounded once."""
    if path == "kernels" and not library.loaded():
        pytest.skip(library.WHY_NOT)
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    groups = {1: None, 2: pairs[dist.get_rank() // 2], 4: dist.group.WORLD}
    case = softmax.draw(columns, dtype, temperature)
    padding = (0, -columns % 4 + 4)
    logits, reference = (
        torch.nn.functional.pad(x, padding, value=torch.nan) for x in (case.logits_NV, case.reference_NV)
    )
    found: dict[int, Numbers] = {}
    for tp, group in groups.items():
        width, place = logits.shape[1] // tp, dist.get_rank() % tp
        at = slice(place * width, (place + 1) * width)
        where = {"vocab_start": at.start, "vocab_size": columns, "group": group, "temperature": temperature}
        with library.references() if path == "reference" else contextlib.nullcontext():
            wide = _answers(logits[:, at].float(), reference[:, at].float(), case, where)
            if dtype != torch.float32:
                narrow = _answers(logits[:, at], reference[:, at], case, where)
                assert all(torch.equal(x, wide[name].to(x.dtype)) for name, x in narrow.items())
        found[tp] = _whole(wide, tp, columns)
    if dist.get_rank() > 0:
        return
    eager, exact = (softmax.eager(case, real) for real in (torch.float32, torch.float64))
    for tp, answers in found.items():
        softmax.assert_at_most_twice(answers, eager, exact)
        for name, x in answers.items():
            one = found[1][name]
            apart = ((x - one).abs() / one.abs().clamp(min=1)).max()
            assert apart <= 5e-7, f"{name} under tp{tp} is {apart:.2e} from tp1"


@on_grid(4)
def test_float64_of_every_split() -> None:
    """Gradients and numbers of float64 logits to 1e-11 of autograd's, whatever the split."""
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    case = softmax.draw(1003, torch.float64, 0.7)
    wide = Case(case.logits_NV, case.reference_NV, case.targets_N, case.grads_3N.double(), case.temperature)
    logits, reference = (torch.nn.functional.pad(x, (0, 1)) for x in (case.logits_NV, case.reference_NV))
    exact = softmax.eager(case, torch.float64)
    for tp, group in {1: None, 2: pairs[dist.get_rank() // 2], 4: dist.group.WORLD}.items():
        width, place = 1004 // tp, dist.get_rank() % tp
        at = slice(place * width, (place + 1) * width)
        where = {"vocab_start": at.start, "vocab_size": 1003, "group": group, "temperature": 0.7}
        found = _whole(_answers(logits[:, at], reference[:, at], wide, where), tp, 1003)
        torch.testing.assert_close(found, exact, rtol=0, atol=1e-11)
