"""Proves the verb `plan`: text, JSON and picture of a whole plan, without torch and in a second; what is refused.

Not proved here: the numbers (tests/plan/test_times.py, test_published.py, test_memory.py).
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_rlhf import cli
from megatron_rlhf.config.load import choices, load
from megatron_rlhf.config.world import needed
from megatron_rlhf.plan.plan import Plan
from megatron_rlhf.plan.times import Bill

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(("words", "most"), [(["plan", "--help"], 1.0), (["plan", "layout=1024gpu"], 2.0)])
def test_it_starts_at_once_without_torch(words: list[str], most: float) -> None:
    """Processor time; 0.3 s of help and 0.9 s of a plan are taken on a busy machine, half of it in imports."""
    code = (
        "import sys, time; from megatron_rlhf import cli; code = cli.main(sys.argv[1:]); "
        "assert not {'torch', 'megatron', 'matplotlib'} & set(sys.modules); "
        f"assert time.process_time() < {most}, time.process_time(); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_no_part_of_the_planner_imports_torch() -> None:
    names = sorted(file.stem for file in (ROOT / "megatron_rlhf" / "plan").glob("[a-z]*.py"))
    code = "import importlib, sys; [importlib.import_module(f'megatron_rlhf.plan.{n}') for n in sys.argv[1:]]; "
    code += "sys.exit(bool({'torch', 'megatron'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code, *names], cwd=ROOT, check=False).returncode == 0


def test_the_text(capsys: pytest.CaptureFixture[str]) -> None:
    """The paper's run on 128 GPUs: memory and seconds by phase, the whole run, the recipes before it."""
    assert cli.main(["plan", "layout=128gpu", "cluster=h100", "cluster.price=2"]) == 0
    shown = capsys.readouterr().out
    lines = shown.splitlines()
    assert lines[0] == "128 GPUs of 80 GB, 8 a node"
    assert "  It fits: train policy takes most," in shown
    for phase in ("generate", "annotate", "train policy", "decode", "train pretraining mix", "together"):
        assert any(line.startswith(f"  {phase} ") for line in lines), phase
    assert "500 iterations: " in shown
    assert "GPU-hours" in shown
    assert "kWh, price " in shown
    assert "a step of reward: " in shown
    assert max(map(len, lines)) <= 120


def test_the_json(capsys: pytest.CaptureFixture[str]) -> None:
    """Every number of the text under its name, consistent with each other."""
    assert cli.main(["plan", "--json", "layout=1024gpu", "cluster=h100"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fits"] is True
    assert {phase["phase"] for phase in found["memory"]} >= {"generate", "annotate", "train policy", "reshard", "save"}
    for phase in found["memory"]:
        assert phase["bytes"] == pytest.approx(math.fsum(phase["causes"].values()))
        assert phase["bytes"] <= found["capacity"]
    for phase in found["time"]:
        assert phase["seconds"] == pytest.approx(math.fsum(phase["causes"].values()))
    seconds = math.fsum(phase["seconds"] for phase in found["time"])
    assert found["iteration"]["seconds"] == pytest.approx(seconds)
    assert found["run"]["gpu_hours"] == pytest.approx(500 * seconds * 1024 / 3600)
    work = math.fsum(phase["flops"] for phase in found["time"])
    assert found["iteration"]["mfu"] == pytest.approx(work / (seconds * 1024 * 989.4e12))
    assert set(found["steps"]) == {"pretrain", "sft", "rl_start", "reward"}
    assert found["reshard"]["recv_bytes_max"] == found["reshard"]["recv_bound_max"]


def test_what_does_not_fit_says_what_would(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "layout=128gpu", "cluster.memory=60e9"]) == 0
    shown = capsys.readouterr().out
    assert "  DOES NOT FIT. " in shown
    assert " fits: " in " ".join(shown.split())
    assert " too much " in shown


@pytest.mark.parametrize("layout", choices("layout"))
def test_every_layout_file_has_a_plan(layout: str) -> None:
    experiment = {"cpu1": "quickstart", "cpu4": "quickstart", "8gpu": "instructgpt_1b3", "64gpu": "instructgpt_6b"}
    config = load("plan", [f"experiment={experiment.get(layout, 'instructgpt_175b')}", f"layout={layout}"])
    plan = Plan.of(config, needed(config.layout))
    assert plan.fits, plan.nearest
    assert 0 < plan.bill.mfu < 0.65
    assert isinstance(plan.steps["sft"], Bill)


@pytest.mark.parametrize("cluster", choices("cluster"))
def test_every_cluster_file_has_a_plan(cluster: str) -> None:
    """A newer machine takes less time."""
    config = load("plan", ["layout=128gpu", f"cluster={cluster}"])
    found = Plan.of(config, 128).bill.seconds
    assert {"a100": 550, "h100": 250, "h200": 180, "b200": 100}[cluster] < found
    assert found < {"a100": 900, "h100": 400, "h200": 320, "b200": 220}[cluster]


def test_rows_that_follow_the_free_memory() -> None:
    """sampling.batch=0 decodes what fits together, which is faster than 32 rows."""
    few, many = (Plan.of(load("plan", ["layout=128gpu", f"sampling.batch={rows}"]), 128) for rows in (32, 0))
    decode = [next(phase.seconds.total for phase in plan.phases if phase.name == "decode") for plan in (few, many)]
    assert decode[1] < decode[0]
    assert many.fits


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_the_picture(ending: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file of its kind, whole; nothing else in the folder. The vector form names every phase."""
    file = tmp_path / f"plan.{ending}"
    assert cli.main(["plan", "layout=128gpu", "--picture", str(file)]) == 0
    capsys.readouterr()
    content = file.read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    assert content.startswith(b"\x89PNG\r\n" if ending == "png" else b"<?xml")
    if ending == "svg":
        for phase in ("train policy", "decode", "keys and values", "bubble"):
            assert f"<!-- {phase} -->".encode() in content, phase


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["plan", "--picture"], "--picture names no file; write for example --picture plan.png"),
        (["plan", "--picture", "plan.bmp", "layout=cpu1"], "ends in none of png, svg, pdf"),
        (["plan", "search", "--picture", "plan.png"], "--picture is of a whole plan"),
        (["plan", "--fast"], "flag '--fast' is unknown; plan has --json, --reshard-only, --picture"),
        (["plan", "runs/log.jsonl"], "'runs/log.jsonl' is no setting of plan"),
        (["plan", "layout.value=tp7"], "layout.value: tp7 pp1 dp146 is 1022 ranks, the world has 1024"),
        (["plan", "cluster.flops=0"], "cluster.flops is 0.0; it must be above 0"),
        (["plan", "cluster.factors.gemm=1.5"], "cluster.factors.gemm is 1.5; it must be above 0 and at most 1"),
        (["plan", "cluster.factors.straggler=0.9"], "cluster.factors.straggler is 0.9; it must be at least 1"),
    ],
)
def test_bad_input_is_one_sentence(words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words) == 2
    shown = capsys.readouterr()
    assert sentence in shown.err
    assert shown.out == ""
