"""Proves that PPO goes on bit-equal from every boundary inside an iteration: later rows, weights, checks, statistics.

Every boundary is resumed from twice: from what `checkpoint.phases` saved there, to the end, and one phase at a time,
stopped by a signal at each. Then that a resume which is wrong in one number does not pass for a right one.
Not proved here: kills without warning and the files on disk (tests/test_verify_resume.py, tests/checkpoint).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_rlhf.batch import Annotated, Experience, Rollout
from megatron_rlhf.checkpoint import weights
from megatron_rlhf.config.load import load
from megatron_rlhf.data import jsonl, pretraining, sentence_pieces, tokenizer
from megatron_rlhf.observe.log import Log
from megatron_rlhf.observe.stats import Stats
from megatron_rlhf.observe.timer import Timer
from megatron_rlhf.recipes import ppo
from megatron_rlhf.recipes.flight import Flight
from megatron_rlhf.recipes.session import STOPPED, Session
from tests.helpers import roles as tiny
from tests.helpers.grid import on_grid
from tests.helpers.signals import Signals
from tools.resume.record import CHANGING

ITERATIONS = 2
PHASES = ["generate", "score", "annotate", "credit", *(f"update{number}" for number in (1, 2, 3, 4)), ""]
SETTINGS = [
    *("experiment=quickstart", "data.source=people", "model.vocabulary=96", "reward_model.vocabulary=96"),
    *(f"{model}.{size}" for model in ("model", "reward_model") for size in ("layers=2", "hidden=32", "heads=4")),
    *("data.max_prompt_tokens=16", "sampling.max_tokens=8", "sampling.batch=4", "pretrain.length=16"),
    *(f"ppo.iterations={ITERATIONS}", "ppo.episodes=8", "ppo.minibatches=2", "ppo.epochs=2", "ppo.policy.warmup=1"),
    *("ppo.kl.adaptive=true", "ppo.policy.rate=1e-2", "ppo.value.rate=1e-2"),
    *("checkpoint.phases=true", "checkpoint.asynchronous=false"),
]
WORDS = ["the", "cat", "dog", "sees", "likes", "a", "red", "house", "and", "why", "runs", "sleeps", "here", "today"]


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a run left behind: its rows, final weights, manifest, and what `train` returned."""

    rows: list[dict[str, Any]]
    tensors: dict[str, torch.Tensor]
    manifest: dict[str, Any]
    returned: dict[str, float]

    def apart(self, other: Outcome) -> list[str]:
        """Everything that differs, by name."""
        told = [(self._named(), other._named())]
        found = [f"{n}: {a.get(n)} and {b.get(n)}" for a, b in told for n in sorted({*a, *b}) if a.get(n) != b.get(n)]
        return found + ([] if tiny.equal(self.tensors, other.tensors) else ["weights"])

    def _named(self) -> dict[str, Any]:
        rows = {f"row {place} {name}": value for place, row in enumerate(self.rows) for name, value in row.items()}
        return {**rows, **{f"manifest {n}": v for n, v in self.manifest.items()}, **self.returned}


def session(out: Path, at: int = 0) -> Session:
    """A run in the folder `out` that is signalled at its boundary number `at`."""
    config = load("ppo", [*SETTINGS, f"out={out}", f"data.directory={out.parent / 'data'}"])
    return Session(config, out, Log(out, dist.get_rank() == 0), Timer(), Signals(at))


def golds(rollout: Rollout) -> Stats:
    """A judge that speaks on rank 0 alone, as the quickstart's does."""
    if dist.get_rank() > 0:
        return Stats()
    return Stats.of(gold=(float((rollout.rows.tokens_BT % 7).sum()), len(rollout)))


