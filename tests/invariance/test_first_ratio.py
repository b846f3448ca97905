"""Proves that PPO starts at ratio 1 and KL 0: old, new and reference log-probs are one computation.

Not proved here: the same over a whole run (the quickstart reports it).
"""

from __future__ import annotations

import pytest
import torch

from megatron_rlhf.recipes import losses
from megatron_rlhf.reshard import move
from tests.helpers import roles as tiny
from tests.helpers.grid import on_grid


@on_grid(4)
@pytest.mark.parametrize("words", ["tp2 pp2", "tp2 dp2 sp", "dp4", "pp4"])
def test_the_first_ratio_is_one(words: str) -> None:
    """Every minibatch, cut otherwise than the annotating pass, has |ratio - 1| at most 1e-5; dropout breaks it."""
    for dropout in (0.0, 0.2):
        role = tiny.engine(words, dropout=dropout)
        episodes = tiny.experience(role.forward)
        for number, minibatch in enumerate(episodes.minibatches(5, 1, seed=3)):
            stats = role.accumulate(minibatch, losses.policy(0.2))
            assert (stats["ratio_error"] <= 1e-5) == (dropout == 0), (number, dropout, stats["ratio_error"])


@on_grid(4)
@pytest.mark.parametrize("words", ["tp2 pp2", "tp2 dp2 sp"])
def test_the_first_kl_is_exactly_zero(words: str) -> None:
    """A reference in the policy's layout, filled from its weights, gives bit-equal log-probs; after a step no more."""
    policy, built = tiny.engine(words), tiny.network(words, seed=77)
    reference = tiny.learner(built)
    rows = tiny.rows()
    assert not torch.equal(reference.forward(rows), policy.forward(rows))
    move.copy(policy.network, built)
    assert torch.equal(reference.forward(rows), policy.forward(rows))
    policy.accumulate(rows, losses.language)
    policy.update()
    assert not torch.equal(reference.forward(rows), policy.forward(rows))
