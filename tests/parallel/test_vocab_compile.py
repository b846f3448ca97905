"""Proves that torch.compile takes log-prob, entropy and exact KL of a whole vocabulary, forward and backward through
the autograd function, as one graph without a break, on kernels and references alike, with the same numbers.

Not proved here: a vocabulary that is split (its all-gather); log-probs straight from hidden states as one graph: how
many rows have a target decides their shapes, so the graph breaks there. Speed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from megatron_rlhf.ops import library
from megatron_rlhf.parallel import vocab
from megatron_rlhf.parallel.vocab_head import linear_logprobs

ROWS, COLUMNS, WORDS = 6, 40, 37
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def _logprobs(logits: Tensor, reference: Tensor, targets: Tensor) -> Tensor:
    return vocab.logprobs(logits * 2, targets, vocab_start=0, vocab_size=WORDS, temperature=0.7)[0].sin().sum()


def _entropy(logits: Tensor, reference: Tensor, targets: Tensor) -> Tensor:
    chosen, entropy = vocab.logprobs(logits * 2, targets, vocab_start=0, vocab_size=WORDS, entropy=True)
    assert entropy is not None
    return (chosen.sin() + entropy.cos()).sum()


def _in_place(logits: Tensor, reference: Tensor, targets: Tensor) -> Tensor:
    return vocab.logprobs(logits * 2, targets, vocab_start=0, vocab_size=WORDS, inplace=True)[0].sin().sum()


def _kl(logits: Tensor, reference: Tensor, targets: Tensor) -> Tensor:
    answers = vocab.kl(logits * 2, reference, targets, vocab_start=0, vocab_size=WORDS, temperature=0.7)
    return torch.stack(answers).sin().sum()


def _kl_alone(logits: Tensor, reference: Tensor, targets: Tensor) -> Tensor:
    return vocab.kl(logits * 2, reference, targets, vocab_start=0, vocab_size=WORDS)[2].sum()


def _positions_first(logits: Tensor, reference: Tensor, targets: Tensor) -> Tensor:
    turned = [x.view(2, 3, -1).transpose(0, 1) for x in (logits * 2, reference)]
    return vocab.kl(*turned, targets.view(2, 3).t(), vocab_start=0, vocab_size=WORDS)[2].sin().sum()


@pytest.fixture(params=["kernels", "reference"])
def path(request: pytest.FixtureRequest, device: str) -> Iterator[str]:
    """Kernels or reference, with nothing compiled before."""
    if request.param == "kernels" and not library.serves(torch.zeros(1, 1, device=device)):
        pytest.skip(library.WHY_NOT or f"the kernels were built without {device.upper()}")
    torch._dynamo.reset()
    with library.references() if request.param == "reference" else contextlib.nullcontext():
        yield request.param
    torch._dynamo.reset()


def _given(device: str) -> list[Tensor]:
    source = torch.Generator().manual_seed(0)
    logits, reference = torch.randn(2, ROWS, COLUMNS, generator=source).to(device)
    return [logits.clone().requires_grad_(), reference, torch.tensor([0, 5, -1, 36, 7, -100], device=device)]


@pytest.mark.parametrize("loss", [_logprobs, _entropy, _in_place, _kl, _kl_alone, _positions_first])
def test_one_graph_and_the_same_numbers(path: str, device: str, loss: Loss) -> None:
    """fullgraph=True raises where the graph would break; results and gradients have the bits of eager execution."""
    given = _given(device)
    plain = loss(*given)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)(*given)
    assert torch.equal(compiled, plain)
    gradients = [torch.autograd.grad(total, given[0])[0] for total in (compiled, plain)]
    assert torch.equal(*gradients) and gradients[0].any()


@pytest.mark.slow
def test_hidden_states_break_the_graph_and_keep_their_numbers(path: str, device: str) -> None:
    """The shape of the rows that have a target is data: torch.compile says so, or breaks the graph and goes on."""
    hidden, weight, targets = _given(device)

    def loss(hidden: Tensor) -> Tensor:
        return linear_logprobs(hidden, weight, targets.clamp(max=5), vocab_start=0, vocab_size=6, rows=2)[0].sum()

    with pytest.raises(Exception, match=r"nonzero|data-dependent|Dynamic shape"):
        torch.compile(loss, backend="aot_eager", fullgraph=True)(hidden)
    torch._dynamo.reset()
    compiled = torch.compile(loss, backend="aot_eager")(hidden)
    torch.testing.assert_close(compiled, loss(hidden))