def train(run: Session, tamper: Callable[[ppo.Run], None] = lambda run: None) -> dict[str, float] | None:
    """What `ppo.train` returns, None where a signal stopped it; `tamper` spoils what it took up. Collective: world."""
    prepared, taken_up = ppo.prepared, ppo._take_up

    def judged(session: Session) -> ppo.Run:
        made = prepared(session)
        made.judge = golds
        return made

    def spoiled(made: ppo.Run) -> None:
        taken_up(made)
        tamper(made)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppo, "prepared", judged)
        patch.setattr(ppo, "_take_up", spoiled)
        try:
            return ppo.train(run)
        except SystemExit as stopped:
            assert stopped.code == STOPPED
            return None


def outcome(out: Path, returned: dict[str, float]) -> Outcome:
    """What the run in `out` left, on every rank. Collective: world."""
    dist.barrier()
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    rows = [{name: value for name, value in row.items() if name not in CHANGING} for row in rows]
    manifest = json.loads((out / "ppo" / "weights" / "manifest.json").read_text())
    del manifest["reshard"]["reshard.seconds"], manifest["seal"]
    files = sorted((out / "ppo" / "weights").glob("*.pt"))
    tensors = {f"{file.stem} {name}": t for file in files for name, t in torch.load(file, weights_only=True).items()}
    # The judge speaks on rank 0 alone; what is resumed has its word everywhere.
    returned = {name: value for name, value in returned.items() if name != "gold"}
    dist.barrier()
    return Outcome(rows, tensors, manifest, returned)


@cache
def undisturbed(folder: Path) -> Outcome:
    """The run that nobody stops; what was on disk at each boundary is kept in `folder`/<number>. Collective: world."""
    run = session(folder / "whole")
    _starting(run)
    kept: list[str] = []
    save = Session.save

    def keeping(self: Session, stage: str, step: int, *arguments: Any, **named: Any) -> None:
        save(self, stage, step, *arguments, **named)
        if self.first:
            shutil.copytree(self.out, folder / str(len(kept)), ignore=shutil.ignore_patterns("tensorboard"))
        kept.append(stage)
        dist.barrier()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Session, "save", keeping)
        returned = train(run)
    assert returned is not None
    assert len(kept) == ITERATIONS * len(PHASES)
    return outcome(run.out, returned)


def _starting(run: Session) -> None:
    """Tokenizer, prompts, text and the weights of earlier stages beside the run's folder. Collective: world."""
    made = torch.Generator().manual_seed(6)
    picks = torch.randint(len(WORDS), (200, 6), generator=made).tolist()
    sentences = [" ".join(WORDS[place] for place in row) + "." for row in picks]
    if run.first:
        run.data.mkdir()
        (run.data / "tokenizer.model").write_bytes(sentence_pieces.train(sentences, 96))
        tokens = tokenizer.Tokenizer.load(run.data)
        jsonl.write(run.data / "prompts.train.jsonl", [{"prompt": sentence[:12]} for sentence in sentences])
        pretraining.write(sentences, tokens, run.data / "pretraining.train")
    dist.barrier()
    for stage, scalar in ((ppo.START, False), ("reward", True)):
        weights.save(run.network(run.config.model, run.config.layout.policy, scalar=scalar), run.weights(stage))


def copied(folder: Path, name: str, boundary: int | None = None) -> Path:
    """The folder of a run with the earlier stages' weights, and what lay there at a boundary. Collective: world."""
    out = folder / name
    if dist.get_rank() == 0:
        shutil.rmtree(out, ignore_errors=True)
        source = folder / "whole" if boundary is None else folder / str(boundary)
        left_out = ("ppo", "log.jsonl", "tensorboard") if boundary is None else ("tensorboard",)
        shutil.copytree(source, out, ignore=shutil.ignore_patterns(*left_out))
    dist.barrier()
    return out


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("flight")


@on_grid(4)
@pytest.mark.slow
def test_it_goes_on_from_every_boundary_to_the_same_end(folder: Path) -> None:
    expected = undisturbed(folder)
    assert [row["step"] for row in expected.rows] == list(range(ITERATIONS))
    assert {"gold", "kl", "score", "drift", "kl_coef", "ratio_error"} <= set(expected.rows[0])
    assert expected.manifest["checks"]["step0_kl"] == 0.0
    for boundary in range(ITERATIONS * len(PHASES)):
        out = copied(folder, "again", boundary)
        returned = train(session(out))
        assert returned is not None
        assert not outcome(out, returned).apart(expected), (boundary, PHASES[boundary % len(PHASES)])


