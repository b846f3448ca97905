"""Proves that now.json says stage, step and phase at once, is not written at every quick step, and never stops a run.

Not proved here: that the recipes tell it (tests/recipes/test_stragglers.py, tests/test_quickstart.py).
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from megatron_rlhf.observe import now as now_module
from megatron_rlhf.observe.now import Now


def read(folder: Path) -> dict[str, object]:
    return json.loads((folder / "now.json").read_text())


def test_it_says_where_a_run_is(tmp_path: Path) -> None:
    now = Now(tmp_path, {"world": 4})
    now.phase("generate")
    assert not list(tmp_path.iterdir()), "before a stage there is nothing to say"
    now.stage("ppo", 24, 3)
    now.phase("generate")
    at = read(tmp_path)
    assert {name: at[name] for name in ("world", "stage", "step", "steps", "phase")} == {
        **{"world": 4, "stage": "ppo", "step": 3, "steps": 24},
        "phase": "generate",
    }
    now.step(24)
    now.end()
    at = read(tmp_path)
    assert (at["step"], at["phase"]) == (24, "") and at["ended"] >= at["started"]
    now.stage("evaluate", 1)
    assert "ended" not in read(tmp_path)


def test_quick_steps_are_not_all_written(tmp_path: Path) -> None:
    now = Now(tmp_path)
    now.stage("sft", 100)
    for step in range(1, 100):
        now.step(step)
    assert read(tmp_path)["step"] == 0
    now.step(100)
    assert read(tmp_path)["step"] == 100


def test_phases_of_quick_steps_are_not_all_written_and_of_slow_ones_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [100.0]
    monkeypatch.setattr(now_module.time, "monotonic", lambda: clock[0])
    now = Now(tmp_path)
    now.stage("ppo", 9)
    now.phase("generate")
    assert read(tmp_path)["phase"] == "generate", "nothing is known of the first step's length"
    clock[0] += 0.2
    now.step(1)
    now.phase("policy")
    assert read(tmp_path)["phase"] == "generate"
    clock[0] += 30.0
    now.phase("value")
    assert read(tmp_path)["phase"] == "value"
    now.step(2)
    for name in ("generate", "policy"):
        now.phase(name)
        assert (read(tmp_path)["phase"], read(tmp_path)["step"]) == (name, 2)


def test_a_folder_that_is_gone_stops_nobody(tmp_path: Path) -> None:
    now = Now(tmp_path / "a")
    now.stage("sft", 2)
    shutil.rmtree(tmp_path / "a")
    (tmp_path / "a").write_text("now a file")
    now.phase("policy")
    Now(None).stage("sft", 2)
    assert [item.name for item in tmp_path.iterdir()] == ["a"]
