"""Proves that roles of different layouts make one PPO-ptx run: the numbers are those of a run whose roles all stand on
one rank, over five iterations on replayed responses.

Not proved here: sampling, which test_layouts compares; a world of more than eight ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from megatron_rlhf.batch import Rollout
from megatron_rlhf.config.schema import Kl, Learning, Ppo
from megatron_rlhf.models import roles
from megatron_rlhf.recipes import losses
from megatron_rlhf.rollout.annotate import annotate
from megatron_rlhf.rollout.credit import credit
from megatron_rlhf.rollout.score import score
from tests.helpers import roles as tiny
from tests.helpers.grid import on_grid

ITERATIONS, EPISODES = 5, 12
LEARNING = Learning(rate=3e-4, epsilon=1e-5)
PPO = Ppo(pretraining_coef=0.5, kl=Kl(coef=0.1), policy=LEARNING, value=LEARNING)


@dataclass(frozen=True)
class Words:
    """A layout a role."""

    policy: str
    value: str
    reward: str
    reference: str


ONE = Words(*[tiny.ONE] * 4)
FOUR = [
    Words("tp2 pp2", "tp1 pp2 dp2", "dp4", "tp4"),
    Words("tp2 pp2 vp2", "tp2 dp2 sp", "tp2 @2-3", "pp2 @0-1"),
    Words("pp2 dp2 @0-3", "dp2 @2-3", "tp1 @1-1", "dp4"),
]
EIGHT = [
    Words("tp2 pp2 dp2 sp", "tp2 pp2 vp2 dp2", "dp8", "tp4 dp2"),
    Words("tp2 pp2 @0-3", "tp1 pp2 dp2 @4-7", "dp4 @4-7", "tp4 @0-3"),
]


def run(words: Words, style: str) -> list[dict[str, float]]:
    """The statistics of every iteration, two minibatches each. Collective: world."""
    model = tiny.STYLES[style]
    settings = {"model": model, "rate": LEARNING.rate, "epsilon": LEARNING.epsilon}
    policy = tiny.engine(words.policy, **settings)
    value = tiny.engine(words.value, roles.values(), scalar=True, **settings)
    reward = tiny.engine(words.reward, roles.scores(), scalar=True, seed=6, **settings)
    reference = tiny.engine(words.reference, seed=7, **settings)
    found = []
    for iteration in range(ITERATIONS):
        rows = tiny.rows(EPISODES, seed=iteration)
        ended_B = (torch.arange(EPISODES) % 3 > 0).long()
        replayed = Rollout(rows, torch.zeros(EPISODES, rows.width), ended_B, torch.zeros(EPISODES))
        experience = credit(annotate(score(replayed, reward, PPO), policy, reference, value), PPO, kl_coef=PPO.kl.coef)
        rewards, scores_B = experience.rewards_BR.double().sum(), experience.annotated.rollout.scores_B
        stats = {"reward": float(rewards), "score": float(scores_B.double().sum())}
        for number, minibatch in enumerate(experience.minibatches(EPISODES // 2, 1, iteration)):
            learned = value.accumulate(minibatch, losses.value(PPO.value_clip))
            stats[f"{number} value norm"] = value.update()["grad_norm"]
            learned += policy.accumulate(minibatch, losses.policy(PPO.clip))
            learned += policy.accumulate(tiny.text(6, seed=iteration), losses.language, PPO.pretraining_coef)
            stats[f"{number} policy norm"] = policy.update()["grad_norm"]
            stats |= {f"{number} {name}": learned[name] for name in ("loss.policy", "loss.value", "loss.language")}
        found.append(stats)
    return found


def compare(layouts: list[Words], style: str) -> None:
    """Each choice of layouts gives the statistics of one rank. Collective: world."""
    expected = run(ONE, style)
    assert abs(expected[0]["score"] - expected[-1]["score"]) > 1e-3
    for words in layouts:
        for iteration, (ours, theirs) in enumerate(zip(run(words, style), expected, strict=True)):
            assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-6), (words, iteration)


@on_grid(4)
@pytest.mark.parametrize("style", tiny.STYLES)
def test_roles_of_different_layouts_learn_together(style: str) -> None:
    """Policy, value, reward and reference each under words of its own."""
    compare(FOUR[:1], style)


@pytest.mark.slow
@on_grid(4)
@pytest.mark.parametrize("style", tiny.STYLES)
def test_roles_on_ranges_of_ranks(style: str) -> None:
    """Virtual stages, sequence parallelism, and roles on some of the ranks."""
    compare(FOUR[1:], style)


@pytest.mark.slow
@on_grid(8, timeout=600)
@pytest.mark.parametrize("style", tiny.STYLES)
def test_roles_of_different_layouts_on_eight_ranks(style: str) -> None:
    """Colocated, and on two disjoint halves of the world."""
    compare(EIGHT, style)
