"""Proves that every YAML file under configs/ composes into a Config that passes the rules.

Not proved here: that a run under it fits into memory or learns anything.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from megatron_rlhf.config.load import choices, digest, directory, load, resolved
from megatron_rlhf.config.rules import check
from megatron_rlhf.config.schema import Config
from megatron_rlhf.config.world import needed

RECIPES = choices(".")
EXPERIMENTS = choices("experiment")


def test_every_file_is_a_recipe_or_in_a_known_group() -> None:
    files = {file.relative_to(directory()) for file in directory().rglob("*") if file.is_file()}
    assert {file.suffix for file in files} == {".yaml"}
    assert {file.parts[0] for file in files if len(file.parts) > 1} == {"model", "layout", "experiment"}
    assert {Path(f"{recipe}.yaml") for recipe in RECIPES} == {file for file in files if len(file.parts) == 1}


@pytest.mark.parametrize("experiment", EXPERIMENTS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_and_experiment(recipe: str, experiment: str) -> None:
    config = load(recipe, [f"experiment={experiment}"])
    check(config, needed(config.layout))
    assert config == load("ppo", [f"experiment={experiment}"]), "a recipe changes none of the experiment's numbers"


@pytest.mark.parametrize("model", choices("model"))
def test_model(model: str) -> None:
    base = ["experiment=quickstart", "layout=cpu1"]
    both = load("sft", [*base, f"model={model}", f"model@reward_model={model}"])
    check(both, 1)
    assert both.model == both.reward_model
    assert both == load("sft", [*base, f"model@model={model}", f"model@reward_model={model}"])


@pytest.mark.parametrize("layout", choices("layout"))
def test_layout(layout: str) -> None:
    config = load("sft", ["experiment=quickstart", f"layout={layout}"])
    check(config, needed(config.layout))
    given = {"cpu1": 1, "cpu4": 4, "8gpu": 8}
    assert needed(config.layout) == given[layout]


def test_quickstart_trains_and_generates_under_different_layouts() -> None:
    layout = load("quickstart").layout
    assert (layout.policy, layout.generate) == ("tp2 pp2 dp1", "tp2 pp1 dp2")
    assert layout.policy == layout.reference == layout.value == layout.reward


def test_instructgpt_keeps_the_papers_numbers() -> None:
    """Section 3.5 and appendix C of arXiv 2203.02155; what the paper prints, and nothing that is open."""
    run = load("ppo", ["experiment=instructgpt_1b3"])
    model = run.model
    assert (model.layers, model.hidden, model.vocabulary, model.context) == (24, 2048, 50257, 2048)
    assert (run.reward_model.layers, run.reward_model.hidden) == (32, 4096)
    assert (run.data.max_prompt_tokens, run.sampling.max_tokens, run.data.prompts_per_user) == (1024, 1024, 200)
    assert (run.adam.beta1, run.adam.beta2) == (0.9, 0.95)
    sft, start = run.sft, run.rl_start
    assert (sft.epochs, sft.batch, sft.dropout, sft.learning.rate) == (16, 32, 0.2, 9.65e-6)
    assert (sft.learning.schedule, sft.learning.final, sft.learning.warmup) == ("cosine", 0.1, 0)
    assert (start.epochs, start.batch, start.pretraining_fraction, start.learning.rate) == (2, 32, 0.1, 5e-6)
    assert (run.rank.responses_min, run.rank.responses_max) == (4, 9)
    assert (run.reward.epochs, run.reward.batch, run.reward.learning.rate) == (1, 64, 9e-6)
    ppo = run.ppo
    assert ppo.iterations * ppo.episodes == 256_000
    assert (ppo.episodes // ppo.minibatches, ppo.epochs, ppo.clip, ppo.gamma) == (64, 1, 0.2, 1.0)
    assert (ppo.kl.coef, ppo.kl.adaptive, ppo.pretraining_coef, ppo.pretraining_ratio) == (0.02, False, 27.8, 8)
    assert (ppo.average_decay, ppo.value.rate, run.sampling.temperature) == (0.992, 9e-6, 1.0)
    for learning in (ppo.policy, ppo.value):
        assert learning.schedule == "constant"
    assert (ppo.policy.warmup, ppo.policy.warmup_start) == (10, 0.1)
    assert ppo.policy.rate <= 8.05e-6


def test_resolved_holds_every_setting_and_digest_all_but_the_folder() -> None:
    config = load("quickstart")
    assert set(resolved(config)) == {item.name for item in dataclasses.fields(Config)}
    assert resolved(config)["ppo"]["kl"]["coef"] == 0.05
    assert digest(config) == digest(load("quickstart", ["out=/elsewhere"])) == digest(load("quickstart"))
    assert digest(config) != digest(load("quickstart", ["ppo.lam=0.9"]))
    assert len(digest(config)) == 64
