"""Proves that a role put back from disk goes on bit for bit: weights, Adam, the average and the dropout masks; that
training goes on while a state is written, from a copy; that a save that fails leaves the last state, on every rank.

Not proved here: other layouts (test_relayout), files that are damaged (test_damage), whole runs that are killed.
"""

from __future__ import annotations

import copy
import errno
import threading
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rlhf.algorithms import average
from megatron_rlhf.checkpoint import resume, snapshot
from megatron_rlhf.checkpoint.differences import Terms
from megatron_rlhf.checkpoint.pieces import OnDisk, Range
from megatron_rlhf.checkpoint.resume import Keeper, SaveFailed
from megatron_rlhf.config.rules import BadInput
from megatron_rlhf.config.schema import Checkpoint
from megatron_rlhf.recipes import losses
from megatron_rlhf.train.engine import Engine
from tests.helpers import roles as tiny
from tests.helpers.grid import on_grid

TERMS = Terms({"ppo.clip": 0.2, "seed": 1}, {"policy": "tp2 pp2"}, 4)
FULL = OSError(errno.ENOSPC, "No space left on device")


def keeper(folder: Path, said: list[str] | None = None, terms: Terms = TERMS, **settings: Any) -> Keeper:
    """The states in `folder`; what it says is appended to `said`."""
    return Keeper(folder, Checkpoint(**settings), terms, ([] if said is None else said).append)


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
    keeper(tmp_path).save(3, {"beta": 0.5}, {"policy": first}, wait=True)
    expected = train(first, range(3, 6))
    again = role(words)
    found = keeper(tmp_path).load()
    assert found is not None
    assert (found.step, found.phase, found.common) == (3, "", {"beta": 0.5})
    found.fill({"policy": again})
    assert train(again, range(3, 6)) == expected
    assert tiny.equal(tiny.weights(again.network), tiny.weights(first.network))
    assert tiny.equal(averaged(again), averaged(first))
    assert tiny.copies_agree(again.network)


@on_grid(4)
def test_before_the_first_update_there_are_no_moments(tmp_path: Path) -> None:
    """A state of no update yet is put back as one: the next steps are those of a fresh role."""
    first, again = role("tp2 pp2"), role("tp2 pp2")
    keeper(tmp_path).save(0, {}, {"policy": first}, "rollout", wait=True)
    train(again, range(2))
    found = keeper(tmp_path).load()
    assert found is not None and (found.step, found.phase) == (0, "rollout")
    found.fill({"policy": again})
    assert train(again, range(2)) == train(first, range(2))


class Faulty:
    """A role in a state as `OnDisk` gives it, with one thing wrong."""

    def __init__(self, right: OnDisk, fault: str) -> None:
        self.right, self.fault = right, fault
        self.counts = {**right.counts, "updates": 0} if fault == "no masks" else right.counts

    def scaling(self) -> dict[str, Any]:
        return self.right.scaling()

    def read(self, wanted: Range) -> dict[str, Tensor]:
        if self.fault == "wrong range" and wanted.start == 0 and wanted.name.endswith("linear_fc1.weight"):
            size = wanted.stop - wanted.start
            wanted = replace(wanted, start=1, stop=size) if size > 1 else wanted
            found = self.right.read(wanted)
            return {k: torch.nn.functional.pad(v, (0, 1)) if v.numel() == size - 1 else v for k, v in found.items()}
        found = dict(self.right.read(wanted))
        if self.fault == "no moments":
            found = {key: found[key] for key in ("main", "average")}
        if self.fault == "moments swapped":
            found["exp_avg"], found["exp_avg_sq"] = found["exp_avg_sq"], found["exp_avg"]
        if self.fault == "step off by one":
            found["step"] = found["step"] - 1
        if self.fault == "no average":
            found["average"] = found["main"]
        return found


FAULTS = ["no masks", "no moments", "moments swapped", "step off by one", "shared step", "wrong range", "no average"]


