"""Proves that nothing leaves its range, whatever the logits and however the vocabulary is split: log p <= 0,
0 <= H <= ln V, KL >= 0, on random and on adversarial inputs; and that a row without any word is loud and alone.

Not proved here: that slices meet over a network as they do here in one process (test_vocab_accuracy.py).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_rlhf.ops import library, logprob
from megatron_rlhf.parallel import random, vocab

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MOST = {torch.float32: 3e38, torch.bfloat16: 3e38, torch.float16: 6e4}
# rows of every kind at once: an error that a whole row of zeros hides shows in its neighbours
KINDS = ("noise", "flat", "one word", "two words", "falling", "huge", "tiny", "half absent", "last word", "steps")


@pytest.fixture(params=["kernels", "reference"], scope="module")
def path(request: pytest.FixtureRequest, device: str) -> Iterator[str]:
    """Kernels or reference, for all examples of a test."""
    if request.param == "kernels" and not library.serves(torch.zeros(1, 1, device=device)):
        pytest.skip(library.WHY_NOT or f"the kernels were built without {device.upper()}")
    with library.references() if request.param == "reference" else contextlib.nullcontext():
        yield request.param


def _row(kind: str, words: int, source: torch.Generator, most: float) -> Tensor:
    """One row of logits of a kind."""
    noise = torch.randn(words, generator=source, dtype=torch.float64)
    place = torch.arange(words, dtype=torch.float64)
    if kind == "flat":
        return torch.full((words,), float(noise[0] * 100), dtype=torch.float64)
    if kind in ("one word", "two words"):
        x = torch.full((words,), -most if noise[0] > 0 else -30.0, dtype=torch.float64)
        x[int(words * 0.3)] = x[-1] = 5.0
        x[-1] = 5.0 if kind == "two words" else x[0]
        return x
    scaled = {
        "noise": noise * 3,
        "falling": -place * 0.5,
        "huge": noise * most / 20,
        "tiny": 100 + noise * 1e-5,
        "half absent": torch.where(place % 2 == 0, noise, -math.inf),
        "last word": torch.where(place < words - 1, -math.inf, noise),
        "steps": torch.floor(place / 7) * 16,
    }
    return scaled[kind]


def _split(logits: Tensor, reference: Tensor, targets: Tensor, tp: int, words: int, temperature: float) -> list[Tensor]:
    """Log-probs, entropy, KL and reference log-probs, of `tp` slices put together."""
    width = -(-words // tp)
    logits, reference = (
        torch.nn.functional.pad(x, (0, tp * width - words), value=math.nan) for x in (logits, reference)
    )
    parts = []
    for start in range(0, tp * width, width):
        at = slice(start, start + width)
        where = vocab.Part(start, words, None, temperature).where(width)
        parts.append(logprob.kl_stats(logits[:, at], reference[:, at], targets, **where))
    chosen, reference_chosen, sums = vocab.combine(torch.stack(parts), targets, words)
    assert sums.kl_N is not None and reference_chosen is not None
    return [chosen, sums.entropy_N, sums.kl_N, reference_chosen]


def _assert_in_range(found: list[Tensor], words: int) -> None:
    """A word too unlikely for a float32 may have log-prob -inf and make the KL inf, but nothing is NaN."""
    chosen, entropy, kl, reference_chosen = found
    assert not any(x.isnan().any() for x in found)
    assert (chosen <= 0).all() and (reference_chosen <= 0).all() and (kl >= 0).all()
    # the largest entropy is ln V as float32 has it
    assert (entropy >= 0).all() and (entropy <= torch.tensor(math.log(words), dtype=entropy.dtype)).all()


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**31),
    words=st.one_of(st.integers(1, 80), st.sampled_from([1003, 2047, 6288])),
    near=st.sampled_from([0.0, 1e-7, 1e-3, 1.0, 100.0]),
    offset=st.sampled_from([0.0, -50.0, 1e3, 6e4]),
    dtype=st.sampled_from(DTYPES),
    temperature=st.sampled_from([1.0, 0.7, 1e-2]),
    likely=st.booleans(),
)
def test_nothing_leaves_its_range(
    path: str,
    device: str,
    seed: int,
    words: int,
    near: float,
    offset: float,
    dtype: torch.dtype,
    temperature: float,
    likely: bool,
) -> None:
    """References from equal to far, targets the most and the least likely word that is there, tp 1, 2 and 4."""
    source, most = torch.Generator().manual_seed(seed), MOST[dtype]
    # a temperature below 1 must not carry a logit over the largest float32
    most *= min(1.0, temperature)
    rows = torch.stack([_row(kind, words, source, most / 4) for kind in KINDS])
    rows = torch.where(rows.isinf(), rows, (rows + offset).clamp(-most, most))
    others = rows + near * torch.randn(rows.shape, generator=source, dtype=torch.float64)
    others = torch.where(rows.isinf(), rows, others.clamp(-most, most))
    logits, reference = rows.to(dtype).to(device), others.to(dtype).to(device)
    present = logits.float().masked_fill(logits.isneginf(), math.nan if likely else math.inf)
    targets = present.nan_to_num(-math.inf).argmax(1) if likely else present.argmin(1)
    for tp in (1, 2, 4):
        _assert_in_range(_split(logits, reference, targets, tp, words, temperature), words)
    whole = {"vocab_start": 0, "vocab_size": words, "temperature": temperature}
    _assert_in_range(list(vocab.kl(logits, reference, targets, **whole)), words)
    chosen, entropy = vocab.logprobs(logits, targets, **whole, entropy=True)
    assert entropy is not None
    assert (chosen <= 0).all() and (entropy >= 0).all()
    assert (entropy <= torch.tensor(math.log(words), dtype=entropy.dtype)).all()
    place = torch.arange(len(KINDS), device=device)
    for keys in (None, random.row_keys(seed, 0, place, place)):
        drawn, drawn_chosen = vocab.draw(logits, keys, **whole)
        assert (drawn_chosen <= 0).all() and (drawn >= 0).all() and (drawn < words).all()
        assert logits.gather(1, drawn[:, None]).isfinite().all()


def test_a_row_without_words_is_loud_and_alone(path: str, device: str) -> None:
    """A row of -inf has no distribution: NaN, as torch says, in numbers and gradient; its neighbours keep theirs."""
    source = torch.Generator().manual_seed(0)
    logits, reference = torch.randn(2, 4, 50, generator=source).to(device)
    targets = torch.tensor([0, 1, 2, 3], device=device)
    whole = list(vocab.kl(logits, reference, targets, vocab_start=0, vocab_size=50))
    logits[1] = -math.inf
    logits.requires_grad_()
    found = vocab.kl(logits, reference, targets, vocab_start=0, vocab_size=50)
    (gradient,) = torch.autograd.grad(sum(x.sum() for x in found[:3]), logits)  # type: ignore[arg-type]
    for x, wanted in zip(found[:3], whole, strict=False):
        assert x[1].isnan() and torch.equal(x[[0, 2, 3]], wanted[[0, 2, 3]])
    assert torch.log_softmax(logits[1], 0).isnan().all()
    assert gradient[[0, 2, 3]].isfinite().all() and gradient[1].isnan().any()
    for tp in (2, 4):
        split = _split(logits.detach(), reference, targets, tp, 50, 1.0)
        assert all(x[1].isnan() and x[[0, 2, 3]].isfinite().all() for x in split[:3])
