"""Proves that the chosen boards and no others are opened, that one which is not installed is refused in a sentence
before a rank starts, and, where installed, that wandb (offline) and mlflow (a local file) hold the rows' numbers.

Not proved here: their servers.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from megatron_rlhf import cli
from megatron_rlhf.config.load import load
from megatron_rlhf.config.rules import BadInput, check
from megatron_rlhf.config.schema import Observe
from megatron_rlhf.observe import boards, mlflow, wandb
from megatron_rlhf.observe.log import Log

ROWS = {"kl": 0.5, "slowest.phase": "policy", "bad": float("nan"), "seconds_by_phase": {"generate": 2.0}}


def test_what_is_chosen_is_opened(tmp_path: Path) -> None:
    opened = boards.opened(Observe(boards="none", prometheus="metrics.prom"), tmp_path)
    with Log(tmp_path, True, lambda directory: opened) as log:
        log.row("ppo", 1, ROWS)
    assert sorted(item.name for item in tmp_path.iterdir()) == ["log.jsonl", "metrics.prom"]
    assert [type(board).__name__ for board in boards.opened(Observe(), tmp_path)] == ["Board"]
    assert boards.opened(Observe(boards="none"), tmp_path) == []


def test_a_path_outside_the_runs_folder_is_taken_as_it_is(tmp_path: Path) -> None:
    for board in boards.opened(Observe(boards="none", prometheus=f"{tmp_path}/collector/a.prom"), tmp_path / "run"):
        board.scalars("ppo", 1, {"kl": 1})
    assert 'run="run"' in (tmp_path / "collector" / "a.prom").read_text()


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_one_that_is_not_installed_is_refused_before_a_rank_starts(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(boards._INSTALLED, name, lambda: False)
    words = ["prepare", "experiment=quickstart", f"observe.boards=tensorboard,{name}", f"out={tmp_path / 'run'}"]
    assert cli.main(words) == 2
    assert capsys.readouterr().err == (
        f"megatron-rlhf: observe.boards names {name}, which is not installed; run pip install 'megatron-rlhf[{name}]', "
        "or write observe.boards=tensorboard\n"
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("observe.boards=tensorbord", "observe.boards names 'tensorbord'; it may name tensorboard, wandb, mlflow"),
        ("observe.prometheus=/x/run.txt", "end in .prom, write /x/run.txt.prom"),
    ],
)
def test_a_wrong_setting_is_a_sentence(word: str, sentence: str) -> None:
    with pytest.raises(BadInput, match=sentence):
        check(load("ppo", ["experiment=quickstart", word]), 4)


@pytest.mark.skipif(not wandb.installed(), reason="wandb is not installed (extra wandb)")
def test_wandb_offline_keeps_every_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    with Log(tmp_path, True, lambda directory: boards.opened(Observe(boards="wandb"), directory)) as log:
        for step in (1, 2):
            log.row("ppo", step, {**ROWS, "kl": step / 4})
    (written,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    words = {b"ppo/kl", b"ppo/seconds.generate", b"ppo/step", b"0.25"}
    deadline = time.monotonic() + 30  # a process of wandb's own writes it
    while not all(word in written.read_bytes() for word in words) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert {word for word in words if word in written.read_bytes()} == words
    assert b"ppo/bad" not in written.read_bytes()


@pytest.mark.skipif(not mlflow.installed(), reason="mlflow is not installed (extra mlflow)")
def test_mlflow_keeps_every_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with Log(tmp_path, True, lambda directory: boards.opened(Observe(boards="mlflow"), directory)) as log:
        for step in (1, 2):
            log.row("ppo", step, {**ROWS, "kl": step / 4})
    client = sys.modules["mlflow"].MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("megatron-rlhf")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.data.metrics == {"ppo/kl": 0.5, "ppo/seconds.generate": 2.0}
    assert [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "ppo/kl")] == [(1, 0.25), (2, 0.5)]
    assert (run.info.run_name, run.info.status) == (tmp_path.name, "FINISHED")
