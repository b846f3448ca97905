"""Proves what a run does around its states: all ranks stop where the folder is taken, a signal ends it with 75 when its
state is on disk and with 1 when it is not, and which settings a state is of.

Not proved here: signals and kills of whole processes (test_quickstart).
"""

from __future__ import annotations

import errno
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import pytest
import torch.distributed as dist

from megatron_rlhf.checkpoint import lock
from megatron_rlhf.config.load import flat, load
from megatron_rlhf.config.rules import BadInput
from megatron_rlhf.observe.log import Log
from megatron_rlhf.observe.timer import Timer
from megatron_rlhf.recipes import session
from megatron_rlhf.recipes.session import Session, Stop
from tests.helpers.grid import on_grid


def surroundings(out: Path, *words: str) -> Session:
    """A run in `out` that takes no lock and no signal."""
    with mock.patch("signal.signal"):
        stop = Stop()
    return Session(load("quickstart", [f"out={out}", *words]), out, Log(out, dist.get_rank() == 0), Timer(), stop)


@on_grid(4)
def test_all_ranks_stop_where_another_run_holds_the_folder(tmp_path: Path) -> None:
    """Rank 0 looks, every rank raises its sentence."""
    with (
        mock.patch.object(lock, "take", side_effect=BadInput("in use by process 7 on elsewhere")),
        pytest.raises(BadInput, match="in use by process 7"),
    ):
        session._lock(tmp_path, Log(None, False))


@on_grid(4)
def test_a_signal_ends_a_run_with_75_where_its_state_is_on_disk_and_else_with_1(tmp_path: Path) -> None:
    """The state is there when the process ends; a full disk on one rank is not taken for a save."""
    run = surroundings(tmp_path)
    full = mock.patch("torch.save", side_effect=OSError(errno.ENOSPC, "No space left on device"))
    with full if dist.get_rank() == 3 else nullcontext(), pytest.raises(SystemExit) as failed:
        run.leave("sft", 1, {}, {})
    assert failed.value.code == 1
    dist.barrier()
    assert not list((tmp_path / "sft" / "state").iterdir())
    dist.barrier()
    with pytest.raises(SystemExit) as stopped:
        run.leave("sft", 1, {"said": "so"}, {}, "score")
    assert stopped.value.code == 75
    found = surroundings(tmp_path).saved("sft")
    assert found is not None and (found.step, found.phase, found.common) == (1, "score", {"said": "so"})
    assert surroundings(tmp_path, "checkpoint.resume=never").saved("sft") is None


@on_grid(4)
def test_a_state_is_of_the_settings_that_decide_what_a_run_computes(tmp_path: Path) -> None:
    """Folders, machines, layouts, saving and the switch may differ; another learning rate or other weights may not."""
    run = surroundings(tmp_path)
    run.pinned.update({"plan": "abc", "weights.reward": "123"})
    run.save("ppo", 1, {}, {}, metrics={"score": 0.5})
    run.settle()
    free = ["checkpoint.keep=3", "reshard.proof=never", "cluster.node=4", "layout.policy=dp4"]
    other = surroundings(tmp_path, *free)
    other.pinned["weights.reward"] = "123"
    assert other.saved("ppo") is not None
    for words, pinned, sentence in (
        (["ppo.policy.rate=0.5"], "123", r"ppo\.policy\.rate was .*, is 0\.5"),
        ([], "456", r"weights\.reward was 123, is 456"),
    ):
        other = surroundings(tmp_path, *words)
        other.pinned["weights.reward"] = pinned
        with pytest.raises(BadInput, match=sentence):
            other.saved("ppo")
    terms = run._terms()
    assert terms.plan == "abc" and terms.settings["weights.reward"] == "123"
    left_out = {key for key in flat(run.config) if key not in terms.settings}
    assert {key.partition(".")[0] for key in left_out} == {
        *("out", "layout", "checkpoint", "cluster", "reshard", "slurm", "watchdog")
    }
