"""The whole chain in one launch: prepare → pretrain → SFT → rank → reward model → PPO-ptx → evaluation → report."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_rlhf.checkpoint.manifest import manifest
from megatron_rlhf.config.schema import Config
from megatron_rlhf.eval import report
from megatron_rlhf.observe.log import write_json
from megatron_rlhf.observe.memory import peak_bytes
from megatron_rlhf.parallel import collectives
from megatron_rlhf.recipes import evaluate, ppo, prepare, pretrain, rank, reward, session, sft
from megatron_rlhf.recipes.session import Session

PACKAGES = ("torch", "megatron-core", "sentencepiece", "megatron-rlhf")


def run(config: Config) -> None:
    """Run every stage that has not finished, write report.json, report.md and plots into `out`. Collective: world."""
    run_started = session.start(config)
    began = time.monotonic()
    stages: dict[str, tuple[Callable[[], object], Path]] = {
        "prepare": (lambda: _prepare(run_started), run_started.data / "prepare.json"),
        "pretrain": (lambda: pretrain.pretrain(run_started), run_started.weights("pretrain")),
        "sft": (lambda: sft.tune(run_started, "sft", config.sft), run_started.weights("sft")),
        "rl_start": (lambda: sft.tune(run_started, "rl_start", config.rl_start), run_started.weights("rl_start")),
        "rank": (lambda: rank.rank(run_started), run_started.data / "rank.json"),
        "reward": (lambda: reward.train(run_started), run_started.weights("reward")),
        "ppo": (lambda: ppo.train(run_started), run_started.weights("ppo")),
        "evaluate": (lambda: evaluate.evaluate(run_started), run_started.out / "evaluation.json"),
    }
    for name, (stage, result) in stages.items():
        _once(run_started, name, stage, result)
    memory = _memory()
    if run_started.first:
        _report(run_started, time.monotonic() - began, memory)
    collectives.wait_for_all()
    run_started.log.close()


def _once(run: Session, name: str, stage: Callable[[], object], result: Path) -> None:
    """Run a stage unless its result stands and runs may be resumed; note its seconds. Collective: world."""
    if run.config.checkpoint.resume == "auto" and result.exists():
        run.log.say(f"{name}: done before")
        collectives.wait_for_all()
        return
    began = time.monotonic()
    stage()
    collectives.wait_for_all()
    if run.first:
        seconds = _seconds(run) | {name: round(time.monotonic() - began, 1)}
        write_json(run.out / "seconds.json", seconds)
        run.log.say(f"{name}: {seconds[name]} s")


def _seconds(run: Session) -> dict[str, float]:
    path = run.out / "seconds.json"
    return json.loads(path.read_text()) if path.exists() else {}


def _prepare(run: Session) -> None:
    """Rank 0 prepares the data; the others wait. Collective: world."""
    if run.first:
        prepare.prepare(run.config, run.data)
    collectives.wait_for_all()


def _memory() -> int:
    """Bytes at the peak, all ranks of this machine together. Collective: world."""
    return int(collectives.total(peak_bytes()))


def _report(run: Session, seconds: float, memory: int) -> None:
    """Gather what the stages left and write the report."""
    config = run.config
    evaluation: dict[str, Any] = json.loads((run.out / "evaluation.json").read_text())
    samples = evaluation.pop("samples")
    rewarded, trained = manifest(run.weights("reward")), manifest(run.weights("ppo"))
    ranked = json.loads((run.data / "rank.json").read_text())
    lines = (run.out / "log.jsonl").read_text(encoding="utf-8").splitlines()
    stages = _seconds(run)
    found = {
        "layouts": asdict(config.layout),
        "seed": config.seed,
        "reward": {
            "accuracy": rewarded["accuracy"],
            "oracle_accuracy": ranked["valid"]["oracle_accuracy"],
            "loss": rewarded["loss"],
            "demonstration_score_before": rewarded["demonstration_score_before"],
            "demonstration_score": rewarded["demonstration_score"],
        },
        "ppo": {
            "iterations": trained["iterations"],
            "pretraining_coef": config.ppo.pretraining_coef,
            **trained["checks"],
            **trained["last"],
        },
        "reshard": {name.removeprefix("reshard."): value for name, value in trained["reshard"].items()},
        "evaluation": evaluation,
        "seconds": {**stages, "total": round(sum(stages.values()), 1), "this_launch": round(seconds, 1)},
        "memory_bytes": memory,
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
    }
    report.write(run.out, found, [json.loads(line) for line in lines], samples)
    run.log.say(f"report: {run.out / 'report.md'}")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
