"""Proves that the benchmark of a PPO iteration runs on our side and writes what it promises, at toy size: rows with the
agreed keys, a ratio above 1 where ours is better, the rival "not run" and without numbers where it is not installed;
that annotate's memory stands beside its formula, and one checkout's iteration beside another's.

Not proved here: the numbers, which a quiet machine measures; the rival's side, which runs where its extra is installed.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import annotate, logprob, ppo_iteration
from benchmarks.annotating.task import NOW
from benchmarks.harness import result
from benchmarks.harness.result import Row
from benchmarks.harness.turns import Contestant
from benchmarks.kernels import duel
from benchmarks.ppo import before_after
from benchmarks.ppo.task import TOY, Task
from megatron_rlhf.ops import library

KEYS = ["case", "metric", "unit", "ours", "rival", "theirs", "ratio", "floor"]


def turn(seconds: float, **phases: float) -> dict[str, Any]:
    return {"seconds": seconds, "phases": phases, "peak": 2 * 2**20, "growth": 2**20}


def row(unit: str, ours: float | None, theirs: float | None) -> Row:
    return Row(case="a", metric="b", unit=unit, ours=ours, rival="c", theirs=theirs)


def test_a_ratio_above_one_means_ours_is_better() -> None:
    assert row("s", 2.0, 3.0).ratio == 1.5
    assert row("MiB", 4.0, 2.0).ratio == 0.5
    assert row("tokens/s", 3.0, 2.0).ratio == 1.5
    assert row("s", 2.0, None).ratio is None
    assert row("s", None, 2.0).ratio is None
    with pytest.raises(ValueError, match="parsecs"):
        _ = row("parsecs", 1.0, 1.0).ratio


def test_the_task_is_the_one_that_was_promised() -> None:
    task = Task()
    lengths = task.prompt_lengths
    assert (len(lengths), min(lengths), max(lengths)) == (64, 24, 48)
    assert task.tokens == sum(lengths) + 64 * 40
    assert Task.parse(task.word()) == task


def test_numbers_are_medians_of_the_turns() -> None:
    """Updates are value, policy and pretraining together; what no phase counted is the rest."""
    ours = [turn(s, generate=1.0, score=0.1, annotate=0.2, value=0.3, policy=s - 2.0) for s in (4.0, 9.0, 5.0)]
    theirs = [turn(s, generate=2.0, score=0.1, annotate=0.2, update=4.0) for s in (10.0, 10.0, 40.0)]
    found = {r.metric: r for r in ppo_iteration.rows("x", Task(), ours, theirs, "TRL")}
    assert (found["iteration"].ours, found["iteration"].theirs, found["iteration"].ratio) == (5.0, 10.0, 2.0)
    assert (found["generate"].ratio, found["value"].theirs) == (2.0, None)
    assert found["update"].ours == pytest.approx(3.3)
    assert found["rest"].ours == pytest.approx(0.4)
    assert found["throughput"].ours == pytest.approx(Task().tokens / 5.0)
    assert (found["peak memory"].ours, found["peak memory growth"].ours) == (2.0, 1.0)


@pytest.mark.parametrize(("installed", "why"), [("", "not installed"), ("1.13.0", "1.13.0 has no PPO trainer")])
def test_a_rival_that_is_not_there_is_named(installed: str, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A later trl is not the rival: its PPO trainer is gone."""
    monkeypatch.setattr(result, "version", lambda package: installed)
    assert not ppo_iteration.rival_there()
    assert "not run" in ppo_iteration.rival_name()
    assert why in ppo_iteration.rival_name()


