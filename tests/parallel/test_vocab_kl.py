"""Proves what is computed over a split vocabulary besides log-probs: the exact KL, draws, and log-probs straight from
hidden states; that every split agrees, and that the gradients are the numerical ones.

Not proved here: errors (test_vocab_accuracy.py), ranges (test_vocab_ranges.py), NCCL, Megatron-Core's own reduction of
the hidden gradient, and memory (benchmarks/logprob.py).
"""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rlhf.ops import library
from megatron_rlhf.parallel import random, vocab
from megatron_rlhf.parallel.vocab_head import linear_logprobs
from tests.helpers.grid import on_grid

PATHS = ["kernels", "reference"]
_WORDS, _COLUMNS, _ROWS = 1003, 1024, 24


def _path(name: str) -> contextlib.AbstractContextManager[None]:
    """Kernels or reference; skips where the kernels are missing."""
    if name == "kernels" and not library.loaded():
        pytest.skip(library.WHY_NOT)
    return library.references() if name == "reference" else contextlib.nullcontext()


def _random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def _targets() -> Tensor:
    targets = torch.randint(0, _WORDS, (_ROWS,), generator=torch.Generator().manual_seed(1))
    targets[[3, 11]] = -1
    return targets


def _expected(logits: Tensor, reference: Tensor, targets: Tensor, temperature: float) -> list[Tensor]:
    """Log-probs, entropy, KL and reference log-probs in float64 by plain torch."""
    p, q = ((x[:, :_WORDS].double() / temperature).log_softmax(1) for x in (logits, reference))
    kept, column = targets >= 0, targets.clamp(min=0)[:, None]
    answers = p.gather(1, column)[:, 0], -(p.exp() * p).sum(1), (p.exp() * (p - q)).sum(1), q.gather(1, column)[:, 0]
    return [answer * kept for answer in answers]


@pytest.mark.parametrize("path", PATHS)
def test_gradcheck(path: str) -> None:
    """The written gradients of log-prob, entropy and KL together are the numerical ones; the reference gets none."""
    logits, reference, targets = _random(4, 7).requires_grad_(), _random(4, 7, seed=1), torch.tensor([0, -1, 5, 3])

    def answer(x: Tensor) -> tuple[Tensor, ...]:
        return vocab.kl(x, reference, targets, vocab_start=0, vocab_size=6, temperature=0.8)[:3]

    with _path(path):
        assert torch.autograd.gradcheck(answer, (logits,))
        found = vocab.kl(logits, reference.requires_grad_(), targets, vocab_start=0, vocab_size=6)
    assert [x.requires_grad for x in found] == [True, True, True, False]
    sum(x.sum() for x in found).backward()  # type: ignore[union-attr]
    assert reference.grad is None


@pytest.mark.parametrize("path", PATHS)
def test_equal_logits_have_no_kl(path: str) -> None:
    """Exactly 0, with a gradient of exactly 0; both log-probs are the same bits."""
    logits = _random(6, 50304, dtype=torch.float32).requires_grad_()
    with _path(path):
        found = vocab.kl(logits, logits.detach().clone(), torch.arange(6), vocab_start=0, vocab_size=50257)
        (gradient,) = torch.autograd.grad(found[2].sum(), logits)
    assert not found[2].any() and torch.equal(found[0], found[3])
    assert gradient.abs().max() < 1e-9


@pytest.mark.parametrize("path", PATHS)
def test_in_place_gradient_reuses_the_logits(path: str) -> None:
    """Same values, in the logits' memory, and a second backward pass raises."""
    source, reference = _random(6, 40, dtype=torch.float32).requires_grad_(), _random(6, 40, seed=1).float()
    gradients = []
    with _path(path):
        for inplace in (False, True):
            logits = source * 1.0
            seen: list[Tensor] = []
            logits.register_hook(seen.append)
            total = sum(
                x.sin().sum()
                for x in vocab.kl(logits, reference, torch.arange(6), vocab_start=0, vocab_size=37, inplace=inplace)
            )
            gradients.append(torch.autograd.grad(total, source, retain_graph=True)[0])  # type: ignore[arg-type]
            assert (seen[0].data_ptr() == logits.data_ptr()) == inplace
        assert torch.equal(*gradients)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(total, source)  # type: ignore[arg-type]


