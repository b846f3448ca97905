"""Proves the verb `plan --reshard-only`: its JSON and its text, without torch and in seconds, and that only the two
layouts of the policy count.

Not proved here: the plan itself (tests/reshard/test_plan.py).
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_rlhf import cli
from megatron_rlhf.config.load import choices, load
from megatron_rlhf.config.rules import BadInput
from megatron_rlhf.plan.reshard import reshard

ROOT = Path(__file__).resolve().parents[2]
HEADLINE = ["model=gpt_175b_untied", "layout.policy=tp8 pp16 dp8", "layout.generate=tp8 pp4"]
# DESIGN's names; other programs read them
NAMES = {
    *("recv_bytes_max", "recv_bound_max", "send_bytes_max", "send_bytes_mean", "peak_extra_bytes"),
    *("node_time_s", "node_bound_s", "plan_seconds", "plan_sha256"),
}


def test_the_whole_command_without_torch_in_seconds() -> None:
    """175B on 1,024 ranks: 2 s of processor time for the plan, 4 s with Python's start and Hydra's composing; they take
    about 0.1 s and 1 s."""
    code = (
        "import sys, time; from megatron_rlhf import cli; code = cli.main(sys.argv[1:]); "
        "assert not {'torch', 'megatron'} & set(sys.modules); assert time.process_time() < 4.0; sys.exit(code)"
    )
    words = [sys.executable, "-c", code, "plan", "--reshard-only", "--json", *HEADLINE]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert set(found) >= NAMES
    assert (found["policy"], found["generate"]) == ("tp8 pp16 dp8", "tp8 pp4 dp32")
    assert found["recv_bytes_max"] == found["recv_bound_max"] == pytest.approx(8.36e9, rel=0.02)
    assert found["node_time_s"] == pytest.approx(0.173, rel=0.02)
    assert found["node_bound_s"] == pytest.approx(0.166, rel=0.02)
    assert found["peak_extra_bytes"] == 0
    assert found["plan_seconds"] < 2.0
    assert len(found["plan_sha256"]) == 64


def test_the_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "--reshard-only", *HEADLINE]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "reshard tp8 pp16 dp8 -> tp8 pp4 dp32, 8 GPUs a node; bytes of the busiest GPU"
    assert [line.split("  ")[1] for line in lines[1:]] == [
        *("needed", "received", "sent", "staging", "between nodes", "inside nodes", "planned in")
    ]
    assert "   8.36 GB  at least 8.36 GB" in lines[2]
    assert max(len(line) for line in lines) <= 120


@pytest.mark.parametrize("layout", [name for name in choices("layout") if "gpu" in name])
def test_every_layout_file_plans(layout: str) -> None:
    """With the model of the experiment that uses it."""
    found = reshard(
        load("plan", [f"layout={layout}", "model=gpt_1b3" if layout == "8gpu" else "model=gpt_175b"])
    ).summary
    assert found.recv_bytes_max == found.recv_bound_max


@pytest.mark.parametrize("cluster", choices("cluster"))
def test_slower_links_take_longer(cluster: str) -> None:
    """Seconds follow the cluster's own rates; bytes do not depend on them."""
    config = load("plan", [*HEADLINE, f"cluster={cluster}"])
    found, usual = reshard(config).summary, reshard(load("plan", HEADLINE)).summary
    assert found.node_time_s * config.cluster.nic == pytest.approx(usual.node_time_s * 50e9)
    assert found.recv_bytes_max == usual.recv_bytes_max


def test_a_setting_wins_over_the_cluster() -> None:
    """Nodes of four."""
    assert load("plan", ["cluster=b200", "cluster.node=4"]).cluster.node == 4
    assert load("ppo", ["experiment=quickstart", "cluster=a100"]).cluster.nic == 25e9


def test_other_roles_do_not_get_in_the_way() -> None:
    """Neither their ranks nor their model, nor the vocabulary of the reward model."""
    words = [
        "model=gpt_tiny",
        "layout.policy=tp2 pp2",
        "layout.generate=tp2",
        "layout.value=tp7",
        "data.max_prompt_tokens=9999",
    ]
    assert reshard(load("plan", words)).policy.size == 4


def test_the_dealing_is_printed() -> None:
    """What generates on other ranks than its words say is called planned."""
    report = reshard(load("plan", ["model=gpt_tiny", "layout.policy=tp4 pp2", "layout.generate=tp2 pp2"]))
    assert str(report.generate) == "tp2 pp2 dp2 order=planned"
    assert "tp2 pp2 dp2 order=planned" in report.as_text()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["plan", "--reshard-only", "--fast"], "flag '--fast' is unknown"),
        (["plan", "--reshard-only", "cluster=v100"], "cluster=v100 is unknown; the nearest is cluster="),
        (["plan", "--reshard-only", "cluster.node=0"], "cluster.node is 0; it must be at least 1"),
        (["plan", "--reshard-only", "layout.generate=tp8 pp5"], "layout.generate: tp8 pp5 dp25 is 1000 ranks"),
        (["plan", "--reshard-only", "layout.generate=tp5", "layout.policy=tp5"], "splits model.heads=96 in 5 (tp)"),
        (["plan", "--reshard-only", "layout.generate=tp8 vp2 pp2"], "virtual stages, useless for generation"),
    ],
)
def test_bad_input_is_one_sentence(words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words) == 2
    shown = capsys.readouterr()
    assert sentence in shown.err
    assert shown.out == ""


def test_a_model_that_does_not_divide_is_refused() -> None:
    with pytest.raises(BadInput, match=r"layout.generate='tp1 pp3 dp2' splits model.layers=4 in 3 \(pp x vp\)"):
        reshard(load("plan", ["model=gpt_tiny", "layout.policy=tp2 pp1 dp3", "layout.generate=tp1 pp3 dp2"]))