@on_grid(4)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_state_that_is_not_whole_is_seen(fault: str, tmp_path: Path) -> None:
    """Each thing that a state may lack or hold wrongly leaves the trajectory, or the average of it."""
    first, again = role("tp2 pp2"), role("tp2 pp2")
    train(first, range(3))
    keeper(tmp_path).save(3, {}, {"policy": first}, wait=True)
    expected = train(first, range(3, 6))
    found = keeper(tmp_path).load()
    assert found is not None
    again.restore(Faulty(found._roles["policy"], fault))
    assert again.optimizer is not None
    if fault == "shared step":
        (inner,) = again.optimizer.adams()
        one = torch.tensor(3.0)
        for entry in inner.state.values():
            entry["step"] = one
    try:
        same = train(again, range(3, 6)) == expected
    except FloatingPointError:
        same = False
    if fault == "no average":
        assert same and not tiny.equal(averaged(again), averaged(first))
    else:
        assert not same


@on_grid(4)
def test_every_parameter_has_its_own_step(tmp_path: Path) -> None:
    """After a restore no two parameters share a tensor, and each counts three steps."""
    first, again = role("tp2 pp2"), role("tp2 pp2")
    train(first, range(3))
    keeper(tmp_path).save(3, {}, {"policy": first}, wait=True)
    found = keeper(tmp_path).load()
    assert found is not None
    found.fill({"policy": again})
    assert again.optimizer is not None
    for adam in again.optimizer.adams():
        steps = [entry["step"] for entry in adam.state.values()]
        assert len(steps) > 5
        assert len({id(step) for step in steps}) == len(steps)
        assert {float(step) for step in steps} == {3.0}


@on_grid(4)
def test_accumulated_gradients_are_not_lost_in_silence(tmp_path: Path) -> None:
    """A save between accumulate and update is an error: a state holds no gradients."""
    policy = role("tp2 pp2")
    policy.accumulate(tiny.rows(), losses.language)
    with pytest.raises(RuntimeError, match=r"call update\(\) before the state is saved"):
        keeper(tmp_path).save(0, {}, {"policy": policy})


@on_grid(4)
@pytest.mark.parametrize("copied", [True, False])
def test_training_goes_on_while_a_copy_is_written(copied: bool, tmp_path: Path) -> None:
    """Steps are taken while the files are held up; the state is of before them. Without the copy it would not be."""
    policy, again = role("tp2 pp2"), role("tp2 pp2")
    train(policy, range(2))
    shelf, go = keeper(tmp_path), threading.Event()
    write = snapshot.Snapshot.write

    def held_up(self: snapshot.Snapshot, folder: Path) -> Any:
        assert go.wait(60)
        return write(self, folder)

    common = {"places": [1, 2]}
    alive = nullcontext() if copied else mock.patch.object(snapshot, "_copied", dict)
    with mock.patch.object(snapshot.Snapshot, "write", held_up), alive:
        shelf.save(2, common, {"policy": policy})
        common["places"].append(3)
        shelf.settle()
        expected = train(policy, range(2, 5))
        assert not list(tmp_path.glob("step_2"))
        dist.barrier()
        go.set()
        shelf.settle(wait=True)
    found = keeper(tmp_path).load()
    assert found is not None and found.common == {"places": [1, 2]}
    found.fill({"policy": again})
    assert (train(again, range(2, 5)) == expected) == copied


@on_grid(4)
def test_one_snapshot_at_a_time(tmp_path: Path) -> None:
    """A second save waits for the first, and a state counts at the next boundary after every rank has written."""
    policy, shelf = role("tp2 pp2"), keeper(tmp_path, keep=5)
    for step in range(3):
        shelf.save(step, {}, {"policy": policy})
        assert sum(thread.name == "checkpoint" for thread in threading.enumerate()) <= 1
        assert len(list(tmp_path.glob("step_*[0-9]"))) == step
    while shelf._writing is not None:
        shelf.settle()
    assert len(list(tmp_path.glob("step_*[0-9]"))) == 3


