"""Proves how exact the local pass of a log-prob is, of the kernels and of their reference alike: errors of log-prob,
entropy, exact KL and of all gradients (before they are rounded to the logits' dtype) against float64 are at most twice
those of eager code on the logits in float32, at real widths, in every dtype, with ignored rows and absent words.

Not proved here: slices of one vocabulary put together (tests/parallel/test_vocab_accuracy.py).
"""

from __future__ import annotations

import pytest
import torch

from tests.helpers import softmax


@pytest.mark.parametrize("columns", softmax.SIZES)
@pytest.mark.parametrize("dtype", softmax.DTYPES)
@pytest.mark.parametrize(("temperature", "offset"), [(1.0, 0.0), (0.7, 0.0), (1.0, 40.0)])
def test_error_is_at_most_twice_that_of_eager(
    path: str, device: str, columns: int, dtype: torch.dtype, temperature: float, offset: float
) -> None:
    """An offset of all logits, which changes nothing but roundings, included."""
    case = softmax.draw(columns, dtype, temperature, offset)
    ours = softmax.local(case.to(device))
    softmax.assert_at_most_twice(ours, softmax.eager(case, torch.float32), softmax.eager(case, torch.float64))
    for name, numbers in ours.items():
        assert not numbers[softmax.IGNORED].any(), name
        if name.startswith("gradient"):
            assert not numbers[softmax.ABSENT, 1::2].any(), name


def test_float64_is_float64(path: str, device: str) -> None:
    """Log-probs, entropies, KLs and gradients to 1e-12."""
    case = softmax.draw(1003, torch.float64, 0.7)
    found = {name: numbers.cpu() for name, numbers in softmax.local(case.to(device)).items()}
    torch.testing.assert_close(found, softmax.eager(case, torch.float64), rtol=0, atol=1e-12)
