"""The whole chain in one launch, very small: every stage runs, the report holds what it promises, a signal is survived.

Proves: prepare → pretrain → SFT → rank → reward → PPO-ptx → evaluation → report under tp2 pp2 with generation at
tp2 dp2; first KL exactly 0, first ratio 1, no drift; a PPO run stopped by SIGUSR1 exits 75, refuses other settings and
goes on bit-equal; one whose KL is exact and whose reference lodges in the policy's place.
Not proved here: that the result is better than the baseline (`make quickstart` measures it), kills without warning.
"""

from __future__ import annotations

import json
import math
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tools.resume.record import CHANGING

SMALL = [
    *("model.layers=2", "model.hidden=64", "reward_model.layers=2", "reward_model.hidden=64"),
    *("pretrain.steps=50", "pretrain.learning.warmup=5", "sft.examples=256", "rl_start.examples=256"),
    *("rank.prompts=32", "rank.valid_prompts=16", "reward.batch=8", "sampling.max_tokens=24"),
    *("ppo.iterations=4", "ppo.episodes=16", "ppo.minibatches=4", "ppo.policy.warmup=2", "evaluate.prompts=24"),
    "compute.deterministic=true",
]


def command(verb: str, out: Path, *words: str) -> list[str]:
    experiment = [] if verb == "quickstart" else ["experiment=quickstart"]
    return [sys.executable, "-m", "megatron_rlhf", verb, *experiment, f"out={out}", *SMALL, *words]


def rows(out: Path, phase: str, without: set[str] = CHANGING) -> list[dict[str, Any]]:
    lines = (out / "log.jsonl").read_text(encoding="utf-8").splitlines()
    found = [json.loads(line) for line in lines]
    return [{k: v for k, v in row.items() if k not in without} for row in found if row["phase"] == phase]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("quickstart")
    done = subprocess.run(command("quickstart", out), capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return out


def test_report_holds_what_it_promises(finished: Path) -> None:
    report = json.loads((finished / "report.json").read_text())
    assert report["layouts"]["policy"] == "tp2 pp2 dp1"
    assert report["layouts"]["generate"] == "tp2 pp1 dp2"
    assert report["ppo"]["iterations"] == 4
    assert report["ppo"]["step0_kl"] == 0
    assert report["ppo"]["first_ratio_error"] <= 1e-5
    assert 1.0 <= report["ppo"]["drift"] <= 1.0001
    assert 0 <= report["ppo"]["drift.p50"] <= report["ppo"]["drift.max"] <= 1e-4
    assert set(report["reshard"]) == {"seconds", "bytes", "bound", "peak_extra"}
    assert 0 < report["reshard"]["bytes"] == report["reshard"]["bound"] < 4 * 250_000, "of half the model's weights"
    assert 0 < report["reward"]["oracle_accuracy"] <= 1
    assert abs(report["reward"]["demonstration_score"]) <= 1e-5, "T0-3: demonstrations score 0 after calibration"
    assert abs(report["reward"]["demonstration_score_before"]) > 1e-5
    assert set(report["evaluation"]["win_rate"]["ppo_vs_sft"]) == {"mean", "low", "high", "n"}
    assert report["evaluation"]["weights"] == "average"
    stages = {"prepare", "pretrain", "sft", "rank", "reward", "ppo", "evaluate", "total"}
    assert stages <= set(report["seconds"])
    assert (finished / "report.md").stat().st_size > 1000
    assert {"win_rate.png", "ppo.png", "losses.png", "time.png"} <= {p.name for p in (finished / "plots").iterdir()}


def test_log_has_a_row_a_step_under_the_names_everyone_uses(finished: Path) -> None:
    assert [row["step"] for row in rows(finished, "ppo")] == [0, 1, 2, 3]
    means = ("kl", "score", "gold", "reward", "drift", "drift.max", "reshard.seconds", "lr.policy")
    for name in (*means, "loss.policy", "loss.value", "loss.language"):
        assert all(isinstance(row[name], float) for row in rows(finished, "ppo", set())), name
    assert len([row for row in rows(finished, "pretrain") if "loss.language" in row]) == 50
    assert rows(finished, "sft")[-1]["valid.loss.demonstrations"] > 0
    assert rows(finished, "rl_start")[-1]["valid.loss.pretraining"] > 0


def test_rankings_have_between_four_and_nine_responses(finished: Path) -> None:
    lines = (finished / "data" / "rankings.train.jsonl").read_text(encoding="utf-8").splitlines()
    sizes = {len(json.loads(line)["responses"]) for line in lines}
    assert len(lines) == 32 and min(sizes) >= 4 and max(sizes) <= 9 and len(sizes) > 1


def test_stopped_by_a_signal_it_exits_75_and_goes_on_bit_equal(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "stopped"
    shutil.copytree(finished, out, ignore=shutil.ignore_patterns("ppo", "tensorboard", "log.jsonl", "plots"))
    first = subprocess.Popen(command("ppo", out), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 300
    while not (out / "log.jsonl").exists() or not rows(out, "ppo"):
        assert first.poll() is None and time.monotonic() < deadline, first.stderr and first.stderr.read()[-3000:]
        time.sleep(0.05)
    first.send_signal(signal.SIGUSR1)
    assert first.wait(120) == 75
    assert not (out / "ppo" / "weights").exists()
    assert 1 <= len(rows(out, "ppo")) < 4
    other = subprocess.run(command("ppo", out, "ppo.clip=0.1"), capture_output=True, text=True, timeout=300)
    assert other.returncode == 2 and "Traceback" not in other.stderr
    assert "was saved with other settings: ppo.clip was 0.2, is 0.1." in " ".join(other.stderr.split())
    again = subprocess.run(command("ppo", out), capture_output=True, text=True, timeout=300)
    assert again.returncode == 0, again.stderr[-3000:]
    assert rows(out, "ppo") == rows(finished, "ppo")
    for file in sorted((finished / "ppo" / "weights").glob("*.pt")):
        mine, theirs = (torch.load(folder / "ppo" / "weights" / file.name) for folder in (out, finished))
        assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_with_an_exact_kl_and_a_reference_that_lodges(finished: Path, tmp_path: Path) -> None:
    """The first rollout is the plain run's, exactly 0 from the reference; the KL is never negative from then on, and
    the entropy is logged beside it."""
    out = tmp_path / "exact"
    shutil.copytree(finished, out, ignore=shutil.ignore_patterns("ppo", "tensorboard", "log.jsonl", "plots"))
    words = ("ppo.kl.estimator=exact", "reshard.share_reference=true", "ppo.iterations=2")
    done = subprocess.run(command("ppo", out, *words), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found, plain = rows(out, "ppo"), rows(finished, "ppo")
    assert found[0]["kl"] == plain[0]["kl"] == 0 and found[1]["kl"] > 0
    for name in ("score", "response_length", "drift"):
        assert found[0][name] == pytest.approx(plain[0][name], rel=1e-6), name
    assert all(0 < row["entropy"] < math.log(2048) for row in found)
    assert "entropy" not in plain[0]
    checks = json.loads((out / "ppo" / "weights" / "manifest.json").read_text())["checks"]
    assert checks["step0_kl"] == 0 and checks["first_ratio_error"] <= 1e-5
