"""The verb `plan`: which of its faces the words of a command line ask for. Pure, no torch."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from megatron_rlhf.config.load import load
from megatron_rlhf.config.rules import BadInput, check
from megatron_rlhf.config.schema import Layouts
from megatron_rlhf.config.world import needed

HELP = """\
Usage: megatron-rlhf plan [--json] [--picture FILE] [key=value ...]
       megatron-rlhf plan search gpus=N [--json] [key=value ...]
       megatron-rlhf plan calibrate FILE ... [--json] [key=value ...]
       megatron-rlhf plan scaling
       megatron-rlhf plan --reshard-only [--json] [key=value ...]

  plan         bytes and seconds of every phase of a PPO run, what it costs, whether it fits and what would
  search       the fastest layouts of policy, generation and critics that fit N GPUs
  calibrate    fit cluster.factors to a third of the measured runs; say how wrong they are on the others
  scaling      docs/scaling.md: what an iteration of the paper costs on 128, 512 and 1,024 H100s
  --reshard-only  what the switch between the policy's two layouts moves, and how long it takes
  --picture    memory by phase and a timeline of one iteration, as PNG or SVG

Settings are those of every verb; without experiment= they are instructgpt_175b's. cluster= is a100, h100, h200 or b200.
FILE is a run's log.jsonl, or a JSON list of runs: [{"settings": [...], "recipe": "ppo", "seconds": {"score": 0.4}}].

Examples:
  megatron-rlhf plan experiment=instructgpt_6b cluster=h100
  megatron-rlhf plan search gpus=1024 cluster=h100
  megatron-rlhf plan layout=128gpu cluster=a100 --picture plan.png
"""
_FACES = ("search", "calibrate", "scaling")
_FLAGS = ("--json", "--reshard-only", "--picture")


def run(words: Sequence[str]) -> str:
    """What the words ask for, as text or JSON. Raises BadInput with one sentence where they ask for nothing."""
    if "--help" in words or "-h" in words:
        return HELP
    face = words[0] if words and words[0] in _FACES else ""
    flags, settings, files, picture = _sorted(words[1:] if face else words)
    if picture and (face or "--reshard-only" in flags):
        raise BadInput("--picture is of a whole plan; write for example plan layout=128gpu --picture plan.png")
    if files and face != "calibrate":
        raise BadInput(f"'{files[0]}' is no setting of plan; write key=value, or one of {', '.join(_FACES)} first")
    if face == "search":
        return _search(settings, json="--json" in flags)
    if face == "calibrate":
        return _calibrate(files, settings, json="--json" in flags)
    if face == "scaling":
        text: str = importlib.import_module("megatron_rlhf.plan.scaling").page()
        return text
    if "--reshard-only" in flags:
        return _reshard(settings, json="--json" in flags)
    return _plan(settings, picture, json="--json" in flags)


def _plan(settings: Sequence[str], picture: str, *, json: bool) -> str:
    config = load("plan", settings)
    world = needed(config.layout)
    check(config, world)
    plan = importlib.import_module("megatron_rlhf.plan.plan").Plan.of(config, world)
    if picture:
        importlib.import_module("megatron_rlhf.plan.picture").draw(plan, Path(picture))
    report = importlib.import_module("megatron_rlhf.plan.report")
    text: str = report.as_json(plan) if json else report.text(plan)
    return text


def _reshard(settings: Sequence[str], *, json: bool) -> str:
    report = importlib.import_module("megatron_rlhf.plan.reshard").reshard(load("plan", settings))
    text: str = report.as_json() if json else report.as_text()
    return text


def _search(settings: Sequence[str], *, json: bool) -> str:
    gpus = [word.removeprefix("gpus=") for word in settings if word.startswith("gpus=")]
    config = load("plan", [word for word in settings if not word.startswith("gpus=")])
    if gpus and not gpus[-1].isdigit():
        raise BadInput(f"gpus={gpus[-1]} is no number of GPUs; write for example gpus=1024")
    wanted = int(gpus[-1]) if gpus else needed(config.layout)
    check(replace(config, layout=Layouts()), 1)  # the layouts are what is searched
    found = importlib.import_module("megatron_rlhf.plan.search").search(config, wanted)
    text: str = found.as_json() if json else found.as_text()
    return text


def _calibrate(files: Sequence[str], settings: Sequence[str], *, json: bool) -> str:
    if not files:
        raise BadInput("plan calibrate needs files of measured runs; write for example plan calibrate runs/a/log.jsonl")
    calibrate = importlib.import_module("megatron_rlhf.plan.calibrate")
    found = calibrate.calibrated(calibrate.read(files, settings), load("plan", settings).cluster)
    text: str = found.as_json() if json else found.as_text()
    return text


def _sorted(words: Sequence[str]) -> tuple[set[str], list[str], list[str], str]:
    """Flags, `key=value` words, other words, and the picture's file."""
    flags: set[str] = set()
    settings: list[str] = []
    files: list[str] = []
    picture = ""
    rest = iter(words)
    for word in rest:
        name, sign, value = word.partition("=")
        if name == "--picture":
            picture = value if sign else next(rest, "")
            if not picture or picture.startswith("-"):
                raise BadInput("--picture names no file; write for example --picture plan.png")
        elif word in _FLAGS:
            flags.add(word)
        elif word.startswith("-"):
            raise BadInput(f"flag '{word}' is unknown; plan has {', '.join(_FLAGS)}, all else is key=value")
        else:
            (settings if sign else files).append(word)
    return flags, settings, files, picture
