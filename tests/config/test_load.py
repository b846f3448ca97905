"""Proves what a `key=value` word does, and the sentence each wrong one gets: the key, the nearest, a value that works.

Not proved here: sweeps.
"""

from __future__ import annotations

import dataclasses

import pytest

from megatron_rlhf.config.load import build, load
from megatron_rlhf.config.rules import BadInput
from megatron_rlhf.config.schema import Kl, Learning, Ppo

SFT = "experiment=quickstart"


def test_settings_reach_the_config() -> None:
    config = load("ppo", [SFT, "ppo.kl.coef=0.2", "ppo.kl.adaptive=true", "seed=7", "ppo.lam=1", "model.tied=False"])
    assert (config.ppo.kl.coef, config.ppo.kl.adaptive, config.seed, config.model.tied) == (0.2, True, 7, False)
    assert config.ppo.lam == 1.0
    assert type(config.ppo.lam) is float
    assert config.ppo.kl.target == 6.0, "a neighbour of an overridden setting keeps its default"


@pytest.mark.parametrize(
    "text", ["tp2 pp2", "tp2 @0-3 order=tp-pp-dp", "a(b),c: {d}", "123", "null", "/tmp/it's here", "a\\b", ""]
)
def test_text_is_taken_as_typed(text: str) -> None:
    config = load("sft", [SFT, f"layout.policy={text}", f"out={text}"])
    assert config.layout.policy == text
    assert config.out == text


def test_groups_are_chosen_and_settings_win_over_them() -> None:
    config = load("sft", ["model.layers=6", SFT, "layout=cpu1", "model=gpt_125m", "model@reward_model=gpt_6b"])
    assert (config.model.layers, config.model.hidden, config.reward_model.hidden) == (6, 768, 4096)
    assert config.layout.policy == "tp1"


def test_a_config_is_frozen() -> None:
    config = load("quickstart")
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.ppo.lam = 0.5  # type: ignore[misc]


@pytest.mark.parametrize(
    ("recipe", "words", "sentence"),
    [
        ("ppo", [SFT, "ppo.kl.coeff=1"], "setting 'ppo.kl.coeff' is unknown; the nearest is 'ppo.kl.coef'"),
        ("ppo", [SFT, "pppo.lam=1"], "setting 'pppo.lam' is unknown; the nearest is 'ppo.lam'"),
        ("ppo", [SFT, "lam=1"], "setting 'lam' is unknown; the nearest is 'ppo.lam'"),
        ("ppo", [SFT, "actor.clip=1"], "setting 'actor.clip' is unknown; the nearest is 'adam.clip'"),
        ("ppo", [SFT, "+x=1"], "setting '+x' is unknown"),
        ("ppo", [SFT, "ppo"], "'ppo' is no setting; write key=value, for example ppo.iterations=20"),
        ("ppo", [SFT, "=3"], "'=3' is no setting"),
        ("ppo", [SFT, "ppo.iterations=2.5"], "'ppo.iterations' is 2.5, it must be a whole number"),
        ("ppo", [SFT, "ppo.iterations=many"], "'ppo.iterations' is 'many', it must be a whole number, for example "),
        ("ppo", [SFT, "ppo.iterations=1,2"], "ppo: "),
        ("ppo", [SFT, "ppo.iterations="], "'ppo.iterations' is ''"),
        ("ppo", [SFT, "ppo.lam=high"], "'ppo.lam' is 'high', it must be a number, for example ppo.lam=0.95"),
        ("ppo", [SFT, "ppo.lam=true"], "'ppo.lam' is True, it must be a number"),
        ("ppo", [SFT, "ppo.iterations=true"], "'ppo.iterations' is True, it must be a whole number"),
        ("ppo", [SFT, "ppo.evaluate_average=1"], "'ppo.evaluate_average' is 1, it must be true or false, for example "),
        ("ppo", [SFT, "ppo.kl=3"], "'ppo.kl' is 3, it must be a group of settings, for example ppo.kl.coef=0.1"),
        ("ppo", [SFT, "ppo.iterations=((("], "ppo: "),
        ("ppo", [SFT, "ppo.lam=???"], "'ppo.lam' is missing; write for example ppo.lam=0.95"),
        ("ppo", [SFT, "layout=cpu5"], "layout=cpu5 is unknown; the nearest is layout=cpu"),
        ("ppo", [SFT, "model@reward_model=gpt_6"], "the nearest is model@reward_model=gpt_6b"),
        (
            "ppo",
            ["experiment=quikstart"],
            "the nearest is experiment=quickstart (there are instructgpt_175b, ",
        ),
        (
            "ppo",
            [],
            "ppo needs an experiment; write ppo experiment=quickstart (there are instructgpt_175b, ",
        ),
        ("poo", [], "recipe 'poo' is unknown; there are evaluate, p"),
    ],
)
def test_a_wrong_word_gets_one_sentence(recipe: str, words: list[str], sentence: str) -> None:
    with pytest.raises(BadInput) as caught:
        load(recipe, words)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_value_is_named_in_full() -> None:
    with pytest.raises(BadInput, match=r"'ppo\.policy\.rate' is missing; write for example ppo\.policy\.rate=0\.1"):
        build(Ppo, {"value": {"rate": 1e-5}}, "ppo")


def test_an_unknown_key_of_a_file_is_named_in_full() -> None:
    with pytest.raises(BadInput, match=r"setting 'ppo\.kl\.beta' is unknown"):
        build(Ppo, {"kl": {"beta": 1}, "policy": {"rate": 1.0}, "value": {"rate": 1.0}}, "ppo")


def test_a_section_left_out_takes_its_defaults() -> None:
    ppo = build(Ppo, {"policy": {"rate": 1}, "value": {"rate": 2.0}}, "ppo")
    assert ppo == Ppo(policy=Learning(rate=1.0), value=Learning(rate=2.0), kl=Kl())
