"""Proves `plan calibrate`: factors that were put into runs come out again, published runs that were left out are
predicted by those that were not, and files of runs are read or refused in one sentence.

Not proved here: that factors fitted to one machine hold on another.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_rlhf import cli
from megatron_rlhf.config.load import load
from megatron_rlhf.plan import calibrate
from megatron_rlhf.plan.calibrate import CLOCKS, Measured, calibrated, predictor
from megatron_rlhf.plan.published import RECOMPUTED, SCALED, Published

A100 = load("plan", ["cluster=a100"]).cluster
LAYOUTS = ["layout=128gpu", "layout=1024gpu", "layout=64gpu", "layout=8gpu"]
MODELS = {"layout=64gpu": ["model=gpt_6b"], "layout=8gpu": ["model=gpt_1b3"]}


def measured(run: Published) -> Measured:
    return Measured(run.name, {"step": run.seconds}, lambda cluster: {"step": run.predicted(cluster).total})


def settings(layout: str) -> list[str]:
    return [layout, *MODELS.get(layout, []), "sampling.batch=16"]


def test_published_runs_predict_each_other() -> None:
    """Fitted to seven of the nineteen, the other twelve are within 15 %, where factors a fifth off are not."""
    runs = [measured(run) for run in (*RECOMPUTED, *SCALED)]
    start = replace(A100, factors=replace(A100.factors, gemm=0.6, nvlink=0.6, memory=0.7))
    assert max(abs(run.error(start)) for run in runs) > 0.15
    found = calibrated(runs, start)
    assert len(found.fitted) == 7
    assert len(found.held_out) == 12
    assert max(map(abs, found.held_out.values())) < 0.15
    assert found.factors.gemm == pytest.approx(0.78, abs=0.06)


def test_known_factors_come_out() -> None:
    """Of iterations made with other factors: those that they depend on, and the times of runs left out to 1 %."""
    true = replace(load("plan").cluster.factors, gemm=0.5, memory=0.6, nvlink=0.5, nic=0.4)
    cluster = load("plan").cluster
    runs = []
    for layout in LAYOUTS:
        predict = predictor(load("plan", settings(layout)), "ppo")
        seconds = {clock: value for clock, value in predict(replace(cluster, factors=true)).items() if clock in CLOCKS}
        runs.append(Measured(layout, seconds, predict))
    found = calibrated(runs, cluster)
    for name in ("gemm", "memory", "nvlink"):
        assert getattr(found.factors, name) == pytest.approx(getattr(true, name), rel=0.05)
    assert max(map(abs, found.held_out.values())) < 0.02


def test_a_log_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The median of its rows but the first, by the clocks of PPO, and the step of a supervised recipe."""
    log = tmp_path / "log.jsonl"
    rows = [{"step": 0, "phase": "sft", "tokens": 100, "tokens_per_second": 1.0}]
    rows += [{"step": n, "phase": "sft", "tokens": 100, "tokens_per_second": 50.0} for n in range(1, 4)]
    rows += [{"step": n, "phase": "ppo", "seconds_by_phase": {"generate": 9.0 + n, "score": 1.0}} for n in range(4)]
    log.write_text("\n".join(map(json.dumps, rows)))
    found = calibrate.read([str(log)], ["layout=128gpu"])
    assert [run.seconds for run in found] == [{"step": 2.0}, {"generate": 11.0, "score": 1.0}]
    assert cli.main(["plan", "calibrate", str(log), "layout=128gpu"]) == 2
    assert "2 runs are too few to fit and to hold some out; give at least 3" in capsys.readouterr().err


def test_the_verb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A list of runs with a third of every measured time in common: the text names the errors, the JSON the factors."""
    runs = []
    for layout in LAYOUTS[:3]:
        seconds = predictor(load("plan", settings(layout)), "ppo")(load("plan").cluster)
        runs.append({"settings": settings(layout), "name": layout, "seconds": {"step": 1.2 * seconds["step"]}})
    file = tmp_path / "runs.json"
    file.write_text(json.dumps(runs))
    assert cli.main(["plan", "calibrate", str(file), "cluster=h100"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("factors:\n  gemm: 0.")
    assert "not fitted to, so this wrong on other runs:" in shown
    assert cli.main(["plan", "calibrate", str(file), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found["held_out"]) == {"layout=1024gpu", "layout=64gpu"}
    assert max(map(abs, found["held_out"].values())) < 0.1


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{", "is no list of runs (JSONDecodeError"),
        ('[{"settings": []}]', "is no list of runs (KeyError: 'seconds')"),
        ('[{"recipe": "dpo", "seconds": 1}]', "recipe 'dpo' is unknown; write one of ppo, pretrain"),
        ('[{"seconds": {"walk": 1}}]', "'walk': 1 is no time of ppo; name seconds of annotate, generate"),
        ('[{"seconds": {"score": 0}}]', "'score': 0 is no time of ppo"),
        ('[{"settings": ["laiout=1"], "seconds": 1}]', "setting 'laiout' is unknown"),
    ],
)
def test_bad_runs_are_refused(text: str, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "runs.json"
    file.write_text(text)
    assert cli.main(["plan", "calibrate", str(file)]) == 2
    assert sentence in capsys.readouterr().err


def test_no_file_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "calibrate", "nowhere.jsonl"]) == 2
    assert "'nowhere.jsonl' is no file; name log.jsonl files, or JSON lists of runs" in capsys.readouterr().err
    assert cli.main(["plan", "calibrate"]) == 2
    assert "plan calibrate needs files" in capsys.readouterr().err
