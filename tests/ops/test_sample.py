"""Proves that a draw's local pass, kernels and reference alike, takes the word that noise and argmax take, that
its noise is that of parallel/random.py to the last bits, and that its sums are those of the log-prob.

Not proved here: that draws follow the distribution (tests/parallel/test_random.py), and slices put together
(tests/parallel/test_vocab.py).
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from megatron_rlhf.ops import logprob, noise, sample
from megatron_rlhf.parallel import random

ROWS = 16


def _keys(rows: int = ROWS, seed: int = 3) -> Tensor:
    return random.row_keys(seed, 7, torch.arange(rows), torch.arange(rows) * 5)


def _logits(columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(ROWS, columns, generator=torch.Generator().manual_seed(columns)) * 3).to(dtype)


@pytest.mark.sanitized
@pytest.mark.parametrize("columns", [1, 5, 16, 1003, 6288, 50304])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_word_is_that_of_the_perturbed_maximum(path: str, device: str, columns: int, dtype: torch.dtype) -> None:
    """At two temperatures; m, S and x are those the log-prob needs, to the bit where both are kernels."""
    logits, keys = _logits(columns + 3, dtype).to(device), _keys().to(device)
    logits[:, columns:] = torch.nan
    place = torch.arange(ROWS, device=device)
    for temperature in (1.0, 0.7):
        best, word, m, S, x = sample.best(logits, keys, vocab_start=40, columns=columns, temperature=temperature)
        scaled = logits[:, :columns].float() / temperature
        perturbed = scaled + random.gumbel(3, 7, place, place * 5, 40, columns)
        value, wanted = perturbed.max(1)
        drawn = word.long() - 40
        if device == "cpu":
            assert torch.equal(drawn, wanted)
        # a GPU's logarithms may differ in the last bits, and with them the first of two words that are as good
        torch.testing.assert_close(perturbed.gather(1, drawn[:, None])[:, 0], value, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(best, value, rtol=1e-6, atol=1e-6)
        stats = logprob.stats(logits.float(), drawn, vocab_start=0, columns=columns, temperature=temperature)
        assert torch.equal(m, stats[0]) and torch.equal(x, stats[3])
        torch.testing.assert_close(S, stats[1], rtol=0 if (path, device) == ("kernels", "cpu") else 2e-6, atol=0)


@pytest.mark.sanitized
def test_greedy_takes_the_first_of_equal_words(path: str, device: str) -> None:
    """Without keys the largest wins, and of equal ones the first, also beyond the first vector and tile."""
    logits = torch.zeros(3, 5000)
    logits[1, [4000, 4001, 4990]] = 1
    logits[2, [77, 21, 3333]] = 2
    found = sample.best(logits.to(device), None, vocab_start=0, columns=5000, temperature=1.0)
    assert found[1].tolist() == [0, 4000, 21] and found[0].tolist() == [0, 1, 2] and found[4].tolist() == [0, 1, 2]


def test_noise_is_the_same_to_the_last_bits(kernels: None, device: str) -> None:
    """One word at a time: values within 4 units in the last place of the reference's, tails of both sides included."""
    keys = torch.randint(0, 1 << 32, (2, 200_000), generator=torch.Generator().manual_seed(1)).to(device)
    logits = torch.zeros(keys.shape[1], 1, device=device)
    for word in (0, 50_303, 2**24 - 1):
        found = sample.best(logits, keys, vocab_start=word, columns=1, temperature=1.0)[0]
        wanted = noise.gumbel(keys, word, 1)[:, 0]
        # -log of nearly 1 has few digits: there the argument's last bit is what counts
        assert ((found - wanted).abs() <= 4 * 2.0**-24 * wanted.abs().clamp(min=1)).all()
        assert wanted.min() < -2 and wanted.max() > 10


@pytest.mark.sanitized
def test_a_slice_without_words_or_weight(path: str, device: str) -> None:
    logits, keys = torch.full((2, 40), torch.nan, device=device), _keys(2).to(device)
    found = sample.best(logits, keys, vocab_start=9, columns=-1, temperature=1.0)
    assert found[:, 0].tolist() == [-math.inf, 0, -math.inf, 0, 0]
    found = sample.best(logits.fill_(-torch.inf), keys, vocab_start=9, columns=33, temperature=1.0)
    assert found[:, 1].tolist() == [-math.inf, 9, -math.inf, 0, -math.inf]
    assert sample.best(logits[:0], keys[:, :0], vocab_start=9, columns=33, temperature=1.0).shape == (5, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_opcheck(kernels: None, device: str, dtype: torch.dtype) -> None:
    logits, source = _logits(33, dtype).to(device), torch.Generator().manual_seed(2)
    keys = torch.randint(-(2**31), 2**31, (2, ROWS), generator=source).to(torch.int32).to(device)
    torch.library.opcheck(torch.ops.megatron_rlhf.sample, (logits, keys, 4, 31, 0.7))
    torch.library.opcheck(torch.ops.megatron_rlhf.sample, (logits, None, 4, 31, 0.7))
    with pytest.raises(RuntimeError):
        torch.ops.megatron_rlhf.sample(logits, keys[:, 1:], 4, 31, 0.7)
