"""The quickstart made so small that a stage takes seconds: its settings, its stages, the run that nobody kills."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_rlhf.config.rules import BadInput
from megatron_rlhf.observe.log import write_json
from tools.resume import process
from tools.resume.process import SOUND, Event

SETTINGS = (
    *("model.layers=2", "model.hidden=64", "reward_model.layers=2", "reward_model.hidden=64"),
    *("pretrain.steps=10", "pretrain.batch=16", "pretrain.learning.warmup=2", "sft.examples=96", "sft.batch=16"),
    *("rl_start.examples=64", "rl_start.batch=16", "rank.prompts=20", "rank.valid_prompts=8", "rank.responses_max=4"),
    *("reward.batch=4", "sampling.max_tokens=16", "ppo.iterations=3", "ppo.episodes=16", "ppo.minibatches=2"),
    *("ppo.policy.warmup=1", "ppo.kl.adaptive=true", "ppo.missing_end=keep", "evaluate.prompts=8"),
)
SAVES = {
    "every phase": ("checkpoint.phases=true", "checkpoint.asynchronous=false"),
    "every phase, beside the run": ("checkpoint.phases=true",),
    "every step, beside the run": ("checkpoint.phases=false",),
}
"""When states are saved; what is saved beside the run is on disk some time after."""


@dataclass(frozen=True, slots=True)
class Verb:
    """A verb that can be resumed, the stages it trains and what it reads of a run's folder."""

    name: str
    stages: tuple[str, ...]
    reads: tuple[str, ...]


VERBS = {
    "sft": Verb("sft", ("sft", "rl_start"), ("data", "pretrain/weights")),
    "reward": Verb("reward", ("reward",), ("data", "sft/weights")),
    "ppo": Verb("ppo", ("ppo",), ("data", "rl_start/weights", "reward/weights")),
}


FAULTS = {"rng": "sft", "cursor": "ppo", "average": "ppo", "shared-step": "reward"}
"""What a resume may get wrong (tools/resume/faults.py), and a stage whose result depends on it."""


@dataclass(frozen=True, slots=True)
class Reference:
    """The run that nobody killed: its folder and what it announced."""

    out: Path
    events: tuple[Event, ...]


def words(verb: str, out: Path, seed: int, saves: str = "every phase") -> list[str]:
    """The command's words."""
    experiment = [] if verb == "quickstart" else ["experiment=quickstart"]
    return [verb, *experiment, f"out={out}", *SETTINGS, f"seed={seed}", "checkpoint.every=1", *SAVES[saves]]


def reference(folder: Path, seed: int) -> Reference:
    """The undisturbed run in `folder`, made where it is not there; BadInput where it is one of other settings."""
    out, kept = folder / "undisturbed", folder / "undisturbed.json"
    facts = {"settings": [*SETTINGS, f"seed={seed}"]}
    if kept.exists():
        found = json.loads(kept.read_text())
        if found["settings"] != facts["settings"]:
            raise BadInput(f"{folder} holds a run of other settings; give another folder, for example --out {folder}2")
        return Reference(out, tuple(Event(**event) for event in found["events"]))
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    ended = process.launch(words("quickstart", out, seed), SOUND, folder, None)
    if ended.code:
        raise RuntimeError(f"the undisturbed run ended with {ended.code}:\n{ended.said}")
    write_json(kept, {**facts, "events": [asdict(event) for event in ended.events]})
    return Reference(out, ended.events)


def prepared(verb: Verb, source: Path, out: Path) -> None:
    """Puts what the verb reads into the empty folder `out`."""
    shutil.rmtree(out, ignore_errors=True)
    for name in verb.reads:
        shutil.copytree(source / name, out / name)
