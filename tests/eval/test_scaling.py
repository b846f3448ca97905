"""Proves the arithmetic of a sweep's report on points made up: efficiency, MFU, cost, errors of prediction; which
points make a curve; that a partial or damaged sweep gives a report that names what is missing.

Not proved here: that measurements are right (tests/test_sweep.py).
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from megatron_rlhf import cli
from megatron_rlhf.eval import points, scaling

SETTINGS = {"ppo.episodes": 64, "ppo.minibatches": 8, "model.hidden": 32, "layout.policy": "dp1", "seed": 1}


def sweep(folder: Path, *rows: tuple[str, int, int, float | None], **plan: Any) -> Path:
    """A sweep of (word, ranks, episodes, seconds) points; None seconds is not measured."""
    named = [
        {"name": f"{place:02}_ranks{world}", "words": ["experiment=quickstart", word], "world": world}
        for place, (word, world, _, _) in enumerate(rows)
    ]
    folder.mkdir(exist_ok=True)
    (folder / "sweep.json").write_text(json.dumps({"verb": "ppo", "points": named}))
    for point, (_word, world, episodes, seconds) in zip(named, rows, strict=True):
        out = folder / str(point["name"])
        out.mkdir()
        settings = {**SETTINGS, "ppo.episodes": episodes, "layout.policy": f"dp{world}"}
        (out / "plan.json").write_text(json.dumps({"world": world, "settings": settings, **plan}))
        if seconds is not None:
            found = {"phase": "ppo", "seconds": seconds, "seconds_low": seconds, "seconds_high": seconds, "steps": 4}
            phases = {"generate": seconds / 2, "policy": seconds / 4}
            machine = {"machine": {"processors": 2}, "versions": {"python": "3"}}
            speed = {"tokens_per_second": 100 * world / seconds, "seconds_by_phase": phases}
            (out / "measurement.json").write_text(json.dumps({**found, **speed, **machine}))
    return folder


def numbers(folder: Path) -> dict[str, Any]:
    scaling.report(folder)
    return json.loads((folder / "scaling.json").read_text())


def test_strong_and_weak_efficiency(tmp_path: Path) -> None:
    rows = [("a=1", 1, 64, 8.0), ("a=2", 2, 64, 5.0), ("a=3", 4, 64, 2.5), ("a=4", 2, 128, 10.0), ("a=5", 4, 256, 12.5)]
    curves = numbers(sweep(tmp_path, *rows))["curves"]
    found = {(c["kind"], c["equal"]): {p["ranks"]: p["efficiency"] for p in c["points"]} for c in curves}
    assert found == {
        ("strong", "64 episodes a step"): {1: 1.0, 2: pytest.approx(0.8), 4: pytest.approx(0.8)},
        ("weak", "64 episodes a rank"): {1: 1.0, 2: pytest.approx(0.8), 4: pytest.approx(0.64)},
    }


def test_the_fastest_of_each_number_of_ranks_is_the_curve(tmp_path: Path) -> None:
    rows = [("a=1", 1, 64, 8.0), ("a=2", 2, 64, 9.0), ("a=3", 2, 64, 4.0)]
    (curve,) = numbers(sweep(tmp_path, *rows))["curves"]
    assert [(p["ranks"], p["seconds"], p["efficiency"]) for p in curve["points"]] == [(1, 8.0, 1.0), (2, 4.0, 1.0)]


def test_points_that_differ_in_more_than_ranks_make_no_curve(tmp_path: Path) -> None:
    folder = sweep(tmp_path, ("a=1", 1, 64, 8.0), ("a=2", 2, 64, 5.0))
    path = folder / "01_ranks2" / "plan.json"
    plan = json.loads(path.read_text())
    plan["settings"]["model.hidden"] = 64
    path.write_text(json.dumps(plan))
    assert numbers(folder)["curves"] == []
    assert "there is no curve" in (folder / "scaling.md").read_text()


def test_mfu_cost_and_the_error_of_the_prediction(tmp_path: Path) -> None:
    cluster = {"price": 3.6}
    plan = {"seconds": 2.0, "flops": 6e12, "rated_flops": 1e12, "cluster": cluster}
    folder = sweep(tmp_path, ("a=1", 2, 64, 4.0), **plan)
    (point,) = numbers(folder)["points"]
    assert point["mfu"] == pytest.approx(6e12 / (1e12 * 2 * 4.0))
    assert point["gpu_seconds_each"] == pytest.approx(4.0 * 2 / 64)
    assert point["price"] == pytest.approx(4.0 * 2 / 64 / 3600 * 3.6)
    (run,) = json.loads((folder / "runs.json").read_text())
    assert (run["recipe"], run["seconds"]) == ("ppo", {"generate": 2.0, "policy": 1.0})
    text = (folder / "scaling.md").read_text()
    assert "| 00&#95;ranks2 | 2 | 4 | 50 | 25 | 2 | -50 % | 75.0 % | 0.125 | 0.000125 |" in text
    assert "![Predicted against" in text


def test_without_a_cluster_there_is_no_prediction_and_it_is_said(tmp_path: Path) -> None:
    folder = sweep(tmp_path, ("a=1", 1, 64, 4.0), ("a=2", 2, 64, 2.0))
    assert numbers(folder)["points"][0]["mfu"] is None
    text = (folder / "scaling.md").read_text()
    assert "the sweep names no `cluster`" in text and not (folder / "prediction.png").exists()
    for name in ("scaling.png", "phases.png"):
        assert f"({name})" in text and (folder / name).read_bytes().startswith(b"\x89PNG")


def test_a_partial_and_damaged_sweep_names_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [("a=1", 1, 64, 8.0), ("a=2", 2, 64, None), ("a=3", 2, 64, 4.0), ("a=4", 4, 64, 2.0), ("a=5", 4, 64, 2.0)]
    folder = sweep(tmp_path, *rows)
    (folder / "02_ranks2" / "measurement.json").write_text('{"seconds": ')
    (folder / "03_ranks4" / "measurement.json").write_text('{"seconds": "fast"}')
    shutil.rmtree(folder / "04_ranks4")
    assert cli.main(["report", "scaling", str(folder)]) == 0
    assert "1 of 5 points" in capsys.readouterr().err
    assert json.loads((folder / "scaling.json").read_text())["missing"] == [
        "01_ranks2 (a=2): not measured",
        "02_ranks2 (a=3): its measurement is damaged",
        "03_ranks4 (a=4): its measurement is damaged",
        "04_ranks4 (a=5): not measured",
    ]
    assert "**Missing points.**\n\n- 01&#95;ranks2 (a=2): not measured" in (folder / "scaling.md").read_text()


def test_a_point_without_its_plan_still_counts(tmp_path: Path) -> None:
    folder = sweep(tmp_path, ("a=1", 1, 64, 8.0), ("a=2", 2, 64, 4.0))
    (folder / "00_ranks1" / "plan.json").unlink()
    found = numbers(folder)
    assert [point["seconds"] for point in found["points"]] == [8.0, 4.0] and found["curves"] == []


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["report"], "write for example megatron-rlhf report scaling runs/sweep"),
        (["report", "losses", "x"], "write for example megatron-rlhf report scaling runs/sweep"),
        (["report", "scaling", "/nowhere"], "/nowhere holds no sweep; megatron-rlhf VERB --multirun out=/nowhere"),
    ],
)
def test_bad_input_is_a_sentence(words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words) == 2
    shown = capsys.readouterr().err
    assert sentence in shown and shown.count("\n") == 1


def test_a_sweep_without_a_measurement_is_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = sweep(tmp_path, ("a=1", 1, 64, None))
    assert cli.main(["report", "scaling", str(folder)]) == 2
    assert "none of the 1 points has a measurement yet" in capsys.readouterr().err
    assert sorted(item.name for item in folder.iterdir()) == ["00_ranks1", "sweep.json"]


def test_every_recipe_that_learns_has_its_measure_of_work() -> None:
    assert set(points.WORK) == {"ppo", "pretrain", "reward", "sft", "rl_start"}
