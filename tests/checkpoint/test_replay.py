"""Proves that PPO goes on under other layouts as the run that was not changed, where both learn from the same tokens.

An undisturbed run draws its own episodes; others take up states under layout after layout and are given its tokens, and
score, annotate and learn from them by themselves. Losses agree to 1e-6 for the three iterations behind each change.
Not proved here: tokens of their own, which rounding may change; a world of another size (test_world).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_rlhf.batch import Rollout
from megatron_rlhf.checkpoint import weights
from megatron_rlhf.config.load import load
from megatron_rlhf.data import jsonl, pretraining, sentence_pieces, tokenizer
from megatron_rlhf.observe.log import Log
from megatron_rlhf.observe.stats import Stats
from megatron_rlhf.observe.timer import Timer
from megatron_rlhf.recipes import ppo
from megatron_rlhf.recipes.session import STOPPED, Session
from tests.helpers.grid import on_grid
from tests.helpers.signals import Signals

CHAIN = ("tp2 pp2", "dp2 @0-1", "tp4", "pp4")
EACH = 3
"""Iterations between two changes."""
BOUNDARIES = 7
"""Of an iteration: behind four phases, two minibatches and the whole."""
SETTINGS = (
    *("experiment=quickstart", "data.source=people", "model.vocabulary=96", "reward_model.vocabulary=96"),
    *(f"{model}.{size}" for model in ("model", "reward_model") for size in ("layers=4", "hidden=32", "heads=4")),
    *("data.max_prompt_tokens=16", "sampling.max_tokens=8", "sampling.batch=4", "pretrain.length=16"),
    *(f"ppo.iterations={EACH * len(CHAIN)}", "ppo.episodes=8", "ppo.minibatches=2", "ppo.policy.warmup=1"),
    *("ppo.kl.adaptive=true", f"checkpoint.every={EACH}", "checkpoint.keep=9", "checkpoint.asynchronous=false"),
)
ROLES = ("policy", "generate", "reference", "value", "reward", "pretrain")
WORDS = ["the", "cat", "dog", "sees", "likes", "a", "red", "house", "and", "why", "runs", "sleeps", "here", "today"]

Sample = Callable[..., Rollout]


def session(out: Path, words: str, iterations: int) -> Session:
    """A run in `out` with all roles under one layout, which is stopped after so many iterations."""
    places = (f"out={out}", f"data.directory={out.parent / 'data'}", *(f"layout.{role}={words}" for role in ROLES))
    log = Log(out, dist.get_rank() == 0)
    return Session(load("ppo", [*SETTINGS, *places]), out, log, Timer(), Signals(BOUNDARIES * iterations))


def train(run: Session, sample: Sample) -> list[dict[str, Any]]:
    """The rows of a run until it is stopped. Collective: world."""
    prepared = ppo.prepared

    def judged(session: Session) -> ppo.Run:
        made = prepared(session)
        made.judge = lambda scored: Stats()
        return made

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(ppo, "prepared", judged)
        patch.setattr(ppo, "sample", sample)
        ppo.train(run)
    assert stopped.value.code == STOPPED
    dist.barrier()
    return [json.loads(line) for line in (run.out / "log.jsonl").read_text().splitlines()]


def starting(run: Session) -> None:
    """Tokenizer, prompts, text and the weights of earlier stages. Collective: world."""
    picks = torch.randint(len(WORDS), (200, 6), generator=torch.Generator().manual_seed(6)).tolist()
    sentences = [" ".join(WORDS[place] for place in row) + "." for row in picks]
    if run.first:
        run.data.mkdir()
        (run.data / "tokenizer.model").write_bytes(sentence_pieces.train(sentences, 96))
        jsonl.write(run.data / "prompts.train.jsonl", [{"prompt": sentence[:12]} for sentence in sentences])
        pretraining.write(sentences, tokenizer.Tokenizer.load(run.data), run.data / "pretraining.train")
    dist.barrier()
    for stage, scalar in ((ppo.START, False), ("reward", True)):
        weights.save(run.network(run.config.model, run.config.layout.policy, scalar=scalar), run.weights(stage))


def taken_from(source: Path, out: Path, step: int) -> Path:
    """The folder `out` of a run that will go on from `source`'s state of `step` iterations. Collective: world."""
    if dist.get_rank() == 0:
        state = Path("ppo", "state", f"step_{step}")
        for name in ("rl_start", "reward", state):
            shutil.copytree(source / name, out / name)
    dist.barrier()
    return out


def apart(row: dict[str, Any], other: dict[str, Any]) -> float:
    """The largest difference of a loss, of one below 1 absolute and of others relative."""
    names = [name for name in other if name.startswith("loss.")]
    assert {"loss.policy", "loss.value", "loss.language"} <= set(names) and row.keys() == other.keys()
    return max(abs(row[name] - other[name]) / max(1.0, abs(other[name])) for name in names)


@on_grid(4)
@pytest.mark.parametrize("chain", [CHAIN[:2], pytest.param(CHAIN, marks=pytest.mark.slow)], ids=["one change", "all"])
def test_the_same_tokens_teach_the_same_under_every_layout(chain: tuple[str, ...], tmp_path: Path) -> None:
    drawn: list[Rollout] = []
    usual = ppo.sample

    def recorded(*arguments: Any, **named: Any) -> Rollout:
        drawn.append(usual(*arguments, **named))
        return drawn[-1]

    def replayed(*arguments: Any, iteration: int, **named: Any) -> Rollout:
        return drawn[iteration]

    undisturbed = session(tmp_path / "run_0", chain[0], EACH * len(chain))
    starting(undisturbed)
    expected = train(undisturbed, recorded)
    assert len({str(rollout.rows.tokens_BT) for rollout in drawn}) == len(expected) == EACH * len(chain)
    worst = 0.0
    for place, words in enumerate(chain[1:], 1):
        out = taken_from(tmp_path / f"run_{place - 1}", tmp_path / f"run_{place}", EACH * place)
        rows = train(session(out, words, EACH), replayed)
        assert [row["step"] for row in rows] == list(range(EACH * place, EACH * (place + 1)))
        worst = max(worst, *(apart(row, expected[row["step"]]) for row in rows))
    assert worst < 1e-6
