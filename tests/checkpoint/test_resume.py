"""Proves that a role put back from disk goes on bit for bit: weights, Adam, the average and the dropout masks.

Not proved here: a kill in the middle of a save on another process (resume of whole runs).
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_rlhf.algorithms import average
from megatron_rlhf.checkpoint import resume
from megatron_rlhf.config.rules import BadInput
from megatron_rlhf.recipes import losses
from megatron_rlhf.train.engine import Engine
from tests.helpers import roles as tiny
from tests.helpers.grid import on_grid

FACTS = {"layout": "tp2 pp2 dp1", "digest": "abc"}


def role(words: str) -> Engine:
    """A policy with dropout, an average and 100 times Adam's usual rate. Collective: world."""
    return tiny.engine(words, averaged=True, dropout=0.1, rate=0.01)


def train(policy: Engine, steps: range) -> list[tuple[float, float]]:
    """Loss and gradient norm of some steps of two accumulations each. Collective: world."""
    found = []
    for number in steps:
        policy.accumulate(tiny.rows(seed=number), losses.language)
        stats = policy.accumulate(tiny.rows(seed=100 + number), losses.language, weight=0.5)
        stats += policy.update()
        policy.follow(partial(average.follow, decay=0.9))
        found.append((stats["loss.language"], stats["grad_norm"]))
    return found


def averaged(policy: Engine) -> dict[str, torch.Tensor]:
    """The full averaged weights. Collective: world."""
    with policy.averaged():
        return tiny.weights(policy.network)


@on_grid(4)
@pytest.mark.parametrize("words", ["tp2 pp2", "dp4", pytest.param("tp2 dp2 sp", marks=pytest.mark.slow), "pp2 @2-3"])
def test_three_more_steps_are_bit_equal(words: str, tmp_path: Path) -> None:
    """A new engine with the state from disk takes the same three steps as the one that never stopped."""
    first = role(words)
    train(first, range(3))
    resume.save(tmp_path, 3, {}, {"policy": first}, **FACTS)
    expected = train(first, range(3, 6))
    again = role(words)
    found = resume.load(tmp_path, **FACTS)
    assert found is not None
    assert found.step == 3
    found.fill({"policy": again})
    assert train(again, range(3, 6)) == expected
    assert tiny.equal(tiny.weights(again.network), tiny.weights(first.network))
    assert tiny.equal(averaged(again), averaged(first))
    assert tiny.copies_agree(again.network)


@on_grid(4)
@pytest.mark.parametrize("fault", ["shared step", "no moments", "no masks"])
def test_a_state_that_is_not_whole_is_seen(fault: str, tmp_path: Path) -> None:
    """One step count for all parameters, lost moments or a lost count of updates leave the trajectory."""
    first = role("tp2 pp2")
    train(first, range(3))
    resume.save(tmp_path, 3, {}, {"policy": first}, **FACTS)
    expected = train(first, range(3, 6))
    again = role("tp2 pp2")
    found = resume.load(tmp_path, **FACTS)
    assert found is not None
    state: dict[str, Any] = found._roles["policy"]
    if fault == "no masks":
        state["updates"] = 0
    if fault == "no moments":
        state["optimizer"]["adam"] = [[{} for _ in group] for group in state["optimizer"]["adam"]]
    again.restore(state)
    assert again.optimizer is not None
    if fault == "shared step":
        (inner,) = (optimizer.optimizer for optimizer in again.optimizer.inner.chained_optimizers)
        one = torch.tensor(3.0)
        for entry in inner.state.values():
            entry["step"] = one
    assert train(again, range(3, 6)) != expected


@on_grid(4)
def test_every_parameter_has_its_own_step(tmp_path: Path) -> None:
    """After a restore no two parameters share a tensor, and each counts three steps."""
    first = role("tp2 pp2")
    train(first, range(3))
    resume.save(tmp_path, 3, {}, {"policy": first}, **FACTS)
    found = resume.load(tmp_path, **FACTS)
    assert found is not None
    again = role("tp2 pp2")
    found.fill({"policy": again})
    assert again.optimizer is not None
    for optimizer in again.optimizer.inner.chained_optimizers:
        steps = [entry["step"] for entry in optimizer.optimizer.state.values()]
        assert len(steps) > 5
        assert len({id(step) for step in steps}) == len(steps)
        assert {float(step) for step in steps} == {3.0}


@on_grid(4)
def test_only_the_same_run_goes_on(tmp_path: Path) -> None:
    """Nothing saved is None; another layout or configuration is refused; an older step is removed."""
    assert resume.load(tmp_path, **FACTS) is None
    dist.barrier()
    for step in (1, 2):
        resume.save(tmp_path, step, {"said": step}, {}, **FACTS)
    found = resume.load(tmp_path, **FACTS)
    assert found is not None and (found.step, found.common) == (2, {"said": 2})
    assert sorted(path.name for path in tmp_path.glob("step_*")) == ["step_2"]
    with pytest.raises(BadInput, match="saved with layouts tp2 pp2 dp1, this run has dp4"):
        resume.load(tmp_path, layout="dp4", digest="abc")
    with pytest.raises(BadInput, match="saved with settings abc, this run has xyz"):
        resume.load(tmp_path, layout="tp2 pp2 dp1", digest="xyz")