@on_grid(4)
def test_a_signal_waits_for_the_phase_alone_and_every_phase_is_done_once(folder: Path) -> None:
    """A run that is signalled in every phase, resumed each time, ends as the one that never was."""
    expected = undisturbed(folder)
    out = copied(folder, "signalled")
    done = []

    def noting(made: ppo.Run) -> None:
        done.append((made.iteration, made.flight.phase))

    returned, launches = None, 0
    while returned is None:
        returned = train(session(out, at=1), noting)
        launches += 1
        assert launches <= ITERATIONS * len(PHASES) + 1
    assert done[1:] == [(iteration + (not phase), phase) for iteration in range(ITERATIONS) for phase in PHASES]
    assert not outcome(out, returned).apart(expected)


def off_by_one(made: ppo.Run, patch: pytest.MonkeyPatch) -> None:
    made.flight = replace(made.flight, minibatches=made.flight.minibatches + 1)


def other_noise(made: ppo.Run, patch: pytest.MonkeyPatch) -> None:
    sample = ppo.sample
    patch.setattr(ppo, "sample", lambda *a, iteration, **named: sample(*a, iteration=iteration + 1, **named))


def prompts_again(made: ppo.Run, patch: pytest.MonkeyPatch) -> None:
    made.prompts.take(made.ppo.episodes)


def text_again(made: ppo.Run, patch: pytest.MonkeyPatch) -> None:
    made.text.take(1)


def no_losses(made: ppo.Run, patch: pytest.MonkeyPatch) -> None:
    stats = made.flight.stats
    lost = [name for name in stats.sums if name.startswith(("loss.", "grad_norm."))]
    left = [{name: each[name] for name in each if name not in lost} for each in (stats.sums, stats.weights)]
    made.flight = replace(made.flight, stats=Stats(*left))


def no_gold(made: ppo.Run, patch: pytest.MonkeyPatch) -> None:
    stats = made.flight.stats
    left = [{name: value for name, value in each.items() if name != "gold"} for each in (stats.sums, stats.weights)]
    made.flight = replace(made.flight, stats=Stats(*left))


def judged_twice(made: ppo.Run, patch: pytest.MonkeyPatch) -> None:
    made.flight = replace(made.flight, stats=made.flight.stats + golds(made.flight.rollout) + Stats.of(gold=(1, 1)))


def no_checks(made: ppo.Run, patch: pytest.MonkeyPatch) -> None:
    made.checks = {}


def no_average(made: ppo.Run, patch: pytest.MonkeyPatch) -> None:
    if made.policy.average is not None:
        for shard, live in zip(made.policy.average.shards, made.policy.optimizer.shards(), strict=True):
            shard.copy_(live.detach())


def other_coefficient(made: ppo.Run, patch: pytest.MonkeyPatch) -> None:
    made.kl = replace(made.kl, coef=made.ppo.kl.coef)


END, NEXT = len(PHASES) - 1, len(PHASES)
FAULTS = {
    "first minibatch left out": (off_by_one, 3),
    "minibatch left out": (off_by_one, 5),
    "noise of another iteration": (other_noise, END),
    "prompts taken twice": (prompts_again, 0),
    "prompts left out": (prompts_again, END),
    "text left out": (text_again, 5),
    "losses lost": (no_losses, 5),
    "judge's word lost": (no_gold, 5),
    "judged twice": (judged_twice, 3),
    "checks forgotten": (no_checks, NEXT + 4),
    "average lost": (no_average, NEXT + 4),
    "coefficient lost": (other_coefficient, NEXT),
}
QUICK = ["minibatch left out", "noise of another iteration", "prompts taken twice", "losses lost"]


