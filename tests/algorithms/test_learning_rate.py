"""The learning-rate multiplier: golden warm-up, cosine ends, and constants.

Not proved here: what a step is; the policy's warm-up counts iterations, the recipe says so.
"""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rlhf.algorithms.schedule import multiplier


def test_warm_up_golden() -> None:
    """From a tenth at step 0, by 0.09 a step, to 1 at step 10 and after."""
    shares = [multiplier(step, 500, schedule="constant", final=0.1, warmup=10, warmup_start=0.1) for step in range(500)]
    assert shares[:11] == pytest.approx([0.1, 0.19, 0.28, 0.37, 0.46, 0.55, 0.64, 0.73, 0.82, 0.91, 1.0])
    assert set(shares[10:]) == {1.0}


def test_cosine_without_warm_up_golden() -> None:
    """1 at the start, 0.55 half way, 0.1 at the end and after."""
    shares = [
        multiplier(step, 100, schedule="cosine", final=0.1, warmup=0, warmup_start=0.1) for step in (0, 50, 100, 130)
    ]
    assert shares == pytest.approx([1.0, 0.55, 0.1, 0.1])
    quarter = multiplier(25, 100, schedule="cosine", final=0.1, warmup=0, warmup_start=0.1)
    assert quarter == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(total=st.integers(1, 200), warmup=st.integers(0, 250), final=st.floats(0, 1), start=st.floats(0, 1))
def test_rises_to_1_then_falls_to_final(total: int, warmup: int, final: float, start: float) -> None:
    shares = [
        multiplier(step, total, schedule="cosine", final=final, warmup=warmup, warmup_start=start)
        for step in range(max(total, warmup) + 2)
    ]
    rising, falling = shares[: warmup + 1], shares[warmup:]
    assert all(a <= b + 1e-12 for a, b in zip(rising, rising[1:], strict=False))
    assert all(a >= b - 1e-12 for a, b in zip(falling, falling[1:], strict=False))
    assert shares[warmup] == pytest.approx(1.0)
    assert shares[0] == pytest.approx(start if warmup else 1.0)
    assert shares[-1] == pytest.approx(final)


def test_another_schedule_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="cosine or constant, not 'linear'"):
        multiplier(0, 10, schedule="linear", final=0.1, warmup=5, warmup_start=0.1)
