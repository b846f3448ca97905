"""Proves that every YAML file under configs/ composes into a Config that passes the rules.

Not proved here: that a run under it fits into memory or learns anything.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from megatron_rlhf.config.load import choices, directory, flat, load, resolved
from megatron_rlhf.config.rules import check
from megatron_rlhf.config.schema import Config
from megatron_rlhf.config.world import needed

RECIPES = choices(".")
EXPERIMENTS = choices("experiment")


def test_every_file_is_a_recipe_or_in_a_known_group() -> None:
    files = {file.relative_to(directory()) for file in directory().rglob("*") if file.is_file()}
    assert {file.suffix for file in files} == {".yaml"}
    groups = {"model", "layout", "experiment", "cluster", "slurm", "scaling", "hydra"}
    assert {file.parts[0] for file in files if len(file.parts) > 1} == groups
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
    ranks, experiment = {
        "cpu1": (1, "quickstart"),
        "cpu4": (4, "quickstart"),
        "8gpu": (8, "instructgpt_1b3"),
        "64gpu": (64, "instructgpt_6b"),
        "128gpu": (128, "instructgpt_175b"),
        "1024gpu": (1024, "instructgpt_175b"),
    }[layout]
    config = load("sft", [f"experiment={experiment}", f"layout={layout}"])
    check(config, ranks)
    assert needed(config.layout) == ranks


def test_quickstart_trains_and_generates_under_different_layouts() -> None:
    layout = load("quickstart").layout
    assert (layout.policy, layout.generate) == ("tp2 pp2 dp1", "tp2 pp1 dp2")
    assert layout.policy == layout.reference == layout.value == layout.reward


def test_resolved_holds_every_setting_and_flat_all_but_the_folder() -> None:
    config = load("quickstart")
    assert set(resolved(config)) == {item.name for item in dataclasses.fields(Config)}
    assert resolved(config)["ppo"]["kl"]["coef"] == 0.05
    other = flat(load("quickstart", ["ppo.lam=0.9"]))
    assert {key for key, value in flat(config).items() if other[key] != value} == {"ppo.lam"}
    assert flat(config)["ppo.kl.coef"] == config.ppo.kl.coef
