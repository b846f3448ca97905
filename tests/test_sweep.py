"""Proves that `--multirun` checks every point before the first starts, runs them through Hydra on ranks of their own,
leaves plan and measurement in each point's folder, goes on where it was left and survives a point that fails.

Not proved here: SLURM (tests/slurm/test_sweep.py), and what the report makes of it (tests/eval/test_scaling.py).
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_rlhf import cli, sweep
from megatron_rlhf.config import multirun
from megatron_rlhf.config.rules import BadInput
from tests.helpers import data_room

TINY = [*data_room.SETTINGS, "checkpoint.untrained=true"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            ["seed=1,2", "ppo.minibatches=3"],
            "point 0 (experiment=quickstart seed=1 ppo.minibatches=3): ppo.episodes=64",
        ),
        (["hydra/launcher=joblib"], "Hydra's launcher 'joblib' is not installed (there are basic"),
        (["hydra/sweeper=optuna"], "'hydra/sweeper=optuna': a sweep's points are known before it starts"),
        (["out=a,b"], "out=a,b is the folder of the whole sweep; write for example out=runs/scaling"),
        (["ppo.klcoef=1,2"], "the nearest is 'ppo.kl.coef'"),
    ],
)
def test_bad_input_leaves_nothing(
    words: list[str], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["ppo", "--multirun", "experiment=quickstart", *words]) == 2
    shown = capsys.readouterr().err
    assert sentence in shown and shown.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_what_is_measured_are_medians_without_the_first_step(tmp_path: Path) -> None:
    rows = [{"step": 0, "phase": "sft", "tokens": 9, "tokens_per_second": 1.0}, {"step": 1, "phase": "reward"}]
    for step, (tokens, seconds) in enumerate([(100, 50.0), (100, 2.0), (120, 4.0), (110, 10.0)]):
        row = {"step": step, "phase": "ppo", "tokens": tokens, "tokens_per_second": tokens / seconds}
        rows.append({**row, "seconds_by_phase": {"generate": seconds / 2}, "memory_bytes": step, "slowest.ratio": 1.5})
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "plan.json").write_text(json.dumps({"settings": {"ppo.episodes": 8}}))
    found = sweep.measured(tmp_path, {"name": "00", "words": ["a=1"], "world": 2})
    assert (found["phase"], found["steps"], found["episodes"]) == ("ppo", 3, 8)
    assert found["seconds"] == pytest.approx(4.0) and found["tokens"] == 110
    assert (found["seconds_low"], found["seconds_high"]) == (pytest.approx(2.0), pytest.approx(10.0))
    assert found["seconds_by_phase"] == {"generate": pytest.approx(2.0)}
    assert (found["memory_bytes"], found["slowest_ratio"]) == (3, 1.5)


def test_a_rank_starts_no_sweep(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(BadInput, match="run it without srun or torchrun"):
        sweep.run("ppo", ["experiment=quickstart", f"out={tmp_path / 'a'}"])


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The groups that a sweep would start; none is."""
    asked: list[list[int]] = []
    monkeypatch.setattr(sweep, "_start", lambda folder, groups, launcher: asked.append(list(groups)))
    return asked


def test_points_of_one_size_are_one_group_and_what_is_measured_is_not_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, started: list[list[int]]
) -> None:
    monkeypatch.setattr(multirun, "launchers", lambda: ["basic", "slurm"])
    words = [f"scaling={','.join(f'laptop_strong/{name}' for name in ('4dp', '1', '2dp', '2tp'))}"]
    cluster = ["hydra/launcher=slurm", "hydra.launcher.partition=main", "cluster.node=2"]
    command = ["ppo", "--multirun", *TINY, *words, *cluster, f"out={tmp_path}"]
    assert cli.main(command) == 1
    facts = json.loads((tmp_path / "sweep.json").read_text())
    assert [group["points"] for group in facts["groups"]] == [[1], [2, 3], [0]]
    assert [group["hydra"][:2] for group in facts["groups"]] == [
        [f"hydra.launcher.nodes={nodes}", f"hydra.launcher.tasks_per_node={tasks}"]
        for nodes, tasks in ((1, 1), (1, 2), (2, 2))
    ]
    assert facts["groups"][0]["hydra"][2:] == cluster[:2]
    assert [point["name"] for point in facts["points"]][:3] == ["00_ranks4", "01_ranks1", "02_ranks2"]
    for point in facts["points"][:2]:
        (tmp_path / point["name"] / "measurement.json").write_text("{}")
    assert cli.main(command) == 1
    assert started == [[0, 1, 2], [1]], "the group of two points, of which none is measured"
    assert cli.main([*command, "seed=3"]) == 2, "what was measured with one seed is not of another"
    assert json.loads((tmp_path / "sweep.json").read_text()) == facts
    assert cli.main([*command, "cluster.node=3"]) == 2, "four ranks do not fill nodes of three"