@on_grid(4)
@pytest.mark.parametrize(("place", "rank"), [("torch.save", 2), ("os.rename", 0), ("pathlib.Path.mkdir", 0)])
def test_a_save_that_fails_leaves_the_last_one(place: str, rank: int, tmp_path: Path) -> None:
    """A full disk under any rank's file, the renaming or the folder: said on one rank and counted on all, the run goes
    on; at a signal it is an error on all. The old state stands and nothing half-written is left."""
    policy, said = role("tp2 pp2"), list[str]()
    shelf = keeper(tmp_path, said)
    shelf.save(1, {}, {"policy": policy}, wait=True)
    again = tmp_path / "step_2"

    def failing() -> Any:
        return mock.patch(place, side_effect=FULL) if dist.get_rank() == rank else nullcontext()

    with failing():
        shelf.save(2, {}, {"policy": policy})
        shelf.settle(wait=True)
    assert said == [
        f"{again} could not be written (rank {rank}: No space left on device): step_1 stands, "
        "the run goes on (failed saves: 1)"
    ] or (rank == 0 and "(No space left on device): step_1 stands" in said[0] and len(said) == 1)
    with failing(), pytest.raises(SaveFailed, match=r"step_2 could not be written \(.*No space left.*step_1 stands"):
        shelf.save(2, {}, {"policy": policy}, wait=True)
    dist.barrier()
    assert [path.name for path in tmp_path.iterdir()] == ["step_1"]
    found = keeper(tmp_path).load()
    assert found is not None and found.step == 1
    shelf.save(2, {}, {"policy": policy}, wait=True)
    dist.barrier()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_1", "step_2"]


@on_grid(4)
def test_only_the_same_run_goes_on(tmp_path: Path) -> None:
    """Other settings are refused with the difference, unless named; another layout and world are said."""
    assert keeper(tmp_path).load() is None
    dist.barrier()
    keeper(tmp_path).save(2, {}, {}, wait=True)
    said = list[str]()
    settings = {"ppo.clip": 0.1, "ppo.lam": 0.95}
    with pytest.raises(BadInput, match=r"clip was 0\.2, is 0\.1; ppo\.lam was not there, is 0\.95; seed was 1, is"):
        keeper(tmp_path, said, replace(TERMS, settings=settings)).load()
    allowing = replace(TERMS, settings={**TERMS.settings, "ppo.clip": 0.1}, allow=("ppo.clip",))
    assert keeper(tmp_path, said, allowing).load() is not None
    assert len(said) == 1 and "ppo.clip was 0.2, is 0.1, as checkpoint.allow says" in said.pop()
    fewer = replace(TERMS, layout={"policy": "dp3"}, world=3)
    assert keeper(tmp_path, said, fewer).load() is not None
    assert len(said) == 1 and "layout.policy was tp2 pp2, is dp3; ranks were 4, are 3: goes on equal to" in said.pop()
    other = replace(TERMS, versions={**TERMS.versions, "torch": "9"})
    assert keeper(tmp_path, said, other).load() is not None
    assert len(said) == 1 and f"torch was {torch.__version__}, is 9: goes on equal to rounding" in said.pop()
    dist.barrier()
    if dist.get_rank() == 0:
        (tmp_path / "newest.json").write_text("{}")
    dist.barrier()
    with pytest.raises(BadInput, match="a state of an earlier version"):
        keeper(tmp_path).load()


@on_grid(4)
def test_a_run_that_starts_anew_owns_no_older_state(tmp_path: Path) -> None:
    """After checkpoint.resume=never the first state takes the place of all there were, whatever their steps."""
    old = keeper(tmp_path)
    for step in (8, 9):
        old.save(step, {"run": "old"}, {}, wait=True)
    keeper(tmp_path).save(1, {"run": "new"}, {}, wait=True)
    dist.barrier()
    assert [path.name for path in tmp_path.iterdir()] == ["step_1"]
    found = copy.copy(keeper(tmp_path).load())
    assert found is not None and found.common == {"run": "new"}
    assert resume.COMMON == "common.pt"
