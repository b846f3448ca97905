"""Proves that the scalar head's gradients are the same in every layout, and that no vocabulary head becomes one.

Gradients and not losses are compared: Adam and clipping hide a gradient that is everywhere doubled.

Not proved here: 16-bit weights.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from megatron_rlhf.checkpoint import weights
from megatron_rlhf.config.rules import BadInput
from megatron_rlhf.models import heads, roles
from megatron_rlhf.recipes import losses
from megatron_rlhf.reshard import move
from tests.helpers import roles as tiny
from tests.helpers.grid import on_grid

HEAD = ("head.weight", "head.bias")
ROUNDING = 5e-6
"""The head's bias is one number, a sum of many that nearly cancel."""
CASES = {
    "reward": (roles.scores(), tiny.rankings, losses.ranking("surviving")),
    "value": (roles.values(), tiny.experience, losses.value(0.2)),
}


def both(words: str, kind: str, *, marked: bool = True) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The gradient under `words`, and the oracle's by plain autograd on one rank. Collective: world."""
    read, make, loss = CASES[kind]
    batch: Any = make()
    right = tiny.plain_gradients(tiny.network(tiny.ONE, scalar=True), read, [(batch, loss, 1.0)])
    built = tiny.network(words, scalar=True)
    for name in HEAD:
        if not marked and name in built.parameters:
            built.parameters[name].sequence_parallel = False  # type: ignore[attr-defined]
    role = tiny.learner(built, read)
    role.accumulate(batch, loss)
    return tiny.step(role)[1], right


@on_grid(4)
@pytest.mark.parametrize("kind", CASES)
@pytest.mark.parametrize("words", ["tp2 dp2 sp", "tp2 pp2", "tp2 pp2 sp", pytest.param("pp4", marks=pytest.mark.slow)])
def test_gradients_are_those_of_one_rank(words: str, kind: str) -> None:
    """Every gradient of a reward and of a value model, the head's too."""
    found, right = both(words, kind)
    assert set(HEAD) <= found.keys()
    assert tiny.distance(found, right) < ROUNDING


@on_grid(4)
def test_a_missing_mark_is_seen() -> None:
    """A head that is not marked keeps the gradient of its half of the sequence."""
    found, right = both("tp2 dp2 sp", "value", marked=False)
    assert tiny.distance({name: found[name] for name in HEAD}, {name: right[name] for name in HEAD}) > 1e-2


@on_grid(4)
def test_a_summed_output_gradient_is_seen() -> None:
    """Megatron's other way to gather, which sums the equal gradients of the copies, doubles every gradient."""
    gather = heads.gather_from_sequence_parallel_region

    def summing(values: torch.Tensor, tensor_parallel_output_grad: bool, group: Any) -> torch.Tensor:
        return gather(values, tensor_parallel_output_grad=True, group=group)

    with mock.patch.object(heads, "gather_from_sequence_parallel_region", summing):
        found, right = both("tp2 dp2 sp", "value")
    assert tiny.distance(found, right) > 0.5
    assert tiny.distance({name: tensor / 2 for name, tensor in found.items()}, right) < ROUNDING


@on_grid(4)
@pytest.mark.parametrize("tied", [True, False])
def test_a_policy_never_becomes_a_scalar_model_silently(tied: bool, tmp_path: Path) -> None:
    """Loading and copying name the head that has no weights; only where it is said to be new it keeps its own."""
    model = replace(tiny.MODEL, tied=tied)
    policy = tiny.network("tp2 pp2", model, seed=1)
    scalar = tiny.network("pp2 dp2", model, seed=2, scalar=True)
    before = tiny.weights(scalar)
    weights.save(policy, tmp_path / "policy")
    with pytest.raises(BadInput, match=r"has no tensor .*head\.weight"):
        weights.load(scalar, tmp_path / "policy")
    with pytest.raises(RuntimeError, match=r"no weights for .*head\.weight"):
        move.copy(policy, scalar)
    assert tiny.equal(tiny.weights(scalar), before)
    for fill in (
        lambda: weights.load(scalar, tmp_path / "policy", fresh=HEAD),
        lambda: move.copy(policy, scalar, fresh=HEAD),
    ):
        fill()
        after, source = tiny.weights(scalar), tiny.weights(policy)
        assert all(torch.equal(after[name], before[name]) for name in HEAD)
        assert all(torch.equal(after[name], source[name]) for name in after if name not in HEAD)
        assert tiny.copies_agree(scalar)


@on_grid(4)
def test_an_untied_policy_refuses_a_scalar_models_weights() -> None:
    """The other way round: the vocabulary head has no source."""
    model = replace(tiny.MODEL, tied=False)
    scalar, policy = tiny.network("tp2 pp2", model, scalar=True), tiny.network("tp2 pp2", model)
    with pytest.raises(RuntimeError, match=r"output_layer\.weight"):
        move.copy(scalar, policy)


@on_grid(4)
def test_megatrons_sharded_state_cannot_mistake_the_head() -> None:
    """In Megatron's own checkpoints the head has its own name and must match in shape."""
    built = tiny.network("tp2 pp2", scalar=True)
    assert built.grid.groups is not None
    state = built.chunks[0].sharded_state_dict(metadata={"dp_cp_group": built.grid.groups.dp_cp})
    named = {entry.key: entry for entry in state.values() if hasattr(entry, "allow_shape_mismatch")}
    assert ("head.weight" in named) == built.grid.last_stage
    assert not any("output_layer" in key for key in named)
    if built.grid.last_stage:
        assert not named["head.weight"].allow_shape_mismatch
        assert tuple(named["head.weight"].global_shape) == (1, tiny.MODEL.hidden)