@pytest.mark.parametrize(("word", "there"), [("cluster=h100", True), ("cluster.node=2", False)])
def test_a_plan_foresees_what_runs_on_machines_that_were_named(
    tmp_path: Path, started: list[list[int]], word: str, there: bool
) -> None:
    assert cli.main(["ppo", "--multirun", *TINY, "scaling=laptop_strong/2tp", word, f"out={tmp_path}"]) == 1
    plan = json.loads((tmp_path / "00_ranks2" / "plan.json").read_text())
    assert ("seconds" in plan) == ("rated_flops" in plan) == there
    if there:
        assert set(plan["seconds_by_phase"]) == {"generate", "score", "annotate", "value", "policy", "pretraining"}
        assert sum(plan["seconds_by_phase"].values()) == pytest.approx(plan["seconds"]) and plan["flops"] > 0
        assert plan["memory_bytes"]["generate"] > 0
    assert plan["layouts"]["policy"] == plan["settings"]["layout.policy"] == "tp2 pp1 dp1"
    assert plan["settings"]["ppo.episodes"] == 32 and "out" not in plan["settings"]


@pytest.mark.slow
def test_a_signal_stops_the_point_that_runs_and_those_after_it(tmp_path: Path) -> None:
    data_room.write(tmp_path / "data")
    out = tmp_path / "sweep"
    command = [sys.executable, "-m", "megatron_rlhf", "ppo", "--multirun", *TINY, "scaling=laptop_strong/1", "seed=1,2"]
    command += ["ppo.iterations=2000", f"data.directory={tmp_path / 'data'}", f"out={out}"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as running:
        deadline = time.monotonic() + 120
        while not (out / "00_ranks1" / "log.jsonl").exists() and time.monotonic() < deadline:
            time.sleep(0.2)
        running.terminate()
        said = running.communicate(timeout=60)[1]
    assert running.returncode == 75, said
    assert "stopped by a signal" in said and "0 of 2 points are measured" in said
    assert list((out / "00_ranks1" / "ppo" / "state").glob("step_*/manifest.json"))
    assert not (out / "01_ranks1" / "log.jsonl").exists()


@pytest.mark.slow
def test_five_points_through_hydra_a_failed_one_and_going_on(tmp_path: Path) -> None:
    """1 and 2 ranks; a point whose folder is taken by a file fails, the others do not; then it is tried again."""
    data_room.write(tmp_path / "data")
    out = tmp_path / "sweep"
    points = "scaling=laptop_strong/1,laptop_strong/2dp,laptop_strong/2tp,laptop_weak/2,laptop_weak/1"
    command = [sys.executable, "-m", "megatron_rlhf", "ppo", "--multirun", *TINY, points]
    command += [f"data.directory={tmp_path / 'data'}", f"out={out}"]
    out.mkdir()
    (out / "04_ranks1").mkdir()
    (out / "04_ranks1" / "log.jsonl").mkdir()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr[-3000:]
    assert "4 of 5 points are measured" in done.stderr and "without a measurement: 04_ranks1" in done.stderr
    assert done.stdout.count("[HYDRA] Launching") == 2, "a group for each number of ranks"
    kept = {path: path.stat().st_mtime_ns for path in out.glob("*/measurement.json")}
    assert len(kept) == 4
    (out / "04_ranks1" / "log.jsonl").rmdir()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert {path: path.stat().st_mtime_ns for path in kept} == kept, "what stands is not measured again"
    facts = json.loads((out / "sweep.json").read_text())
    assert [point["world"] for point in facts["points"]] == [1, 2, 2, 2, 1]
    for point in facts["points"]:
        found = json.loads((out / point["name"] / "measurement.json").read_text())
        plan = json.loads((out / point["name"] / "plan.json").read_text())
        assert found["world"] == plan["world"] == point["world"] and found["steps"] == 2
        assert found["episodes"] == plan["settings"]["ppo.episodes"] in (16, 32)
        assert {"generate", "score", "annotate", "value", "policy", "pretraining"} == set(found["seconds_by_phase"])
        assert 0.5 * found["seconds"] < sum(found["seconds_by_phase"].values()) < 1.05 * found["seconds"]
    assert cli.main(["report", "scaling", str(out)]) == 0
    report = json.loads((out / "scaling.json").read_text())
    assert {curve["kind"] for curve in report["curves"]} == {"strong", "weak"} and not report["missing"]
    assert {"scaling.md", "scaling.png", "phases.png"} <= {path.name for path in out.iterdir()}
