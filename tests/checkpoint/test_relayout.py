"""Proves that a state is put back under any layout: the numbers bit for bit, the next steps to 1e-6.

A chain goes from layout to layout; after each change three steps are those of the run that was not changed. Shards are
split and joined again over tensor and pipeline parallelism, virtual stages, replicas, fewer ranks and other paddings of
the vocabulary; tied and replicated tensors are saved once and come back everywhere.

Not proved here: dropout, whose masks depend on the layout; a world of another size (test_world).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_rlhf.algorithms import average
from megatron_rlhf.checkpoint.differences import Terms
from megatron_rlhf.checkpoint.resume import Keeper, Saved
from megatron_rlhf.config.rules import BadInput
from megatron_rlhf.config.schema import Adam, Checkpoint
from megatron_rlhf.models import roles
from megatron_rlhf.recipes import losses
from megatron_rlhf.train.engine import Engine
from tests.helpers import roles as tiny
from tests.helpers.grid import on_grid

CHAIN = ("tp2 pp2", "dp2 @0-1", "tp4", "pp4", "pp2 vp2 dp2", "tp2 dp2 sp order=tp-pp-dp")
KEYS = ("exp_avg", "exp_avg_sq")
Make = Callable[..., Engine]


def sft(words: str, **settings: Any) -> Engine:
    """A policy with an average. Collective: world."""
    return tiny.engine(words, averaged=True, **settings)


def reward(words: str, **settings: Any) -> Engine:
    """A reward model. Collective: world."""
    return tiny.engine(words, roles.scores(), scalar=True, **settings)


def train(engine: Engine, steps: range) -> list[float]:
    """The losses of some steps. Collective: world."""
    found = []
    for number in steps:
        if engine.network.scalar:
            stats = engine.accumulate(tiny.rankings(seed=number), losses.ranking("surviving"))
        else:
            stats = engine.accumulate(tiny.rows(seed=number), losses.language)
        engine.update()
        engine.follow(partial(average.follow, decay=0.9))
        found += [stats[name] for name in stats.sums if name.startswith("loss.")]
    return found


def numbers(engine: Engine) -> dict[str, torch.Tensor]:
    """Main weights, moments and average as full tensors, and every count of steps. Collective: world."""
    held = engine._held()
    found = {}
    for key in ("main", *KEYS) if engine.network.scalar else ("main", *KEYS, "average"):
        local = {shard.where.name: torch.zeros(shard.where.shape) for shard in held}
        for shard in held:
            local[shard.where.name].view(-1)[shard.where.start : shard.where.stop] = shard.piece().values[key]
        found |= {f"{key} {name}": value for name, value in tiny.gathered(engine, local).items()}
    steps = {float(shard.piece().values["step"]) for shard in held}
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, steps)
    return {**found, "step": torch.tensor(sorted(set().union(*gathered)))}


def states(folder: Path, said: list[str] | None = None, words: str = "") -> Keeper:
    """The states in `folder`."""
    return Keeper(folder, Checkpoint(), Terms({}, {"policy": words}, 4), ([] if said is None else said).append)


def loaded(folder: Path) -> Saved:
    """The newest state. Collective: world."""
    found = states(folder).load()
    assert found is not None
    return found


def follow_the_chain(make: Make, words: tuple[str, ...], folder: Path) -> float:
    """The largest relative difference of a loss after a change; numbers are bit-equal at each. Collective: world."""
    before, worst = make(words[0]), 0.0
    train(before, range(3))
    for place, here in enumerate(words[1:], 1):
        step = 3 * place
        states(folder).save(step, {}, {"role": before}, wait=True)
        after = make(here)
        train(after, range(50, 51))
        loaded(folder).fill({"role": after})
        expected = numbers(before)
        assert tiny.equal(numbers(after), expected), f"{words[place - 1]} -> {here}"
        assert after.updates == before.updates and len(expected) > 100
        assert tiny.copies_agree(after.network)
        pairs = zip(train(after, range(step, step + 3)), train(before, range(step, step + 3)), strict=True)
        worst = max(worst, *(abs(a - b) / abs(b) for a, b in pairs))
        before = after
    return worst


@on_grid(4)
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (sft, CHAIN),
        (reward, CHAIN[:3]),
        pytest.param(reward, CHAIN, marks=pytest.mark.slow),
        pytest.param(partial(sft, model=tiny.LLAMA), CHAIN, marks=pytest.mark.slow),
        pytest.param(partial(sft, model=replace(tiny.MODEL, tied=False)), CHAIN, marks=pytest.mark.slow),
        pytest.param(partial(sft, adam=Adam(host=True)), CHAIN, marks=pytest.mark.slow),
    ],
    ids=["sft", "reward short", "reward", "llama", "untied", "host"],
)
def test_losses_do_not_notice_a_change_of_layout(make: Make, words: tuple[str, ...], tmp_path: Path) -> None:
    """Within 1e-6 for three steps after every change; main weights, moments, average and steps bit for bit."""
    assert follow_the_chain(make, words, tmp_path) < 1e-6


@on_grid(4)
def test_two_roles_of_other_layouts_lie_in_one_state(tmp_path: Path) -> None:
    """A policy over the world and a reward model on two ranks come back the other way round."""
    policy, value = sft("tp2 pp2"), reward("pp2 @2-3")
    train(policy, range(3))
    train(value, range(2))
    states(tmp_path).save(1, {}, {"policy": policy, "value": value}, wait=True)
    again = {"policy": sft("pp2 @2-3"), "value": reward("tp4")}
    loaded(tmp_path).fill(again)
    assert tiny.equal(numbers(again["policy"]), numbers(policy))
    assert tiny.equal(numbers(again["value"]), numbers(value))
    assert (again["policy"].updates, again["value"].updates) == (3, 2)
    assert tiny.copies_agree(again["policy"].network) and tiny.copies_agree(again["value"].network)


@on_grid(4)
@pytest.mark.parametrize("tied", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_padding_of_the_vocabulary_may_differ(tied: bool, tmp_path: Path) -> None:
    """128 rows and 100: those of the 100 words are the same in all that Adam keeps, what is behind is 0."""
    model = replace(tiny.MODEL, tied=tied)
    wide = sft("tp2 pp2", model=model)
    train(wide, range(3))
    states(tmp_path).save(3, {}, {"role": wide}, wait=True)
    narrow, again = sft("dp4", model=model, rows=100), sft("tp2 pp2", model=model)
    loaded(tmp_path).fill({"role": narrow})
    states(tmp_path).save(4, {}, {"role": narrow}, wait=True)
    loaded(tmp_path).fill({"role": again})
    expected, there, back = numbers(wide), numbers(narrow), numbers(again)
    for name, tensor in expected.items():
        rows = slice(0, 100) if name.endswith(("word_embeddings.weight", "output_layer.weight")) else slice(None)
        assert there[name].equal(tensor[rows]) and back[name][rows].equal(tensor[rows]), name
        if rows.stop:
            assert len(there[name]) == 100 and not back[name][100:].any()


@on_grid(4)
def test_another_model_is_refused(tmp_path: Path) -> None:
    """A tensor that was not saved, and one of another shape, are one sentence."""
    role = sft("tp2 pp2")
    train(role, range(1))
    states(tmp_path).save(1, {}, {"role": role}, wait=True)
    for model, sentence in (
        (replace(tiny.MODEL, layers=8), r"has no decoder\.layers\.[4-7]\..* of the role"),
        (replace(tiny.MODEL, ffn=64), r"linear_fc1\..* in .* is \(128.*, the model wants \(64"),
    ):
        other = sft("dp4", model=model)
        with pytest.raises(BadInput, match=sentence):
            loaded(tmp_path).fill({"role": other})
    with pytest.raises(BadInput, match="saved without the policy; there are role"):
        loaded(tmp_path).fill({"policy": role})


@on_grid(4)
def test_every_number_is_saved_once(tmp_path: Path) -> None:
    """Over all files each number of each logical tensor is there once: replicas, tied copies and tp copies are not."""
    role = sft("tp2 pp2")
    train(role, range(1))
    states(tmp_path).save(1, {}, {"role": role}, wait=True)
    found = loaded(tmp_path)._roles["role"].index
    entries = role.network.directory
    assert found.keys() == entries.keys()
    for name, entry in found.items():
        covered = sorted((tp_rank, start, stop) for tp_rank, start, stop, _ in entry["pieces"])
        size = torch.Size(entries[name].shard_shape).numel()
        assert sum(stop - start for _, start, stop in covered) == size * len(entries[name].owners), name
        assert len({file for *_, file in entry["pieces"]}) == len(covered)
