"""Proves `plan search`: what it returns fits with its margin, is the fastest of all that do where all can be tried, and
on 64 GPUs names the host's optimizer and what is in the way without it.

Not proved here: that the seconds and bytes are those of a run (tests/plan/test_published.py, test_memory.py).
"""

from __future__ import annotations

import itertools
import json
import math
import time
from dataclasses import replace

import pytest

from megatron_rlhf import cli
from megatron_rlhf.config.load import load
from megatron_rlhf.config.rules import check
from megatron_rlhf.plan import memory
from megatron_rlhf.plan.plan import Plan
from megatron_rlhf.plan.scaling import searched
from megatron_rlhf.plan.search import MARGIN, _joined, _Search, search, words


def test_it_is_quick() -> None:
    """30 s on one core are allowed for 1,024 GPUs; 2 to 4 s of processor time are taken."""
    searched.cache_clear()
    begun = time.process_time()
    searched(1024)
    assert time.process_time() - begun < 30


@pytest.mark.parametrize("gpus", [pytest.param(128, marks=pytest.mark.slow), 1024])
def test_what_is_found_for_175b_and_6b_fits(gpus: int) -> None:
    """80 GB a GPU; each with another layout of the policy, the fastest first, as settings that a run takes."""
    found = searched(gpus)
    assert not found.on_host
    assert len(found.plans) == 3
    assert len({plan.config.layout.policy for plan in found.plans}) == 3
    assert [plan.bill.seconds for plan in found.plans] == sorted(plan.bill.seconds for plan in found.plans)
    for plan in found.plans:
        check(plan.config, gpus, "ppo")
        assert max(phase.total for phase in plan.memory) <= (1 - MARGIN) * plan.capacity
        lines = words(plan.config)
        chosen = [word.strip("'") for line in lines for word in ([line] if "'" in line else line.split())]
        again = Plan.of(load("plan", ["cluster=h100", *chosen]), gpus)
        assert again.bill == plan.bill


@pytest.mark.parametrize("gpus", [pytest.param(128, marks=pytest.mark.slow), 1024])
def test_it_beats_the_layout_file(gpus: int) -> None:
    """That was made by hand."""
    config = load("plan", [f"layout={gpus}gpu", "cluster=h100"])
    assert searched(gpus).plans[0].bill.seconds < Plan.of(config, gpus).bill.seconds


@pytest.mark.slow
def test_64_gpus_need_the_optimizer_on_the_host() -> None:
    """And why tp8 pp8 dp1 without it does not do: the optimizer alone takes half of what there is."""
    found = searched(64)
    assert found.on_host
    assert all(plan.config.adam.host and plan.fits for plan in found.plans)
    assert "the leanest is 'tp8 pp8 dp1 sp' with full recomputation" in found.obstacle
    assert "policy optimizer 33.9" in found.obstacle
    shown = " ".join(found.as_text().split())
    assert "Only with the optimizer in host memory (adam.host=true). Without it the leanest is 'tp8 pp8" in shown
    assert max(len(line) for line in found.as_text().splitlines()) <= 120


@pytest.mark.parametrize(("gpus", "gigabytes"), [(2, 24), (4, 18), (4, 22), (8, 16)])
def test_nothing_faster_was_left_out(gpus: int, gigabytes: int) -> None:
    """Of small models every combination is tried, the fastest first: the first that fits is the one found."""
    given = ["model=gpt_1b3", "model@reward_model=gpt_125m", "ppo.episodes=8", "ppo.minibatches=2"]
    config = load("plan", ["cluster=h100", f"cluster.memory={gigabytes}e9", *given])
    run = _Search(config, gpus)
    limit = (1 - MARGIN) * memory.capacity(config)
    by_seconds = sorted(
        (
            (train.seconds + generate.seconds + critic.seconds, train, generate, critic)
            for train, generate, critic in itertools.product(run.training, run.generating, run.critics)
        ),
        key=lambda item: item[0],
    )
    joined = (_joined(train.config, generate.config, critic.config) for _, train, generate, critic in by_seconds)
    number, wanted = next((n, each) for n, each in enumerate(joined) if memory.fullest(each, gpus).total <= limit)
    assert search(config, gpus, most=1).plans[0].config == wanted
    assert number > 80, "the memory is so large that there is nothing to search"


