"""Proves that a run stops where the first KL or the first ratio is not what it must be, and what PPO counts.

Not proved here: that a right run passes (tests/invariance/test_first_ratio.py, tests/test_quickstart.py).
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from megatron_rlhf.batch import Annotated, Experience, Rollout, Rows
from megatron_rlhf.observe.stats import Stats
from megatron_rlhf.recipes import measures

ROWS = Rows(torch.ones(2, 6, dtype=torch.int64), torch.tensor([2, 3]), torch.tensor([5, 5]))
MASK_BR = ROWS.response_mask_BR(3)
OLD_BR = torch.tensor([[-1.0, -2.0, -0.5], [-1.5, -0.25, 0.0]])


def annotated(reference_BR: torch.Tensor) -> Annotated:
    rollout = Rollout(ROWS, OLD_BR + 0.125 * MASK_BR, torch.tensor([1, 0]), torch.tensor([2.0, -1.0]))
    return Annotated(rollout, OLD_BR, reference_BR, torch.zeros(2, 3), MASK_BR)


def test_a_first_kl_that_is_not_zero_stops_the_run_under_one_layout() -> None:
    checks: dict[str, float] = {}
    measures.first_kl(checks, annotated(OLD_BR), same=True)
    assert checks == {"step0_kl": 0.0}
    off = annotated(OLD_BR + 1e-4 * MASK_BR)
    measures.first_kl(checks, off, same=True)  # only the very first rollout counts
    with pytest.raises(RuntimeError, match="nats from the reference before the first update"):
        measures.first_kl({}, off, same=True)
    elsewhere: dict[str, float] = {}
    measures.first_kl(elsewhere, off, same=False)
    assert elsewhere["step0_kl"] > 0


def test_an_exact_first_kl_must_be_zero_too() -> None:
    """It is the one recorded, and what sees two models that agree on the drawn tokens alone."""
    zero_BR = torch.zeros_like(OLD_BR)
    checks: dict[str, float] = {}
    measures.first_kl(checks, replace(annotated(OLD_BR), exact_kl_BR=zero_BR), same=True)
    assert checks == {"step0_kl": 0.0}
    for reference_BR, exact_BR in (
        (OLD_BR, zero_BR + 1e-6),
        (OLD_BR, zero_BR + math.nan),
        (OLD_BR + 1e-4 * MASK_BR, zero_BR),
    ):
        with pytest.raises(RuntimeError, match="nats from the reference before the first update"):
            measures.first_kl({}, replace(annotated(reference_BR), exact_kl_BR=exact_BR), same=True)
    elsewhere: dict[str, float] = {}
    measures.first_kl(elsewhere, replace(annotated(OLD_BR), exact_kl_BR=zero_BR + 0.5), same=False)
    assert elsewhere == {"step0_kl": 0.5 * 5 / 2}, "5 tokens in 2 responses"


def test_a_first_ratio_that_is_not_one_stops_the_run() -> None:
    good, bad = (Stats.of(ratio_error=(error * 5, 5)) for error in (9e-6, 2e-5))
    checks: dict[str, float] = {}
    measures.first_ratio(checks, good, "fp32")
    assert checks["first_ratio_error"] == pytest.approx(9e-6)
    measures.first_ratio(checks, bad, "fp32")  # only the very first minibatch counts
    with pytest.raises(RuntimeError, match="old and new log-probs are not computed alike"):
        measures.first_ratio({}, bad, "fp32")
    measures.first_ratio({}, bad, "bf16")
    measures.first_ratio({}, bad, "fp16")
    with pytest.raises(RuntimeError, match="= nan"):
        measures.first_ratio({}, Stats.of(ratio_error=(math.nan, 1)), "bf16")


def test_episodes_count_responses_and_tokens() -> None:
    reference_BR = OLD_BR - torch.tensor([[0.5, 0.0, 0.25], [0.25, 0.5, 9.0]])
    rewards_BR = torch.tensor([[0.0, 0.0, 2.0], [0.0, -1.0, 0.0]])
    made = Experience(annotated(reference_BR), rewards_BR, torch.ones(2, 3) * MASK_BR, torch.zeros(2, 3))
    stats = measures.episodes(made)
    assert stats["kl"] == pytest.approx((0.75 + 0.75) / 2), "padding counts for nothing"
    assert stats["score"] == 0.5 and stats["reward"] == 0.5
    assert stats["response_length"] == 2.5 and stats["end_share"] == 0.5
    assert stats["drift"] == pytest.approx(math.exp(0.125))
    assert [stats[f"drift.{name}"] for name in ("p50", "p90", "p99", "max")] == [0.125] * 4
    assert stats["advantage.square"] == 1.0
    assert measures.named(stats, "policy")["kl.policy"] == stats["kl"]
    assert "entropy" not in stats
    with_exact = replace(made.annotated, exact_kl_BR=2 + 0 * MASK_BR, entropy_BR=1 + MASK_BR)
    exact = measures.episodes(replace(made, annotated=with_exact))
    assert exact["kl"] == 2 * 5 / 2 and exact["entropy"] == 2.0 and exact["kl.k3"] == stats["kl.k3"]
    doubled = measures.episodes(replace(made, rewards_BR=2 * rewards_BR))
    assert (stats + doubled)["reward"] == 0.75
