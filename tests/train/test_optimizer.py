"""Proves the optimizer step against torch's own AdamW, and what surrounds it: the stop at a gradient that is not a
number, the weight average in shards, and recomputation that changes no bit.

Not proved here: 16-bit weights with fp32 main weights; the learning-rate schedule (algorithms).
"""

from __future__ import annotations

from functools import partial

import pytest
import torch

from megatron_rlhf.algorithms import average
from megatron_rlhf.config.schema import Adam
from megatron_rlhf.models import roles
from megatron_rlhf.parallel.collectives import any_rank
from megatron_rlhf.recipes import losses
from tests.helpers import roles as tiny
from tests.helpers.grid import on_grid


@on_grid(4)
@pytest.mark.parametrize("words", [tiny.ONE, "tp2 pp2", "dp4"])
def test_three_steps_are_torchs_adamw(words: str) -> None:
    """Clipping, both moments, epsilon and decay, which spares biases and norms, equal torch.optim.AdamW."""
    adam = Adam(beta1=0.9, beta2=0.95, weight_decay=0.1, clip=0.5)
    role = tiny.engine(words, adam=adam, rate=0.01, epsilon=1e-3)
    plain = tiny.network(tiny.ONE)
    torches = None
    if plain.grid.inside:
        split = [[p for p in plain.parameters.values() if (p.dim() > 1) == matrix] for matrix in (True, False)]
        groups = [{"params": split[0], "weight_decay": 0.1}, {"params": split[1], "weight_decay": 0.0}]
        torches = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.95), eps=1e-3)
    for number in range(3):
        batch = tiny.rows(seed=number)
        tiny.plain_gradients(plain, roles.logprobs(), [(batch, losses.language, 1.0)])
        if torches is not None:
            norm = torch.nn.utils.clip_grad_norm_(list(plain.parameters.values()), 0.5)
            assert norm > 0.5, "the clip must be at work"
            torches.step()
            torches.zero_grad()
        role.accumulate(batch, losses.language)
        role.update()
    assert tiny.distance(tiny.weights(role.network), tiny.weights(plain)) < 5e-6


@on_grid(4)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_no_number_stops_the_step(bad: float) -> None:
    """update() raises on every rank of the role and neither weights nor Adam's moments have moved."""
    role = tiny.engine("tp2 pp2")
    assert role.optimizer is not None
    role.accumulate(tiny.rows(), losses.language)
    role.update()
    before, kept = tiny.weights(role.network), tiny.Kept(role)
    role.accumulate(tiny.rows(), losses.language, weight=bad)
    with pytest.raises(FloatingPointError, match="gradient norm is (nan|inf)"):
        role.update()
    assert tiny.equal(tiny.weights(role.network), before)
    after = tiny.Kept(role)
    assert after.values.keys() == kept.values.keys()
    assert all(tiny.equal(after.values[where], kept.values[where]) for where in kept.values)


@on_grid(4)
@pytest.mark.parametrize("words", ["dp4", "tp2 dp2 sp", "pp2 @0-1"])
def test_the_average_is_the_closed_form_of_full_weights(words: str) -> None:
    """d^n w_0 + (1 - d) sum d^(n-k) w_k; `averaged()` puts it into the network and takes it out bit-exactly."""
    decay = 0.8
    role = tiny.engine(words, averaged=True, rate=0.02)
    expected = {name: tensor.clone() for name, tensor in tiny.weights(role.network).items()}
    for number in range(3):
        role.accumulate(tiny.rows(seed=number), losses.language)
        role.update()
        role.follow(partial(average.follow, decay=decay))
        for name, live in tiny.weights(role.network).items():
            expected[name] = decay * expected[name] + (1 - decay) * live
    live = tiny.weights(role.network)
    logprobs = role.forward(tiny.rows())
    assert tiny.distance(live, expected) > 1e-2
    with role.averaged():
        inside = tiny.weights(role.network)
        assert tiny.distance(inside, expected) < 1e-6
        assert tiny.copies_agree(role.network)
        assert not torch.equal(role.forward(tiny.rows()), logprobs)
    assert tiny.equal(tiny.weights(role.network), live)
    assert tiny.copies_agree(role.network)
    with role.averaged():
        assert tiny.equal(tiny.weights(role.network), inside)


@on_grid(4)
def test_the_average_leaves_training_alone() -> None:
    """Looking at the average between two steps changes no bit of the second."""
    after = []
    for looks in (False, True):
        role = tiny.engine("pp2 dp2", averaged=True)
        for number in range(2):
            role.accumulate(tiny.rows(seed=number), losses.language)
            role.update()
            role.follow(partial(average.follow, decay=0.5))
            if looks:
                with role.averaged():
                    role.forward(tiny.rows())
        after.append(tiny.weights(role.network))
    assert tiny.equal(*after)


@on_grid(4)
@pytest.mark.parametrize("words", ["tp2 pp2", "tp2 dp2 sp"])
def test_recomputation_changes_no_bit(words: str) -> None:
    """full and selective recomputation give the gradients of none, dropout on: the masks are drawn again the same."""
    found = {}
    for recompute in ("none", "full", "selective"):
        role = tiny.engine(words, recompute=recompute, dropout=0.1)
        role.accumulate(tiny.rows(), losses.language)
        found[recompute] = tiny.step(role)[1]
    assert tiny.equal(found["full"], found["none"])
    assert tiny.equal(found["selective"], found["none"])


@on_grid(4)
def test_dropout_differs_between_passes_and_replicas() -> None:
    """Two accumulations of one batch draw different masks; so do two replicas that hold the same row."""
    role = tiny.engine("dp2 @0-1", dropout=0.3, micro_batch=1)
    row = tiny.rows(1)
    twice = row.select(torch.tensor([0, 0]))
    seen = []
    for batch in (twice, twice):
        stats = role.accumulate(batch, losses.language)
        seen.append(stats["loss.language"])
    assert seen[0] != seen[1]
    alone = tiny.engine(tiny.ONE, dropout=0.3, micro_batch=1)
    single = alone.accumulate(row, losses.language)["loss.language"]
    assert not any_rank(abs(single - seen[0]) < 1e-6), "both replicas drew the mask of replica 0"