def _groups() -> dict[int, dist.ProcessGroup | None]:
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    return {1: None, 2: pairs[dist.get_rank() // 2], 4: dist.group.WORLD}


@on_grid(4)
@pytest.mark.parametrize("path", PATHS)
def test_every_split_agrees(path: str) -> None:
    """tp1, tp2 and tp4 within 5e-7 max(1, |x|) of each other, ranks bit-equal, in every dtype; close to float64."""
    groups, rank = _groups(), dist.get_rank()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        whole = _random(_ROWS, _COLUMNS, seed=2) * 3 + 20
        reference = whole + _random(_ROWS, _COLUMNS, seed=3) * 0.3
        whole[:, -21:], targets = torch.nan, _targets()
        whole[5, :900] = -torch.inf  # whole slices without weight
        whole, reference, weights = whole.to(dtype), reference.to(dtype), _random(4, _ROWS, seed=4).float()
        first: tuple[list[Tensor], Tensor] | None = None
        for tp, group in groups.items():
            width, place = _COLUMNS // tp, rank % tp
            at = slice(place * width, (place + 1) * width)
            logits = whole[:, at].clone().requires_grad_()
            where: dict[str, Any] = {"vocab_start": at.start, "vocab_size": _WORDS, "group": group, "temperature": 0.7}
            with _path(path):
                found = list(vocab.kl(logits, reference[:, at], targets, **where))
                total = sum((x * w).sum() for x, w in zip(found[:3], weights, strict=False))
                (gradient,) = torch.autograd.grad(total, logits)  # type: ignore[arg-type]
            for answer in found:
                others = [torch.empty_like(answer) for _ in range(4)]
                dist.all_gather(others, answer.detach())
                assert all(torch.equal(other.nan_to_num(), answer.nan_to_num()) for other in others)
            first = first or (found, gradient)
            for ours, one in zip(found, first[0], strict=True):
                finite = one.isfinite()
                assert torch.equal(finite, ours.isfinite())
                assert ((ours - one).abs()[finite] <= 5e-7 * one.abs().clamp(min=1)[finite]).all()
            if dtype == torch.float32:
                difference = (gradient - first[1][:, at]).abs()
                assert difference.max() <= 5e-7 * max(1, first[1].abs().max().item()), difference.max()
        assert first is not None
        keep = torch.arange(_ROWS) != 5
        for ours, right in zip(first[0], _expected(whole, reference, targets, 0.7), strict=True):
            torch.testing.assert_close(ours[keep].double(), right[keep], rtol=3e-7, atol=3e-6)


@on_grid(4)
@pytest.mark.parametrize("path", PATHS)
def test_a_draw_does_not_depend_on_the_split(path: str) -> None:
    """Same words and nearly the same log-probs at tp1, tp2 and tp4; they are those of noise, argmax and log-softmax."""
    whole, keys = (
        _random(_ROWS, _COLUMNS, seed=2, dtype=torch.float32) * 2,
        random.row_keys(5, 1, torch.arange(_ROWS), torch.arange(_ROWS)),
    )
    scaled = whole[:, :_WORDS] / 0.7
    noise = random.gumbel(5, 1, torch.arange(_ROWS), torch.arange(_ROWS), 0, _WORDS)
    for tp, group in _groups().items():
        width, place = _COLUMNS // tp, dist.get_rank() % tp
        logits = whole[:, place * width : (place + 1) * width]
        where: dict[str, Any] = {"vocab_start": place * width, "vocab_size": _WORDS, "group": group}
        with _path(path):
            words, chosen = vocab.draw(logits, keys, **where, temperature=0.7)
            greedy, _ = vocab.draw(logits, None, **where)
            again, _ = vocab.logprobs(logits, words, **where, temperature=0.7)
        assert torch.equal(words, (scaled + noise).argmax(1)) and torch.equal(greedy, whole[:, :_WORDS].argmax(1))
        torch.testing.assert_close(chosen, again, rtol=1e-7 if path == "kernels" else 1e-6, atol=0)
        wanted = scaled.double().log_softmax(1).gather(1, words[:, None])[:, 0]
        torch.testing.assert_close(chosen.double(), wanted, rtol=0, atol=1e-6)


@on_grid(4)
@pytest.mark.parametrize("path", PATHS)
def test_log_probs_from_hidden_states(path: str) -> None:
    """As through the logits, gradients of hidden (summed over the ranks) and weight included, whatever the piece."""
    hidden, weight = _random(4, 6, 16, seed=5), _random(_COLUMNS, 16, seed=6)
    targets, weights = _targets().reshape(4, 6), _random(2, 4, 6, seed=7)
    answers, w_grads = [], []
    for tp, group in _groups().items():
        width, place = _COLUMNS // tp, dist.get_rank() % tp
        where: dict[str, Any] = {"vocab_start": place * width, "vocab_size": _WORDS, "group": group}
        for rows in (1, 5, 256):
            h = hidden.clone().requires_grad_()
            w = weight[place * width : (place + 1) * width].clone().requires_grad_()
            with _path(path):
                if tp == 1 and rows == 1:
                    found = vocab.logprobs(h @ w.T, targets, **where, entropy=True)
                else:
                    found = linear_logprobs(h, w, targets, **where, entropy=True, rows=rows)
                assert found[1] is not None
                total = (found[0] * weights[0] + found[1] * weights[1]).sum()
                h_grad, w_grad = torch.autograd.grad(total, (h, w))
            if group is not None:
                dist.all_reduce(h_grad, group=group)
            answers.append((found[0], found[1], h_grad))
            w_grads.append((slice(place * width, (place + 1) * width), w_grad))
    for again in answers[1:]:
        torch.testing.assert_close(again, answers[0], rtol=0, atol=1e-11)
    for at, w_grad in w_grads:
        torch.testing.assert_close(w_grad, w_grads[0][1][at], rtol=0, atol=1e-11)


@pytest.mark.parametrize("path", PATHS)
def test_hidden_states_without_a_target(path: str) -> None:
    """No row left: zeros, and zero gradients."""
    hidden, weight = (_random(rows, 4, dtype=torch.float32).requires_grad_() for rows in (3, 9))
    with _path(path):
        found, nothing = linear_logprobs(hidden, weight, torch.full((3,), -1), vocab_start=0, vocab_size=9)
        found.sum().backward()
    assert not found.any() and nothing is None
    assert hidden.grad is not None and weight.grad is not None and not hidden.grad.any() and not weight.grad.any()