@on_grid(4)
@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in QUICK else pytest.mark.slow) for n in FAULTS])
def test_a_resume_that_is_wrong_in_one_thing_does_not_end_the_same(folder: Path, name: str) -> None:
    expected, (fault, boundary) = undisturbed(folder), FAULTS[name]
    out = copied(folder, "faulty", boundary)
    with pytest.MonkeyPatch.context() as patch:
        try:
            returned = train(session(out), lambda made: fault(made, patch))
        except RuntimeError as error:
            assert fault is no_checks and "old and new log-probs are not computed alike" in str(error)
            return
    assert returned is not None and outcome(out, returned).apart(expected)


@on_grid(4)
def test_drift_is_looked_at_and_told_once_by_the_network_that_generated(folder: Path) -> None:
    undisturbed(folder)
    told: list[str] = []
    looked: list[bool] = []

    def drifted(annotated: Annotated, policy: Any, generate: Any) -> str:
        looked.append(tiny.equal(tiny.weights(policy.network), tiny.weights(generate)))
        return "far"

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppo.measures, "drifted", drifted)
        patch.setattr(Log, "say", lambda self, text: told.append(text))
        out = copied(folder, "drifting", 2)
        assert train(session(out, at=2)) is None, "stopped after credit and the first minibatch"
        assert train(session(out)) is not None
    assert looked == [True]
    assert [text for text in told if "far" in text] == ["ppo: iteration 0: far"]


def nouns() -> list[Flight]:
    """What is in flight after each phase, with made-up numbers."""
    experience = tiny.experience(count=6)
    annotated: Annotated = experience.annotated
    scored: Rollout = replace(annotated.rollout, scores_B=torch.randn(6))
    annotated = replace(annotated, rollout=scored)
    experience = Experience(annotated, *(getattr(experience, f.name) for f in fields(experience)[1:]))
    stats = Stats.of(kl=(0.1, 3), loss__value=(1 / 3, 7.0))
    drawn = Flight(phase="generate", rollout=annotated.rollout, seconds={"generate": 0.3}, elapsed=0.7)
    known = {"rollout": scored, "scored": scored}
    return [
        Flight(),
        drawn,
        replace(drawn, phase="score", **known),
        replace(drawn, phase="annotate", **known, annotated=annotated),
        replace(drawn, phase="credit", **known, annotated=annotated, experience=experience, stats=stats),
        Flight("update3", **known, annotated=annotated, experience=experience, minibatches=3, stats=stats),
    ]


def same(left: object, right: object) -> bool:
    """Equal in every bit, kind and stride."""
    if isinstance(left, torch.Tensor):
        assert isinstance(right, torch.Tensor)
        return left.dtype == right.dtype and left.stride() == right.stride() and torch.equal(left, right)
    if is_dataclass(left):
        return type(left) is type(right) and all(
            same(getattr(left, item.name), getattr(right, item.name)) for item in fields(left)
        )
    return left == right


@pytest.mark.parametrize("number", range(6))
def test_what_is_in_flight_comes_back_from_plain_tensors_and_numbers(number: int, tmp_path: Path) -> None:
    flight = nouns()[number]
    torch.save(flight.state(), tmp_path / "flight.pt")
    again = Flight.of(torch.load(tmp_path / "flight.pt", weights_only=True))
    assert same(again, flight)
    assert again.drawn == (flight.phase in ("generate", "score", "annotate"))


def test_a_field_that_may_be_none_comes_back_as_it_was() -> None:
    plain = nouns()[3]
    assert plain.annotated is not None
    for exact_kl_BR in (None, torch.rand_like(plain.annotated.mask_BR)):
        flight = replace(plain, annotated=replace(plain.annotated, exact_kl_BR=exact_kl_BR))
        again = Flight.of(flight.state())
        assert again.annotated is not None and same(again, flight)
        assert (again.annotated.exact_kl_BR is None) == (exact_kl_BR is None)
