"""Proves which points a sweep's words make, that every sweep of configs/scaling composes and passes the rules with its
experiment at the sizes it names, and that parts handed to Hydra are products again.

Not proved here: Hydra's run of them (tests/test_sweep.py).
"""

from __future__ import annotations

import itertools

import pytest

from megatron_rlhf.config import multirun
from megatron_rlhf.config.load import choices, hydra_words, load
from megatron_rlhf.config.multirun import Point, points, together
from megatron_rlhf.config.rules import BadInput, check
from megatron_rlhf.config.world import needed

EXPERIMENTS = {"laptop": "quickstart", "1b3": "instructgpt_1b3", "6b": "instructgpt_6b", "175b": "instructgpt_175b"}


def test_points_are_the_product_in_hydras_order() -> None:
    made = points(
        ["experiment=quickstart", "seed=1,2", "ppo.policy.rate=choice(1e-5,2e-5)", "layout.policy=tp2 pp2 @0-3"]
    )
    assert [point.words for point in made] == [
        ("experiment=quickstart", f"seed={seed}", f"ppo.policy.rate={rate}", "layout.policy=tp2 pp2 @0-3")
        for seed, rate in itertools.product((1, 2), ("1e-05", "2e-05"))
    ]


def test_a_quoted_comma_is_no_sweep() -> None:
    (point,) = points(["checkpoint.allow='ppo.clip,adam.clip'"])
    assert point.words == ("checkpoint.allow=ppo.clip,adam.clip",)
    both = points(["layout.policy='tp2 pp1','tp1 pp2'"])
    assert [point.words for point in both] == [("layout.policy=tp2 pp1",), ("layout.policy=tp1 pp2",)]


def test_a_sweeps_name_is_all_its_files_and_a_choice_is_one() -> None:
    names = choices("scaling/laptop_strong")
    assert len(names) >= 4
    for word in ("scaling=laptop_strong", "+scaling=laptop_strong"):
        assert [p.words[0] for p in points([word])] == [f"scaling=laptop_strong/{name}" for name in names]
    assert points(["scaling=laptop_weak/1"])[0].words == ("scaling=laptop_weak/1",)


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("scaling=laptop", "scaling=laptop is unknown; there are .*laptop_strong"),
        ("seed=interval(1,4)", "is an interval; a sweep needs its values, for example seed=1,2"),
        ("seed=range(1", "'seed=range\\(1' is no list of values .* write for example seed=1,2"),
    ],
)
def test_a_wrong_word_is_a_sentence(word: str, sentence: str) -> None:
    with pytest.raises(BadInput, match=sentence):
        points([word])


@pytest.mark.parametrize("sweep", multirun.sweeps())
def test_every_sweep_composes_at_its_sizes(sweep: str) -> None:
    experiment = EXPERIMENTS[sweep.partition("_")[0]]
    loads = []
    for point in points([f"experiment={experiment}", f"scaling={sweep}"]):
        config = load("ppo", point.words)
        world = needed(config.layout)
        assert world == int("".join(filter(str.isdigit, point.words[1].partition("/")[2])))
        check(config, world, "ppo")
        loads.append(config.ppo.episodes / (world if sweep.endswith("weak") else 1))
        assert sorted(hydra_words(point.words[1])) == [f"+{point.words[1]}"]
    assert len(loads) >= 3 and len(set(loads)) == 1, "what a curve holds equal is equal"


def test_parts_are_products() -> None:
    grid = [Point((f"a={a}", f"b={b}")) for a, b in itertools.product("xy", "12")]
    assert together(grid) == [[0, 1, 2, 3]]
    assert together(grid[:3]) == [[0], [1], [2]]
    assert together(grid[:1]) == [[0]]
