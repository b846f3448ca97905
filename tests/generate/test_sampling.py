"""Proves that draws follow the temperature-scaled softmax where the vocabulary is split.

Not proved here: the quality of the noise itself (parallel).
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megatron_rlhf.generate.sampling import Draw, draw
from tests.helpers import roles as tiny
from tests.helpers.grid import on_grid

VOCABULARY = 11
ROWS = 20_000


@on_grid(4)
@pytest.mark.parametrize(
    "draw_as", [Draw(), Draw(temperature=0.5), Draw(top_k=4), Draw(top_p=0.7)], ids=["T1", "T0.5", "top-k", "top-p"]
)
def test_frequencies_are_the_softmax(draw_as: Draw) -> None:
    """20,000 rows of the same logits: the share of each word is its probability within five standard errors."""
    model = replace(tiny.MODEL, vocabulary=VOCABULARY)
    built = tiny.network("tp4", model, rows=16)
    logits_V = torch.randn(16, generator=torch.Generator().manual_seed(1))
    local_bV = logits_V[built.vocab_start : built.vocab_start + 4].expand(ROWS, -1).contiguous()
    tokens_b, logprobs_b = draw(built, local_bV, draw_as, torch.arange(ROWS), torch.zeros(ROWS, dtype=torch.int64))
    full_V = (logits_V[:VOCABULARY] / draw_as.temperature).softmax(0)
    torch.testing.assert_close(logprobs_b, full_V.log()[tokens_b], rtol=0, atol=1e-5)
    ordered, index = full_V.sort(descending=True)
    kept = torch.arange(VOCABULARY) < (draw_as.top_k or VOCABULARY)
    kept &= ordered.cumsum(0) - ordered < draw_as.top_p
    expected_V = torch.zeros(VOCABULARY)
    expected_V[index] = ordered * kept / (ordered * kept).sum()
    found_V = torch.bincount(tokens_b, minlength=VOCABULARY) / ROWS
    error_V = 5 * (expected_V * (1 - expected_V) / ROWS).sqrt()
    assert bool(((found_V - expected_V).abs() <= error_V).all()), (found_V, expected_V)
