"""Proves that the layout changes no gradient: each tensor after one step against one rank; and that a process group
left out is an error and not another number.

A model's gradients may differ by 1.5e-6 of its largest one, the rounding of sums in another order; losses by 1e-6.

Not proved here: several steps (test_layouts); gradients of 16-bit weights.
"""

from __future__ import annotations

from copy import copy
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
from torch import Tensor

from megatron_rlhf.config.layout import Layout
from megatron_rlhf.models import roles, transformer
from megatron_rlhf.parallel import grid
from megatron_rlhf.parallel.collectives import any_rank
from megatron_rlhf.recipes import losses
from megatron_rlhf.train.engine import Engine
from tests.helpers import roles as tiny
from tests.helpers.grid import on_grid

QUICK = ["tp2 pp2", "tp2 pp2 vp2", "tp2 dp2 sp"]
FOUR = [*QUICK, "tp4", "pp4", "dp4", "pp2 dp2", "pp2 dp2 vp2"]
EIGHT = ["tp2 pp2 dp2 sp", "tp2 pp2 vp2 dp2"]
WORDS = 2048
SIZES: dict[str, Any] = {"hidden": 128, "vocabulary": WORDS, "init_std": 0.02}
STYLES = {name: replace(model, **SIZES) for name, model in (tiny.STYLES | tiny.RELATIVES).items()}
# Without learned positions beside them, its first LayerNorm widens embeddings of 0.02 so much that one rank's own
# float32 gradients are 1.3e-6 of the largest away from float64's.
STYLES["neox"] = replace(STYLES["neox"], init_std=0.04)
NEAR = 1.5e-6


def language(words: str, style: str) -> tuple[float, dict[str, Tensor]]:
    """Loss and full gradients of SFT. Collective: world."""
    role = tiny.engine(words, model=STYLES[style], rows=WORDS)
    stats = role.accumulate(tiny.rows(32, longest=32, vocabulary=WORDS), losses.language)
    return stats["loss.language"], tiny.step(role)[1]


def reward(words: str, style: str) -> tuple[float, dict[str, Tensor]]:
    """Loss and full gradients of the reward model. Collective: world."""
    role = tiny.engine(words, roles.scores(), model=STYLES[style], rows=WORDS, scalar=True)
    stats = role.accumulate(tiny.rankings(12), losses.ranking("surviving"))
    return stats["loss.reward"], tiny.step(role)[1]


def value(words: str, style: str) -> tuple[float, dict[str, Tensor]]:
    """Loss and full gradients of the value model. Collective: world."""
    role = tiny.engine(words, roles.values(), model=STYLES[style], rows=WORDS, scalar=True)
    stats = role.accumulate(tiny.experience(count=24), losses.value(0.2))
    return stats["loss.value"], tiny.step(role)[1]


def ppo_ptx(words: str, style: str) -> tuple[float, dict[str, Tensor]]:
    """Loss and full gradients of the policy with the pretraining mix. Collective: world."""
    role = tiny.engine(words, model=STYLES[style], rows=WORDS)
    experience = tiny.experience(role.forward, count=24)
    stats = role.accumulate(experience, losses.policy(0.2)) + role.accumulate(tiny.text(16), losses.language, 0.5)
    return stats["loss.policy"] + stats["loss.language"], tiny.step(role)[1]


KINDS = {"sft": language, "reward": reward, "value": value, "ppo-ptx": ppo_ptx}


def compare(kind: str, style: str, layouts: list[str]) -> None:
    """One step of every layout is that of one rank. Collective: world."""
    loss, gradients = KINDS[kind](tiny.ONE, style)
    largest = max(float(gradient.abs().max()) for gradient in gradients.values())
    assert largest > 1e-3
    for words in layouts:
        found, theirs = KINDS[kind](words, style)
        assert abs(found - loss) <= 1e-6, words
        assert theirs.keys() == gradients.keys()
        worst = max((float((theirs[name] - gradients[name]).abs().max()), name) for name in gradients)
        assert worst[0] <= NEAR * largest, (words, worst, largest)


@on_grid(4)
@pytest.mark.parametrize(("kind", "style"), [*product(KINDS, tiny.STYLES), ("sft", "qwen2"), ("sft", "neox")], ids=str)
def test_gradients_are_the_same(kind: str, style: str) -> None:
    """Every tensor of every role, gpt and llama; of SFT those of their relatives too."""
    compare(kind, style, QUICK)


@pytest.mark.slow
@on_grid(4)
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_the_same_in_every_layout(kind: str, style: str) -> None:
    """All layouts of four ranks."""
    compare(kind, style, FOUR)


@pytest.mark.slow
@on_grid(8, timeout=600)
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_the_same_on_eight_ranks(kind: str, style: str) -> None:
    """Every axis at once."""
    compare(kind, style, EIGHT)


@on_grid(4)
@pytest.mark.parametrize("forgotten", ["tp", "pp", "dp_cp", "cp", "embd"])
def test_a_forgotten_group_is_an_error(forgotten: str) -> None:
    """A role whose collection lacks a group cannot take a step: nothing falls back on another layout's group."""
    built = grid.build(Layout.parse("tp2 pp2", 4))
    groups = copy(built.groups)
    delattr(groups, forgotten)
    failed = False
    try:
        holed = transformer.build(tiny.MODEL, replace(built, groups=groups), rows=tiny.PADDED, seed=5)
        role: Engine = tiny.learner(holed)
        role.accumulate(tiny.rows(), losses.language)
        role.update()
    except (AttributeError, AssertionError, TypeError, ValueError):
        failed = True
    assert failed
    assert not any_rank(not failed)
