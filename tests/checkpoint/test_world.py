"""Proves that a run goes on in a world of another size, each a launch of its own: 4 ranks, then 2, then 4 again.

Losses of the three steps behind each change are those of the run that had 4 ranks all along, to 1e-6; the other number
of ranks is said.
Not proved here: roles other than the one that learns by demonstrations; worlds of several machines.
"""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_rlhf.config.load import load
from megatron_rlhf.convert import weights
from megatron_rlhf.convert.logical import Card
from tests.helpers import checkpoints as tiny

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = (
    *("experiment=quickstart", "model.layers=2", "model.hidden=32", "model.heads=4", "model.vocabulary=300"),
    *("reward_model.vocabulary=300", "pretrain.length=32", "sft.batch=8", "sft.examples=72", "sft.dropout=0"),
    *("rl_start.batch=8", "rl_start.examples=8", "data.min_response_tokens=1"),
    *("checkpoint.every=1", "checkpoint.keep=20", "checkpoint.asynchronous=false"),
)
ROLES = ("policy", "generate", "reference", "value", "reward", "pretrain")


def launch(verb: str, folder: Path, out: str, layout: str) -> str:
    """What the verb says, run by as many ranks as the layout asks for."""
    places = (f"out={folder / out}", f"data.directory={folder}/data", f"data.source={folder}/source")
    words = [
        verb,
        *SETTINGS,
        *places,
        f"checkpoint.pretrained={folder}/start",
        *(f"layout.{r}={layout}" for r in ROLES),
    ]
    command = [sys.executable, "-m", "megatron_rlhf", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return " ".join(done.stderr.split())


def rows(out: Path) -> dict[int, dict[str, Any]]:
    found = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return {row["step"]: row for row in found if row["phase"] == "sft" and "loss.language" in row}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Demonstrations of a user's own, prepared, and weights to start from."""
    chance = random.Random(1)
    things = ["".join(letters) for letters in product("bdglmprst", "aeiou", "bdgklmnprst", "aeiou")][::9]
    (tmp_path / "source").mkdir()
    with (tmp_path / "source" / "demonstrations.jsonl").open("w") as file:
        for user in range(150):
            asked, other = chance.sample(things, 2)
            told = {"prompt": f"is it {asked} or {other}?\n", "response": f"it is {asked}.", "user": f"u{user}"}
            file.write(json.dumps(told) + "\n" + json.dumps({**told, "response": f"no, {other}."}) + "\n")
    card = Card(load("sft", SETTINGS).model)
    found = {name: 0.1 * tensor for name, tensor in tiny.tensors(card).items()}
    found |= {name: 1 + tensor for name, tensor in found.items() if name.endswith("layernorm.weight")}
    weights.write(tmp_path / "start", card, tiny.stream(found), torch.float32)
    launch("prepare", tmp_path, "four", "tp1")
    return tmp_path


@pytest.mark.slow
def test_fewer_ranks_and_more_again_go_on_with_the_same_losses(folder: Path) -> None:
    launch("sft", folder, "four", "tp2 pp2")
    expected = rows(folder / "four")
    assert sorted(expected) == list(range(9))
    before, worst = "four", 0.0
    for out, layout, step, said in (("two", "tp2", 3, "ranks were 4, are 2"), ("again", "tp2 dp2", 6, "were 2, are 4")):
        state = Path("sft", "state", f"step_{step}")
        shutil.copytree(folder / before / state, folder / out / state)
        assert said in launch("sft", folder, out, layout)
        found = rows(folder / out)
        assert sorted(found) == list(range(step, 9))
        for number in range(step, step + 3):
            ours, theirs = found[number]["loss.language"], expected[number]["loss.language"]
            worst = max(worst, abs(ours - theirs) / theirs)
        before = out
    assert worst < 1e-6
