"""Proves that the vocabulary-parallel log-prob and entropy are those of torch's log_softmax, gradients included, with
padding rows of the vocabulary left out and whatever the split.

Not proved here: errors at real widths (test_vocab_accuracy.py), NCCL, and speed (benchmarks); memory is only looked at
through the in-place gradient.
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rlhf.parallel import vocab
from tests.helpers.grid import on_grid

_WORDS = 13


def _logits(rows: int, columns: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return (torch.randn(rows, columns, generator=torch.Generator().manual_seed(2)) * 3).to(dtype)


def _targets(rows: int, words: int = _WORDS) -> Tensor:
    return torch.randint(0, words, (rows,), generator=torch.Generator().manual_seed(4))


def _expected(logits: Tensor, targets: Tensor, temperature: float, words: int = _WORDS) -> tuple[Tensor, Tensor]:
    log_p = torch.log_softmax(logits[..., :words].double() / temperature, -1)
    present = targets >= 0
    chosen = log_p.gather(-1, targets.clamp(min=0)[..., None])[..., 0] * present
    return chosen, -(log_p.exp() * log_p).sum(-1) * present


def _gradient(answer: tuple[Tensor, Tensor | None], logits: Tensor, weights: Tensor) -> Tensor:
    chosen, entropy = answer
    assert entropy is not None
    (gradient,) = torch.autograd.grad((chosen * weights[0] + entropy * weights[1]).sum(), logits)
    return gradient


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.5])
@pytest.mark.parametrize("padding", [0, 3])
def test_float64_is_log_softmax(temperature: float, padding: int) -> None:
    """Log-probs, entropy and gradients agree to 1e-12, padding columns and ignored targets included."""
    logits = _logits(9, _WORDS + padding).requires_grad_()
    targets = _targets(9)
    targets[[2, 5]] = -100
    weights = torch.randn(2, 9, dtype=torch.float64)
    answer = vocab.logprobs(logits, targets, vocab_start=0, vocab_size=_WORDS, temperature=temperature, entropy=True)
    expected = _expected(logits, targets, temperature)
    torch.testing.assert_close(answer, expected, rtol=0, atol=1e-12)
    ours, theirs = _gradient(answer, logits, weights), _gradient(expected, logits, weights)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    assert not ours[[2, 5]].any() and not ours[:, _WORDS:].any()


def test_gradcheck() -> None:
    """The written gradient is the numerical one, of the log-prob alone and with the entropy."""
    logits, targets = _logits(4, 7).requires_grad_(), torch.tensor([0, -1, 5, 3])
    for entropy in (False, True):

        def answer(x: Tensor, entropy: bool = entropy) -> tuple[Tensor, ...]:
            both = vocab.logprobs(x, targets, vocab_start=0, vocab_size=6, temperature=0.8, entropy=entropy)
            return tuple(part for part in both if part is not None)

        assert torch.autograd.gradcheck(answer, (logits,))


def test_padding_columns_do_not_enter_the_denominator() -> None:
    """Whatever stands in the padding, infinities and NaN too, gives the bits that zeros there give."""
    logits, targets = _logits(5, _WORDS + 3, torch.float32), _targets(5)
    answers = []
    for padding in (0.0, 1e30, torch.inf, torch.nan):
        filled = logits.clone()
        filled[:, _WORDS:] = padding
        filled.requires_grad_()
        answer = vocab.logprobs(filled, targets, vocab_start=0, vocab_size=_WORDS, entropy=True)
        assert answer[1] is not None
        answers.append((answer[0], answer[1], _gradient(answer, filled, torch.ones(2, 5))))
    for again in answers[1:]:
        assert all(torch.equal(ours, first) for ours, first in zip(again, answers[0], strict=True))
    torch.testing.assert_close(answers[0][:2], _expected(logits, targets, 1.0), rtol=0, atol=2e-6, check_dtype=False)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-6), (torch.float16, 2e-6)])
def test_low_precision_logits_are_computed_in_float32(dtype: torch.dtype, limit: float) -> None:
    """The answer is float32 and exact for the rounded logits; the gradient has the logits' dtype."""
    logits, targets = _logits(6, _WORDS, dtype).requires_grad_(), _targets(6)
    answer = vocab.logprobs(logits, targets, vocab_start=0, vocab_size=_WORDS, entropy=True)
    assert answer[0].dtype == torch.float32
    torch.testing.assert_close(answer, _expected(logits, targets, 1.0), rtol=0, atol=limit, check_dtype=False)
    assert _gradient(answer, logits, torch.ones(2, 6)).dtype == dtype


