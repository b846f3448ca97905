"""Proves that a rank which is slow in one phase is named with that phase, though the others wait for it there and all
take as long; that its delay is in everyone's seconds and in its own alone; and that now.json follows the phases.

Not proved here: GPUs, where the host does not stand in a collective.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from megatron_rlhf.batch import Rows
from megatron_rlhf.checkpoint import weights
from megatron_rlhf.config.load import load
from megatron_rlhf.config.schema import Learning
from megatron_rlhf.observe.log import Log
from megatron_rlhf.observe.now import Now
from megatron_rlhf.observe.timer import Timer
from megatron_rlhf.parallel import collectives, waiting
from megatron_rlhf.recipes import loop, losses, ppo
from megatron_rlhf.recipes.session import Session
from tests.helpers import data_room
from tests.helpers import roles as tiny
from tests.helpers.grid import on_grid

SLOW, DELAY = 2, 1.2
SMALL = ("ppo.episodes=8", "ppo.minibatches=2")


class Never:
    """No signal comes."""

    def requested(self) -> bool:
        return collectives.any_rank(False)


@on_grid(4)
def test_a_slow_rank_is_named_with_its_phase(tmp_path: Path) -> None:
    """Every rank shares its tensors or its stage with the slow one, so that all wait inside the phase."""
    waiting.install()
    first = dist.get_rank() == 0
    config = load(
        "ppo", [*data_room.SETTINGS, *SMALL, f"out={tmp_path / 'run'}", f"data.directory={tmp_path / 'data'}"]
    )
    now = Now(tmp_path / "run" if first else None, {"world": 4})
    run = Session(config, tmp_path / "run", Log(tmp_path / "run", first), Timer(waiting.seconds, now.phase), Never())
    object.__setattr__(run, "now", now)
    if first:
        data_room.write(tmp_path / "data")
    dist.barrier()
    for stage, scalar in ((ppo.START, False), ("reward", True)):
        weights.save(run.network(config.model, config.layout.policy, scalar=scalar), run.weights(stage))
    annotate, seen = ppo.annotate, []

    def slow(*arguments: Any) -> Any:
        if first:
            seen.append(json.loads((tmp_path / "run" / "now.json").read_text()))
        if dist.get_rank() == SLOW:
            time.sleep(DELAY)
        return annotate(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppo, "annotate", slow)
        ppo.train(run)
    if not first:
        return
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert len(rows) == 3
    for row in rows:
        assert (row["slowest.rank"], row["slowest.phase"]) == (SLOW, "annotate")
        assert row["slowest.ratio"] > 1.3
        assert row["seconds_by_phase"]["annotate"] >= DELAY
    assert [(at["step"], at["phase"], at["stage"]) for at in seen] == [(n, "annotate", "ppo") for n in range(3)]
    over = json.loads((tmp_path / "run" / "now.json").read_text())
    assert (over["step"], over["steps"], over["world"], over["phase"]) == (3, 3, 4, "") and over["ended"] > 0


@on_grid(4)
def test_supervised_stages_tell_data_from_learning(tmp_path: Path) -> None:
    """A rank whose data come late."""
    waiting.install()
    first = dist.get_rank() == 0
    run = Session(
        load("quickstart", [f"out={tmp_path}"]), tmp_path, Log(tmp_path, first), Timer(waiting.seconds), Never()
    )

    def late() -> Rows:
        if dist.get_rank() == SLOW:
            time.sleep(DELAY)
        return tiny.rows(8)

    learning, engine = Learning(rate=1e-3), tiny.engine("tp2 pp2")
    loop.learn(run, loop.Lesson("sft", engine, learning, 2, late, losses.language, {}))
    if first:
        for row in map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines()):
            assert (row["slowest.rank"], row["slowest.phase"]) == (SLOW, "data") and row["slowest.ratio"] > 1.3
            assert set(row["seconds_by_phase"]) == {"data", "learn"}
            assert row["seconds_by_phase"]["learn"] > 0.7 * DELAY, "rank 0 waits while it learns"


@on_grid(4)
def test_waiting_is_the_time_in_which_others_are_slow() -> None:
    """Three ranks wait in the collective, the slow one does not."""
    waiting.install()
    dist.barrier()
    timer, before = Timer(waiting.seconds), waiting.seconds()
    with timer("all"):
        if dist.get_rank() == SLOW:
            time.sleep(0.4)
        collectives.total(1.0)
    waited = waiting.seconds() - before
    assert (waited < 0.2) == (dist.get_rank() == SLOW)
    assert (timer.own["all"] >= 0.4) == (dist.get_rank() == SLOW)
    assert timer.seconds["all"] > 0.3
