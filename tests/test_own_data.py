"""The chain on a user's own JSONL, verb by verb, with rankings made by people.

Proves: prepare → pretrain → sft → rank (comparisons without ranks) → reward → ppo → sample run from a folder, each in
a process of its own; a verb whose result stands does not train again.
Not proved here: that anything was learned, or more than one rank (test_quickstart.py).
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest

SMALL = [
    *("experiment=quickstart", "layout=cpu1", "model.layers=1", "model.hidden=32", "reward_model.layers=1"),
    *("reward_model.hidden=32", "model.vocabulary=300", "reward_model.vocabulary=300", "pretrain.steps=6"),
    *("pretrain.learning.warmup=2", "pretrain.batch=4", "pretrain.length=32", "sft.batch=8", "rl_start.batch=8"),
    *("rank.prompts=6", "rank.valid_prompts=4", "reward.batch=2", "sampling.max_tokens=12", "ppo.iterations=2"),
    *("ppo.episodes=8", "ppo.minibatches=2", "ppo.policy.warmup=1", "data.min_response_tokens=1"),
]
THINGS = ["".join(letters) for letters in product("bdglmprst", "aeiou", "bdgklmnprst", "aeiou")][::9]


def verb(name: str, out: Path, source: Path) -> str:
    words = [sys.executable, "-m", "megatron_rlhf", name, *SMALL, f"out={out}", f"data.source={source}"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


@pytest.mark.slow
def test_every_verb_runs_on_a_folder_of_jsonl(tmp_path: Path) -> None:
    source, out, chance = tmp_path / "source", tmp_path / "out", random.Random(1)
    source.mkdir()
    with (source / "demonstrations.jsonl").open("w") as file:
        for user in range(120):
            for _ in range(4):
                asked, other = chance.sample(THINGS, 2)
                told = {"prompt": f"is it {asked} or {other}?\n", "response": f"it is {asked}.", "user": f"u{user}"}
                file.write(json.dumps(told) + "\n")
    for name in ("prepare", "pretrain", "sft"):
        verb(name, out, source)
    assert "comparisons" in verb("rank", out, source)
    for split in ("train", "valid"):
        rows = [json.loads(line) for line in (out / "data" / f"comparisons.{split}.jsonl").read_text().splitlines()]
        assert rows and all("ranks" not in row and len(row["responses"]) >= 4 for row in rows)
        ranked = [{**row, "ranks": [1, *range(2, len(row["responses"])), 2]} for row in rows]
        (out / "data" / f"rankings.{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ranked))
    for name in ("reward", "ppo"):
        verb(name, out, source)
    assert ">" in verb("sample", out, source)
    assert "done before" in verb("ppo", out, source)
    phases = [json.loads(line)["phase"] for line in (out / "log.jsonl").read_text().splitlines()]
    assert phases.count("ppo") == 2