def test_large_logits_neither_overflow_nor_vanish() -> None:
    """Logits of +-1e4 keep finite log-probs; one certain word has log-prob 0 and entropy 0."""
    logits = torch.tensor([[1e4, -1e4, 0.0], [-1e4, -1e4, -1e4]])
    chosen, entropy = vocab.logprobs(logits, torch.tensor([0, 1]), vocab_start=0, vocab_size=3, entropy=True)
    assert entropy is not None
    assert chosen.tolist() == pytest.approx([0.0, -1.0986123], abs=1e-3)
    assert entropy.tolist() == pytest.approx([0.0, 1.0986123], abs=2e-3)


def test_a_target_outside_the_vocabulary_is_loud() -> None:
    """A target in the padding or beyond gives NaN and not the log-sum."""
    chosen, _ = vocab.logprobs(_logits(3, 16), torch.tensor([12, 13, 99]), vocab_start=0, vocab_size=_WORDS)
    assert chosen.isnan().tolist() == [False, True, True]


@pytest.mark.parametrize("turned", [False, True])
def test_in_place_gradient_reuses_the_logits(turned: bool) -> None:
    """The gradient has the same values, lies where the logits lay, and a second backward pass raises."""
    source = _logits(6, _WORDS).reshape(2, 3, _WORDS).requires_grad_()
    targets = _targets(6).reshape(3, 2) if turned else _targets(6).reshape(2, 3)
    gradients = []
    for inplace in (False, True):
        held = source * 1.0
        seen: list[Tensor] = []
        held.register_hook(seen.append)
        logits = held.transpose(0, 1) if turned else held
        chosen, _ = vocab.logprobs(logits, targets, vocab_start=0, vocab_size=_WORDS, inplace=inplace)
        assert chosen.shape == targets.shape
        (gradient,) = torch.autograd.grad(chosen.sin().sum(), source, retain_graph=True)
        gradients.append(gradient)
        assert (seen[0].data_ptr() == held.data_ptr()) == inplace
    assert torch.equal(gradients[0], gradients[1])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(chosen.sin().sum(), source)


def test_ignored_rows_are_not_read() -> None:
    """NaN logits of an ignored row reach neither its neighbours nor a gradient."""
    logits, targets = _logits(4, _WORDS), _targets(4)
    logits[2], targets[2] = torch.nan, -1
    logits.requires_grad_()
    answer = vocab.logprobs(logits, targets, vocab_start=0, vocab_size=_WORDS, entropy=True)
    torch.testing.assert_close(answer[0][[0, 1, 3]], _expected(logits, targets, 1.0)[0][[0, 1, 3]], rtol=0, atol=1e-12)
    assert answer[0][2] == 0
    gradient = _gradient(answer, logits, torch.ones(2, 4))
    assert gradient.isfinite().all() and not gradient[2].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_ignored_rows_of_sixteen_bits(dtype: torch.dtype) -> None:
    """The gradient comes in the logits' dtype, rounded from fp32, 0 where a row is ignored."""
    logits, targets = _logits(5, _WORDS, torch.float32).to(dtype), _targets(5)
    targets[1] = -1
    logits.requires_grad_()
    answer = vocab.logprobs(logits, targets, vocab_start=0, vocab_size=_WORDS, entropy=True)
    gradient = _gradient(answer, logits, torch.ones(2, 5))
    assert gradient.dtype == dtype and not gradient[1].any()
    wide = logits.detach().float().requires_grad_()
    exact = _gradient(
        vocab.logprobs(wide, targets, vocab_start=0, vocab_size=_WORDS, entropy=True), wide, torch.ones(2, 5)
    )
    torch.testing.assert_close(gradient, exact.to(dtype))


@on_grid(4)
def test_every_split_of_the_vocabulary_agrees() -> None:
    """tp1, tp2 and tp4 (its last slice all padding) are within 3e-6 of float64, ranks bit-equal."""
    rank = dist.get_rank()
    groups = {1: None, 2: [dist.new_group([0, 1]), dist.new_group([2, 3])][rank // 2], 4: dist.group.WORLD}
    words, columns = 23, 32
    whole, targets, weights = _logits(11, columns, torch.float32), _targets(11, words), torch.randn(2, 11)
    targets[3] = -1
    expected = _expected(whole, targets, 0.8, words)
    answers = {}
    for tp, group in groups.items():
        width, place = columns // tp, rank % tp
        logits = whole[:, place * width : (place + 1) * width].clone().requires_grad_()
        answer = vocab.logprobs(
            logits, targets, vocab_start=place * width, vocab_size=words, group=group, temperature=0.8, entropy=True
        )
        torch.testing.assert_close(answer, expected, rtol=0, atol=3e-6, check_dtype=False)
        others = [torch.empty_like(answer[0]) for _ in range(4)]
        dist.all_gather(others, answer[0].detach())
        assert all(torch.equal(other, answer[0]) for other in others)
        gradient = _gradient(answer, logits, weights)
        answers[tp] = gradient
        torch.testing.assert_close(gradient, answers[1][:, place * width : (place + 1) * width], rtol=0, atol=3e-6)