@pytest.mark.slow
def test_a_rival_that_is_not_there_is_not_invented(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Our side runs at toy size in a process of its own; the file has its numbers and none of the rival's."""
    monkeypatch.setattr(ppo_iteration, "RIVAL", "0.0.0")
    found, gpu = ppo_iteration.run(TOY, ppo_iteration.CASES[:1], device="cpu", iterations=1)
    result.show(found)
    result.write(tmp_path / "a" / "out.json", found, gpu)
    written = json.loads((tmp_path / "a" / "out.json").read_text())
    assert list(written) == ["machine", "versions", "commit", "rows"]
    assert all(list(record) == KEYS for record in written["rows"])
    assert written["machine"]["cores"] >= 1
    records = {record["metric"]: record for record in written["rows"]}
    assert set(records) > {"iteration", "generate", "score", "annotate", "update", "throughput", "peak memory"}
    for record in records.values():
        assert record["case"] == "tp1"
        assert record["ours"] >= 0
        assert "not run" in record["rival"]
        assert record["theirs"] is record["ratio"] is None
    assert records["iteration"]["ours"] > records["generate"]["ours"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("case", ppo_iteration.CASES[1:], ids=lambda case: case.name)
def test_every_case_runs(case: ppo_iteration.Case) -> None:
    """Two and four processes, and the pretraining mix, which alone has the phase of that name."""
    ours, theirs, _ = ppo_iteration.measure(case, TOY, None, "cpu", 1)
    assert (len(ours), theirs) == (1, [])
    assert ours[0]["tokens"] == TOY.tokens
    assert (ours[0]["phases"]["pretraining"] > 1e-3) == ("mix" in case.name)


def test_phases_of_two_checkouts_are_compared() -> None:
    """Where both sides tell value, policy and pretraining apart, each has its ratio, and updates are their sum."""
    parts = {"generate": 1.0, "score": 0.1, "annotate": 0.2, "value": 0.5}
    ours, theirs = [turn(3.0, **parts, policy=0.5)], [turn(4.0, **parts, policy=1.5)]
    found = {r.metric: r for r in ppo_iteration.rows("x", Task(), ours, theirs, "before")}
    assert (found["iteration"].theirs, found["policy"].ratio) == (4.0, 3.0)
    assert found["update"].ratio == 2.0
    assert found["rest"].theirs == pytest.approx(0.7)


@pytest.mark.slow
@pytest.mark.dist
def test_a_checkout_runs_beside_another(tmp_path: Path) -> None:
    """This one beside itself, each with its own four ranks; a folder without the code says so."""
    found = before_after.run(TOY, result.ROOT, result.ROOT, 1)
    assert {row.metric for row in found} > {"iteration", "generate", "annotate", "policy", "pretraining"}
    assert all(row.ours and row.theirs for row in found)
    with pytest.raises(RuntimeError, match="does not run its own code"):
        before_after.name(tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(not ppo_iteration.rival_there(), reason="the extra `bench` is not installed")
def test_the_rival_takes_its_turns() -> None:
    """It asserts itself that an iteration takes as many optimizer steps as ours."""
    with Contestant("benchmarks.ppo.rival", [TOY.word(), "cpu"]) as theirs:
        measured = theirs.turn()
    assert set(ppo_iteration.PHASES) == set(measured["phases"])
    assert sum(measured["phases"].values()) < measured["seconds"]


def test_a_contestant_that_fails_says_why() -> None:
    """What it printed is in the error, and nothing waits for ever."""
    with (
        pytest.raises(RuntimeError, match=r"(?s)benchmarks\.nobody.*No module named"),
        Contestant("benchmarks.nobody", []),
    ):
        pass


def test_an_operator_is_measured_at_toy_size() -> None:
    """A rival's numbers beside ours; a side that cannot run is named, its numbers missing and not invented."""
    (task,) = logprob.tasks("cpu", toy=True)
    pairs = [("eager", "eager, entropy"), ("eager", "nobody")]
    found, _ = duel.rows(task, pairs, turns=1, passes=logprob.PASSES)
    assert [row.metric for row in found] == 2 * ["seconds", "CPU time", "extra peak memory"]
    assert all(row.ours is not None and row.theirs is not None for row in found[:3])
    assert found[0].floor is not None and found[1].floor is None
    assert all(row.theirs is None and row.rival.startswith("nobody: not run") for row in found[3:])


def test_annotate_is_measured_beside_its_formula() -> None:
    """The documented sizes give the documented bytes; sides that disagree on the log-probs are an error."""
    near, far = (replace(annotate.TASKS[0], side=side).predicted(annotate.AT_ONCE) / 2**20 for side in (NOW, "before"))
    assert (near, far) == (212.5, 3160.0)
    numbers = {"seconds": 1.0, "extra": 2.0**28, "mean": -10.0}
    found = annotate.rows(annotate.TASKS[0], {NOW: numbers, "before": {**numbers, "extra": 2.0**30, "seconds": 3.0}})
    by = {(row.metric, row.rival): row for row in found}
    drop = by["drop from before", annotate.FORMULA]
    assert (drop.ours, drop.theirs) == (768.0, 2947.5)
    assert (by["extra peak memory", "before"].ratio, by["seconds", "before"].ratio) == (4.0, 3.0)
    with pytest.raises(RuntimeError, match="mean log-probs"):
        annotate.rows(annotate.TASKS[0], {NOW: numbers, "before": {**numbers, "mean": -9.0}})


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.skipif(not library.loaded(), reason=library.WHY_NOT)
def test_annotate_runs_at_toy_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits of every position need the memory that the formula says, and those of responses a fraction of it."""
    monkeypatch.setattr(annotate, "SIDES", (NOW, "before"))
    found = annotate.measure(annotate.TOY, 1)
    rows = {row.metric: row for row in annotate.rows(annotate.TOY, found)}
    before = rows["extra peak memory, before"]
    assert before.ours is not None and before.ours == pytest.approx(before.theirs, rel=0.5)
    assert found["before"]["extra"] > 2 * found[NOW]["extra"]


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.skipif(not library.loaded(), reason=library.WHY_NOT)
def test_annotate_runs_on_every_side() -> None:
    """All sides of one rank and of two agree on the log-probs."""
    annotate.run([annotate.TOY, replace(annotate.TOY, tp=2)], 1)