def test_what_is_remembered_of_bytes_is_true() -> None:
    """Of settings looked at one after the other, those two phases that a search looks at, as a plan has them."""
    config = load("plan", ["layout=8gpu", "model=gpt_1b3", "model@reward_model=gpt_1b3"])
    run = _Search(config, 8)
    run.limit = math.inf
    for word in ("compute.micro_batch=8", "compute.micro_batch=1", "compute.recompute=full", "sampling.batch=64"):
        at = load("plan", ["layout=8gpu", "model=gpt_1b3", "model@reward_model=gpt_1b3", word])
        two = [phase.total for phase in memory.phases(at, 8) if phase.name in ("train policy", "generate")]
        assert run._bytes(at) == max(two), word


def test_weights_in_place_of_the_policys_need_no_room() -> None:
    """Where nothing else fits beside the policy, it may still generate as it lies."""
    run = _Search(load("plan", ["model=gpt_1b3", "model@reward_model=gpt_1b3"]), 8)
    train = next(choice.config for choice in run.training if choice.config.layout.policy == "tp2 pp1 dp4 sp")
    slow = replace(train, compute=replace(train.compute, micro_batch=1, recompute="full"))
    run.limit = run._floor(slow) + 1e6
    layouts = {generate.config.layout.generate for _, generate, _ in run._pairs(train)}
    assert "tp2 pp1 dp4" in layouts
    assert "tp1 pp1 dp8" not in layouts


def test_a_model_that_fits_nowhere() -> None:
    found = search(load("plan", ["cluster.memory=2e9"]), 8)
    assert not found.plans
    assert found.as_text().startswith("Nothing fits on 8 GPUs, not with the optimizer in host memory either. Without")


def test_gpus_that_no_layout_divides() -> None:
    """Seven GPUs and 96 layers: dp7 alone is left, and does not fit."""
    found = search(load("plan", ["cluster=h100"]), 7)
    assert not found.plans
    assert "'tp1 pp1 dp7'" in found.obstacle


def test_the_verb(capsys: pytest.CaptureFixture[str]) -> None:
    small = ["model=gpt_1b3", "model@reward_model=gpt_1b3", "cluster=a100", "gpus=8"]
    assert cli.main(["plan", "search", *small]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("8 GPUs: the fastest that fit of ")
    assert lines[2].split() == [*("s/iteration", "MFU", "GB", "policy", "|", "generate", "|", "value", "and", "reward")]
    assert cli.main(["plan", "search", "--json", *small]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["layouts"][0]["bill"]["seconds"] > 0
    assert found["layouts"][0]["bytes"] < 80e9


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (["gpus=many"], "gpus=many is no number of GPUs; write for example gpus=1024"),
        (["gpus=0"], "gpus=0; a search needs at least one"),
        (["gpu=8"], "setting 'gpu' is unknown"),
        (["128"], "'128' is no setting of plan; write key=value"),
    ],
)
def test_bad_words_are_refused(given: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "search", *given]) == 2
    assert sentence in capsys.readouterr().err


def test_settings_that_stay() -> None:
    """What is asked for besides layouts, rows and recomputation is kept."""
    kept = ["reshard.share_reference=true", "adam.host=true"]
    config = load("plan", ["model=gpt_1b3", "model@reward_model=gpt_1b3", *kept])
    best = search(config, 8, most=1)
    assert not best.on_host
    found = best.plans[0].config
    assert found.reshard.share_reference
    assert found.adam.host
    assert replace(found, layout=config.layout, compute=config.compute, sampling=config.sampling) == config
