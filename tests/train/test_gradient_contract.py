"""Proves that several accumulations and one update take exactly the gradient of the sum of the losses, in every layout.

The oracle is plain autograd over whole batches on one rank, with neither Megatron's schedule nor its buffers.

Not proved here: more than two replicas, stages or shards; interleaved stages; 16-bit weights.
"""

from __future__ import annotations

from collections.abc import Callable
from unittest import mock

import pytest
import torch
from torch import Tensor

from megatron_rlhf.algorithms import language_loss
from megatron_rlhf.batch import Rows
from megatron_rlhf.models import roles
from megatron_rlhf.observe.stats import Stats
from megatron_rlhf.recipes import losses
from megatron_rlhf.train import schedule
from megatron_rlhf.train.engine import Engine
from megatron_rlhf.train.optimizer import Optimizer
from tests.helpers import roles as tiny
from tests.helpers.grid import on_grid

PAIRS = ["dp2 @0-1", "tp2 sp @0-1", "pp2 @0-1"]
FOURS = ["dp4", "tp2 dp2 sp", "tp2 pp2", "pp2 dp2"]
SPLIT = 7
GAMMA = 27.8
SMOOTH = {"rate": 0.1, "epsilon": 0.1}
"""An epsilon above the rounding noise of vanishing gradients, whose sign Adam would otherwise follow."""


def share_of(whole: Rows) -> Callable[[Tensor, Rows, Rows], tuple[Tensor, Stats]]:
    """The language loss over the tokens of `whole`, whatever part of it is accumulated."""

    def loss(logprobs_BR: Tensor, part: Rows, _: Rows) -> tuple[Tensor, Stats]:
        mask_BR = part.response_mask_BR(logprobs_BR.shape[1])
        return language_loss.token_mean(logprobs_BR, mask_BR, num_tokens=whole.response_lengths_B.sum())

    return loss


def in_two(role: Engine) -> dict[str, Tensor]:
    """The gradient that an update takes after two accumulations of a batch's parts. Collective: world."""
    whole = tiny.rows()
    order = torch.arange(len(whole))
    for part in (whole.select(order[:SPLIT]), whole.select(order[SPLIT:])):
        role.accumulate(part, share_of(whole))
    return tiny.step(role)[1]


def at_once() -> dict[str, Tensor]:
    """The oracle: one backward over the whole batch on one rank. Collective: world."""
    whole = tiny.rows()
    return tiny.plain_gradients(tiny.network(tiny.ONE), roles.logprobs(), [(whole, share_of(whole), 1.0)])


@on_grid(4)
@pytest.mark.parametrize("words", PAIRS + FOURS)
def test_two_accumulations_are_one_backward(words: str) -> None:
    """Gradients and the weights after the update equal those of the whole batch; tied copies stay equal."""
    role = tiny.engine(words, **SMOOTH)
    assert tiny.distance(in_two(role), at_once()) < 1e-6
    one = tiny.engine(words, **SMOOTH)
    one.accumulate(tiny.rows(), losses.language)
    one.update()
    after = tiny.weights(role.network)
    assert tiny.distance(after, tiny.weights(one.network)) < 1e-6
    assert tiny.distance(after, tiny.weights(tiny.network(tiny.ONE))) > 1e-3
    assert tiny.copies_agree(role.network)


@on_grid(4)
@pytest.mark.parametrize("words", PAIRS)
def test_a_second_finalise_is_seen(words: str) -> None:
    """Reduced in each accumulation, as Megatron's schedules end, the first part counts twice."""
    role = tiny.engine(words)
    run = schedule.run

    def finalising(*arguments: object, **settings: object) -> object:
        answer = run(*arguments, **settings)  # type: ignore[arg-type]
        assert role.optimizer is not None
        role.optimizer.finalise()
        return answer

    with mock.patch("megatron_rlhf.train.engine.schedule.run", finalising):
        found = in_two(role)
    assert tiny.distance(found, at_once()) > 1e-2


@on_grid(4)
@pytest.mark.parametrize("words", PAIRS)
def test_a_missing_finalise_is_seen(words: str) -> None:
    """Without the reduction replicas, shards and tied copies keep their own sums."""
    with mock.patch.object(Optimizer, "finalise", lambda _: None):
        found = in_two(tiny.engine(words))
    assert tiny.distance(found, at_once()) > 1e-2


@on_grid(4)
@pytest.mark.parametrize(("words", "share"), [("dp2 @0-1", 2), ("dp4", 4)])
def test_an_average_over_replicas_is_seen(words: str, share: int) -> None:
    """Megatron's own 1/dp, which `calculate_per_token_loss` switches off, makes every gradient that much smaller."""
    built = tiny.network(words)
    if built.grid.inside:
        built.config.calculate_per_token_loss = False
    found = in_two(tiny.learner(built, micro_batch=12))
    right = at_once()
    assert tiny.distance(found, right) > 0.1
    assert tiny.distance({name: share * tensor for name, tensor in found.items()}, right) < 1e-6


@on_grid(4)
@pytest.mark.parametrize("words", ["tp2 pp2", "tp2 dp2 sp", "pp2 dp2"])
def test_the_pretraining_mix_is_the_gradient_of_the_sum(words: str) -> None:
    """One update after a PPO and a weighted language accumulation takes the gradient of PPO + gamma LM."""
    oracle, role = tiny.network(tiny.ONE), tiny.engine(words)
    episodes, text = tiny.experience(role.forward), tiny.rows(8, seed=21)
    mixed = [(episodes, losses.policy(0.2), 1.0), (text, losses.language, GAMMA)]
    right = tiny.plain_gradients(oracle, roles.logprobs(), mixed)
    for batch, loss, weight in mixed:
        role.accumulate(batch, loss, weight=weight)
    assert tiny.distance(tiny.step(role)[1], right) < 1e-6
    role = tiny.engine(words)
    for batch, loss, _ in mixed:
        role.accumulate(batch, loss)
    assert tiny.distance(tiny.step(role)[1], right) > 0.1


@on_grid(4)
@pytest.mark.parametrize("words", ["tp2 pp2", "dp2 @0-1"])
def test_coefficient_zero_is_plain_ppo(words: str) -> None:
    """An empty pretraining batch runs no forward and moves no bit of the gradient, dropout on."""
    found = []
    for mixed in (False, True):
        role = tiny.engine(words, dropout=0.1)
        text = tiny.rows(8, seed=21)
        with mock.patch("megatron_rlhf.train.engine.schedule.run", wraps=schedule.run) as runs:
            if mixed:
                assert role.accumulate(text.select(torch.zeros(0, dtype=torch.int64)), losses.language).means() == {}
            role.accumulate(tiny.experience(), losses.policy(0.2))
        assert runs.call_count == role.network.grid.inside
        found.append(tiny.step(role)[1])
    assert tiny.equal(*found)
