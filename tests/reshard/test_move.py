"""Proves that weights arrive bit-equal in every layout from every layout, after real optimizer steps, or not at all.

Not proved here: speed, memory, GPUs.
"""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel

from megatron_rlhf.generate.sampling import Draw
from megatron_rlhf.recipes import losses
from megatron_rlhf.reshard import move
from megatron_rlhf.reshard.switch import generating
from megatron_rlhf.train.engine import Engine
from tests.helpers import roles as tiny
from tests.helpers.grid import on_grid

SOURCES = ["tp2 pp2", "dp4", "tp2 dp2 sp", "pp2 dp2 order=tp-pp-dp", "pp2 @2-3"]
TARGETS = [*SOURCES, "pp4", "tp4", tiny.ONE]


def trained(words: str, *, tied: bool = True) -> Engine:
    """A policy two steps from its start. Collective: world."""
    role = tiny.engine(words, model=replace(tiny.MODEL, tied=tied), rate=0.01)
    for number in range(2):
        role.accumulate(tiny.rows(seed=number), losses.language)
        role.update()
    return role


@on_grid(4)
@pytest.mark.parametrize(
    ("words", "tied"),
    [(words, True) for words in SOURCES]
    + [("tp2 pp2", False), *(pytest.param(words, False, marks=pytest.mark.slow) for words in SOURCES[1:])],
)
def test_every_pair_is_bit_equal(words: str, tied: bool) -> None:
    """Every rank of the target holds its slice of the main weights, replicas and tied copies too."""
    source = trained(words, tied=tied)
    expected = tiny.main_weights(source)
    assert tiny.equal(tiny.weights(source.network), expected)
    for target_words in TARGETS:
        target = tiny.network(target_words, source.network.model, seed=77)
        assert not any(torch.equal(t, expected[n]) for n, t in tiny.weights(target).items())
        assert move.copy(source.network, target) == sum(t.numel() * 4 for t in expected.values())
        assert tiny.equal(tiny.weights(target), expected), target_words
        assert tiny.copies_agree(target), target_words
    assert tiny.equal(tiny.weights(source.network), expected)


@on_grid(4)
def test_a_skipped_parameter_sync_is_seen() -> None:
    """Without the gather after the step, what is copied are last step's weights of other replicas."""
    role = trained("dp4")
    role.accumulate(tiny.rows(seed=5), losses.language)
    with mock.patch.object(DistributedDataParallel, "start_param_sync", lambda *_, **__: None):
        role.update()
    target = tiny.network("tp2 pp2", seed=77)
    move.copy(role.network, target)
    assert not tiny.equal(tiny.weights(target), tiny.main_weights(role))


@on_grid(4)
@pytest.mark.parametrize("lost", ["decoder.layers.3.mlp.linear_fc1.bias", "embedding.word_embeddings.weight"])
def test_a_lost_tensor_is_seen(lost: str) -> None:
    """Missing in the source it is named; skipped on one rank of the target the comparison fails."""
    role, target = trained("tp2 pp2"), tiny.network("pp2 dp2", seed=77)
    without = {name: entry for name, entry in role.network.directory.items() if name != lost}
    with pytest.raises(RuntimeError, match=f"no weights for {lost}: "):
        move.copy(replace(role.network, directory=without), target)
    keeps = dict(target.parameters)
    if dist.get_rank() == 3:
        keeps.pop(lost)
    move.copy(role.network, replace(target, parameters=keeps))
    assert not tiny.copies_agree(target)


@on_grid(4)
def test_another_shape_or_dtype_is_refused() -> None:
    """The error names the tensor and both sides."""
    source = tiny.network("tp2 pp2")
    with pytest.raises(RuntimeError, match=r"bias is \(32,\) .* in the source and \(64,\)|is \(.*32\).* and \(.*64\)"):
        move.copy(source, tiny.network("tp2 pp2", replace(tiny.MODEL, hidden=64)))
    with pytest.raises(RuntimeError, match=r"word_embeddings.weight is \(128, 32\) .* and \(256, 32\)"):
        move.copy(source, tiny.network("tp2 pp2", rows=256))
    with pytest.raises(RuntimeError, match=r"torch.float32 in the source .* torch.bfloat16 here"):
        move.copy(source, tiny.network("tp2 pp2", replace(tiny.MODEL, precision="bf16")))


@on_grid(4)
def test_generating_brings_the_last_steps_weights() -> None:
    """Each time the context is entered the generate network holds the present weights, and training is undisturbed."""
    role, target = trained("tp2 pp2"), tiny.network("tp2 dp2", seed=77)
    for number in range(2):
        with generating(role, target, end=2, rows=8) as generator:
            assert tiny.equal(tiny.weights(target), tiny.main_weights(role))
            rollout = generator.sample(tiny.prompts(5), Draw(seed=number), 6)
        trained_BR = role.forward(rollout.rows)
        mask_BR = rollout.rows.response_mask_BR(rollout.rows.width)
        torch.testing.assert_close(rollout.drawn_logprobs_BR * mask_BR, trained_BR, rtol=0, atol=1e-5)
        role.accumulate(rollout.rows, losses.language)
        role.update()
    undisturbed = trained("tp2 pp2")
    for number in range(2):
        move.copy(undisturbed.network, target)
        with generating(undisturbed, target, end=2, rows=8) as generator:
            rows = generator.sample(tiny.prompts(5), Draw(seed=number), 6).rows
        undisturbed.accumulate(rows, losses.language)
        undisturbed.update()
    assert tiny.equal(tiny.weights(undisturbed.network), tiny.weights(role.network))


@on_grid(4)
def test_ranks_at_different_steps_do_not_generate() -> None:
    """A rank that missed an update is named before a token is drawn."""
    role, target = tiny.engine("tp2 pp2"), tiny.network("tp2 dp2")
    role.updates = 4 if dist.get_rank() == 2 else 3
    with pytest.raises(RuntimeError, match=r"3 on 0, 1, 3; 4 on 2"), generating(role, target, end=2, rows=8):
        pass
