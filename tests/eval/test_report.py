"""report.json, report.md and the pictures: whole from full data, silent about what is missing, text safely escaped.

Not proved here: that a picture is pleasant to look at.
"""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from megatron_rlhf.eval import plots, report

GOLD = {"sentiment": 0.3, "question": 0.1, "toxicity": -0.2, "total": 0.2}
PPO_GOLD = {"sentiment": 0.4, "question": 0.5, "toxicity": -0.2, "total": 0.7}
FULL: dict[str, Any] = {
    "layouts": {"policy": "tp2 pp2 dp1", "generate": "tp2 pp1 dp2"},
    "reward": {"accuracy": 0.74, "oracle_accuracy": 0.81},
    "ppo": {"iterations": 3, "kl": 2.5, "drift": 1.0000012, "step0_kl": 0.0, "first_ratio_error": 2.4e-7},
    "evaluation": {
        "win_rate": {
            "ppo_vs_sft": {"mean": 0.803, "low": 0.757, "high": 0.85, "n": 300},
            "ppo_vs_human": {"mean": 0.757, "low": 0.71, "high": 0.8, "n": 300},
        },
        "gold": {"sft": GOLD, "ppo": PPO_GOLD, "human": GOLD},
        "weights": "average",
        "unique_share": 0.98,
    },
    "seconds": {"pretrain": 300.0, "ppo": 100.0, "total": 400.0},
    "versions": {"torch": "2.13"},
    "seed": 1,
    "memory_bytes": 2**32,
}
ROWS: list[dict[str, Any]] = [
    *({"step": i, "phase": "pretrain", "loss.language": 7 - i / 50} for i in range(100)),
    {"step": 99, "phase": "pretrain", "valid.loss.language": 5.1},
    *(
        {
            "step": i, "phase": "ppo", "kl": float(i), "score": 0.1 * i, "gold": 1 + 0.1 * i, "reward": 0.1 * i - 0.01,
            "response_length": 12.0, "drift": 1.0 + 1e-6 * i, "loss.policy": -0.01, "loss.value": 0.5,
            "seconds_by_phase": {"generate": 2.0, "train": 3.0},
        }
        for i in range(3)
    ),
]  # fmt: skip
SAMPLES = [{"prompt": "a | b\n<b>c</b>", "sft": f"sft {i} *x*", "ppo": "ppo", "human": "human"} for i in range(7)]


def test_everything_is_written(tmp_path: Path) -> None:
    report.write(tmp_path, FULL, ROWS, SAMPLES)
    assert json.loads((tmp_path / "report.json").read_text()) == FULL
    names = ["gold.png", "losses.png", "ppo.png", "time.png", "win_rate.png"]
    assert sorted(path.name for path in (tmp_path / "plots").iterdir()) == names
    text = (tmp_path / "report.md").read_text()
    for name in names:
        assert (tmp_path / "plots" / name).read_bytes().startswith(b"\x89PNG")
        assert f"(plots/{name})" in text
    for said in (
        "on 80.3 % of 300 held-out prompts (95 % interval 75.7–85.0 %).** Evaluated: the averaged weights.",
        "| policy | `tp2 pp2 dp1` |",
        "| question | 0.100 | 0.500 | 0.100 | +0.400 |",
        "Of the change of +0.50 in the mean gold score: question +0.40, sentiment +0.10.",
        "| `ppo.drift` | 1.0000012 |",
        "| `ppo.step0_kl` | 0 |",
        "| generate | 6.0 |",
        "## What this does not show",
        "4.00 GiB",
    ):
        assert said in text, said


def test_five_responses_stand_side_by_side_and_cannot_break_the_table() -> None:
    text = report.markdown({}, [], SAMPLES, [])
    lines = [line for line in text.splitlines() if line.startswith("| a ")]
    assert len(lines) == 5
    assert lines[0].count("|") == 5
    assert "&lt;b&gt;c" in lines[0] and "<br>" in lines[0] and "sft 0 &#42;x&#42;" in lines[0]


@pytest.mark.parametrize("missing", FULL)
def test_missing_keys_leave_their_part_out(missing: str) -> None:
    kept = {key: value for key, value in FULL.items() if key != missing}
    text = report.markdown(kept, ROWS, [], [])
    assert "What this does not show" in text
    assert ("No win rate" in text) == (missing == "evaluation")
    assert ("## Layouts" in text) == (missing != "layouts")
    assert "Responses side by side" not in text and "![" not in text


def test_an_empty_run_is_reported_without_pictures(tmp_path: Path) -> None:
    report.write(tmp_path, {}, [], [])
    assert not list(tmp_path.glob("plots/*"))
    assert "No win rate" in (tmp_path / "report.md").read_text()


def test_rows_with_holes_are_drawn(tmp_path: Path) -> None:
    """Values that are missing, None, nan or text, and rows without step, are left out of the lines."""
    rows: list[dict[str, Any]] = [
        {"phase": "ppo"},
        {"phase": "ppo", "step": 1, "kl": math.nan, "score": None, "gold": 1.0, "drift": math.inf, "loss.value": "?"},
        {"phase": "ppo", "score": 2.0, "loss.value": 1.0, "seconds_by_phase.train": 2.0},
        {},
    ]
    assert plots.draw(tmp_path, {"evaluation": None}, rows) == ["ppo.png", "losses.png", "time.png"]
    assert plots.series(rows, "score") == ([0.0], [2.0])
    assert plots.series(rows, "gold") == ([1.0], [1.0])
    assert plots.series(rows, "kl") == ([], [])
    assert plots.ppo_seconds(rows) == {"train": 2.0}


def test_non_finite_numbers_become_null(tmp_path: Path) -> None:
    report.write(tmp_path, {"reward": {"loss": math.nan}}, [], [])
    assert json.loads((tmp_path / "report.json").read_text()) == {"reward": {"loss": None}}


@pytest.mark.parametrize(
    ("mean", "low", "high", "verdict"),
    [
        (0.6, 0.55, 0.65, ""),
        (0.52, 0.46, 0.58, "no difference is shown"),
        (0.4, 0.35, 0.45, "made the responses worse"),
    ],
)
def test_the_headline_says_when_nothing_is_shown(mean: float, low: float, high: float, verdict: str) -> None:
    rate = {"mean": mean, "low": low, "high": high, "n": 300}
    said = report.headline({"win_rate": {"ppo_vs_sft": rate}})
    assert verdict in said
    assert said.endswith("**") == (not verdict)


def test_the_running_mean_has_no_bias_at_its_start() -> None:
    assert plots.smoothed([3.0, 3.0, 3.0]) == pytest.approx([3.0, 3.0, 3.0])
    assert plots.smoothed([0.0, 1.0], decay=0.5) == pytest.approx([0.0, 2 / 3])
