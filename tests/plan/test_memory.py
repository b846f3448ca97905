"""Proves the memory half of a plan against what others say: the published table of a 175B policy with a 6B value and
reward model, the reshard's own plan, the generate phase's own room, Korthikanti's formula; and the advice it gives.

Not proved here: that a process holds these bytes, nor the stated constants of phase.py.
"""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace

import pytest

from megatron_rlhf.config.layout import Layout
from megatron_rlhf.config.load import load
from megatron_rlhf.config.rules import BadInput
from megatron_rlhf.config.schema import Config, Model
from megatron_rlhf.generate import room
from megatron_rlhf.models import vocabulary
from megatron_rlhf.plan import activations, memory, parameters, residents
from megatron_rlhf.plan.activations import Pass
from megatron_rlhf.plan.phase import Phase, cache_bytes, step_bytes
from megatron_rlhf.reshard.layout import shard_shape, specs
from megatron_rlhf.reshard.plan import plan
from megatron_rlhf.reshard.shares import row_bytes

GB = 1e9
CTX = 6.0
"""What the table sets aside for CUDA, NCCL and fragmentation, in GB."""


def run(policy: str, generate: str, *words: str, value: str = "tp8 pp1", model: str = "gpt_175b_untied") -> Config:
    """The paper's 175B run under these layouts."""
    roles = {"policy": policy, "reference": policy, "pretrain": policy, "generate": generate}
    layouts = [f"layout.{role}={word}" for role, word in {**roles, "value": value, "reward": value}.items()]
    return load("ppo", ["experiment=instructgpt_175b", f"model@model={model}", *layouts, *words])


def phase(config: Config, world: int, name: str) -> Phase:
    """One phase of PPO."""
    return next(each for each in memory.phases(config, world) if each.name == name)


# world, policy, w, g32, opt, act, ref, (value's w, g, o), reward, train total, {generate: (copy, free, ..., ...)}
TABLE = [
    (1024, "tp8 pp16 dp8 sp", 2.9, 5.9, 2.2, 10.3, 2.9, (1.7, 3.4, 0.1), 1.7, 36.9,
     {"tp8 pp4": (11.1, 42, 51, 54), "tp8 pp1": (43.7, 9.6, 19, 21), "tp16 pp1": (21.9, 31, 41, 43)}),
    (1024, "tp8 pp8 dp16 sp", 5.6, 11.3, 2.1, 10.3, 5.6, (1.7, 3.4, 0.1), 1.7, 47.7,
     {"tp8 pp4": (11.1, 31, 46, 48), "tp8 pp1": (43.7, -1, 13.5, 16)}),
    (128, "tp8 pp16 dp1 sp", 2.9, 5.9, 17.6, 10.3, 2.9, (1.7, 3.4, 0.6), 1.7, 52.9,
     {"tp8 pp4": (11.1, 26, 35, 54), "tp8 pp1": (43.7, -6, 3, 21)}),
    (64, "tp8 pp8 dp1 sp", 5.6, 11.3, 33.9, 10.3, 5.6, (1.7, 3.4, 1.3), 1.7, 80.7,
     {"tp8 pp4": (11.1, -1.5, 13, 48)}),
]  # fmt: skip


@pytest.mark.parametrize("row", TABLE, ids=lambda row: f"{row[0]}-{row[1]}".replace(" ", ""))
def test_the_table_of_a_175b_run(row: tuple) -> None:
    """Within 5 %, or what the table's own rounding hides; the average is a column of ours, and so is no part of it."""
    world, words, w, g, o, act, ref, value, reward, total, copies = row
    for words_generate, (copy, *free) in copies.items():
        config = run(words, words_generate)
        causes = {cause: size / GB for cause, size in phase(config, world, "train policy").causes.items()}
        named = ("policy weights", "policy gradients", "policy optimizer", "reference weights", "reward weights")
        for cause, printed in zip(named, (w, g, o, ref, reward), strict=True):
            assert near(causes[cause], printed), (cause, causes[cause], printed)
        for cause, printed in zip(("weights", "gradients", "optimizer"), value, strict=True):
            assert near(causes[f"value {cause}"], printed), cause
        # of the stage that holds most activations; the last one has logits besides
        assert near(causes["activations"] + causes.get("logits", 0), act), causes["activations"]
        apart = ("policy average", "generate weights", "communication", "gather buffer", "context", "staging")
        resident = {cause: size for cause, size in causes.items() if cause not in apart}
        assert near(sum(resident.values()) + CTX, total)
        role = residents.ppo(config, world)["generate"]
        whole = max(role.weights(stage) for stage in range(role.layout.pp)) / GB
        assert near(whole, copy)
        asleep = sum(resident.values()) - causes["activations"] - causes.get("logits", 0)
        gradients = causes["policy gradients"] + causes["value gradients"]
        states = gradients + causes["policy optimizer"] + causes["value optimizer"]
        for freed, printed in zip((0.0, gradients, states), free, strict=True):
            assert near(80 - CTX - asleep - whole + freed, printed, rounding=0.6), (words_generate, freed)
        assert causes["policy average"] == pytest.approx(causes["policy optimizer"] / 3)


def near(ours: float, printed: float, rounding: float = 0.05) -> bool:
    """Within 5 %, or the printed digits."""
    return abs(ours - printed) <= max(0.05 * abs(printed), rounding)


def test_it_starts_without_torch_in_a_second() -> None:
    code = (
        "import sys, time; from megatron_rlhf.config.load import load; from megatron_rlhf.plan import memory; "
        "config = load('ppo', ['experiment=instructgpt_175b']); begun = time.process_time(); "
        "assert memory.fits(config, 1024); assert time.process_time() - begun < 1.0; "
        "assert not {'torch', 'megatron'} & set(sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_parameters_are_those_of_the_tensors() -> None:
    """GPT-3's 175 B, and every stage of a layout with virtual stages, tied, scalar and llama."""
    gpt3 = load("ppo", ["experiment=instructgpt_175b"]).model
    assert parameters.count(gpt3) == pytest.approx(175e9, rel=0.003)
    tiny = Model(layers=8, hidden=32, heads=8, vocabulary=100, context=16)
    llama = replace(tiny, style="llama", kv_heads=4, tied=False, ffn=64)
    for model in (tiny, llama):
        for scalar in (False, True):
            logical = sum(row_bytes(t) * t.shape[t.dim or 0] // 4 for t in specs(model, 128, scalar=scalar))
            assert parameters.count(model, scalar=scalar, rows=128) == logical
            whole = parameters.per_rank(model, Layout.parse("tp1 pp1", 1), 128, scalar=scalar)
            assert whole == (logical,)
            split = parameters.per_rank(model, Layout.parse("tp1 pp4 vp2", 4), 128, scalar=scalar)
            copied = 128 * 32 if model.tied and not scalar else 0
            assert sum(split) == logical + copied


@pytest.mark.parametrize(
    ("policy", "generate"),
    [
        ("tp2 pp2 dp2", "tp2 pp1"), ("tp2 pp2 dp2", "tp2 pp4"), ("tp2 pp4", "tp4 pp2"), ("tp4 pp2", "tp2 pp2"),
        ("tp2 pp2 vp2 dp2", "tp2 pp1"), ("tp2 pp4 vp2", "tp2 pp2"), ("tp2 pp2 dp2", "tp2 pp2"), ("pp4 dp2", "pp2"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("tied", [True, False])
def test_what_generation_shares_is_what_the_reshard_aliases(policy: str, generate: str, tied: bool) -> None:
    """By seat, against the plan of the same layouts in full."""
    model = Model(layers=8, hidden=32, heads=8, vocabulary=128, context=16, tied=tied)
    source, target = Layout.parse(policy, 8), Layout.parse(generate, 8)
    roles = {name: residents.Role(name, model, layout, 128) for name, layout in
             (("policy", source), ("generate", target))}  # fmt: skip
    tensors = specs(model, 128)
    dealt = residents.dealt(roles["policy"], roles["generate"])
    real = plan(tensors, source, tensors, dealt)
    by_name = {tensor.name: tensor for tensor in tensors}
    found = set()
    for rank in range(8):
        bytes_ = 0
        for name in real.rank(rank).aliased:
            shape = shard_shape(by_name[name], source.tp)
            bytes_ += 4 * math.prod(shape)
        stages = [layout.coordinate(rank) for layout in (source, dealt)]
        assert stages[0] is not None
        assert stages[1] is not None
        found.add((stages[0][1], stages[1][1], bytes_))
    ours = {(s.stages["policy"], s.stages["generate"], s.aliased) for s in residents.seats(roles, 8)}
    assert ours == found


@pytest.mark.parametrize("style", ["gpt", "llama"])
def test_caches_are_counted_as_the_generate_phase_counts_them(style: str) -> None:
    model = Model(layers=8, hidden=64, heads=8, vocabulary=1000, context=64, style=style, precision="bf16", kv_heads=4)
    layout = Layout.parse("tp2 pp2", 4)
    role = residents.Role("generate", model, layout, 1000)
    assert cache_bytes(role, 48) == room.cache_bytes(model, layout, 48)
    assert activations.FORWARD_ROWS == vocabulary.FORWARD_ROWS
    assert step_bytes(role, 16) == room.step_bytes(model, layout, 16)


@pytest.mark.parametrize("words", ["tp1", "tp4", "tp4 sp", "tp8 sp"])
def test_a_layer_keeps_what_korthikanti_says(words: str) -> None:
    """GPT-3's layer with dropout in bf16, but for sums of a row (norms', attention's) that their formula leaves out;
    full recompute keeps a layer's input."""
    model = load("ppo", ["experiment=instructgpt_175b"]).model
    layout, line = Layout.parse(words, int(words[2])), Pass(1, 1, 2048, dropout=0.1)
    ours, theirs = (of(model, layout, line) for of in (activations.layer, activations.published))
    assert ours == pytest.approx(theirs, rel=0.005)
    plain = activations.layer(model, layout, replace(line, dropout=0.0))
    masks = 2 * 2048 * model.hidden / (layout.tp if layout.sp else 1)
    assert ours - plain == masks
    full = activations.layer(model, layout, line, "full")
    assert full == activations.published(model, layout, line, "full") / (layout.tp if layout.sp else 1)


def test_micro_batches_in_flight() -> None:
    """1F1B as Narayanan et al. count them; interleaved as many chunks as the warm-up and one."""
    plain, virtual = Layout.parse("pp4", 4), Layout.parse("pp4 vp2", 4)
    assert [activations.in_flight(plain, stage, 16) for stage in range(4)] == [4, 3, 2, 1]
    assert [activations.in_flight(plain, stage, 2) for stage in range(4)] == [2, 2, 2, 1]
    assert [activations.in_flight(virtual, stage, 16) for stage in range(4)] == [11, 9, 7, 5]
    assert activations.in_flight(virtual, 0, 4) == 8


def test_64_gpus_hold_a_175b_run_only_with_its_optimizer_on_the_host() -> None:
    """Of all changes of one setting; the sentence says what fills tp8 pp8 dp1 without it."""
    config = run("tp8 pp8 dp1 sp", "tp8 pp4", value="tp8 pp2 sp", model="gpt_175b")
    assert not memory.fits(config, 64)
    sentence = memory.nearest(config, 64)
    assert sentence.startswith("adam.host=true fits: ")
    assert "as it is, train policy takes 9" in sentence
    for cause in ("policy optimizer 33.9", "policy gradients 11.3", "policy average 11.3", "policy weights 5.6"):
        assert cause in sentence
    assert "compute.recompute=full, to 8" in sentence
    hosted = replace(config, adam=replace(config.adam, host=True))
    assert memory.fits(hosted, 64)
    train = phase(hosted, 64, "train policy")
    assert not [cause for cause in train.causes if "optimizer" in cause or "average" in cause]
    assert train.host["policy optimizer"] == pytest.approx(20 * 2.82e9, rel=0.01)


@pytest.mark.parametrize(("layout", "world"), [("128gpu", 128), ("1024gpu", 1024)])
def test_the_layout_files_fit(layout: str, world: int) -> None:
    config = load("ppo", ["experiment=instructgpt_175b", f"layout={layout}"])
    assert memory.fits(config, world)
    assert memory.nearest(config, world).startswith("It fits: train policy takes most, ")


def test_the_nearest_change() -> None:
    """Less memory needs more, and the advice holds when it is taken."""
    small = run("tp8 pp16 dp1 sp", "tp8 pp4", "cluster.memory=60e9", value="tp8 pp2 sp")
    assert memory.nearest(small, 128).startswith("compute.recompute=full fits: ")
    assert memory.fits(replace(small, compute=replace(small.compute, recompute="full")), 128)
    tiny = run("tp8 pp16 dp1 sp", "tp8 pp4", "cluster.memory=16e9", value="tp8 pp2 sp")
    assert memory.nearest(tiny, 128).startswith("No change of one setting brings every phase under 15.2 GB: ")


def test_what_leaves_the_device_while_the_policy_generates() -> None:
    """Its gradients always, its optimizer and average where asked; the reference altogether."""
    plain = run("tp8 pp16 dp1 sp", "tp8 pp4", value="tp8 pp2 sp")
    reshard = replace(plain.reshard, park_optimizer=True, share_reference=True)
    parked = replace(plain, reshard=reshard)
    train, generate = phase(plain, 128, "train policy").causes, phase(plain, 128, "generate").causes
    assert "policy gradients" in train
    assert "policy gradients" not in generate
    assert generate["value gradients"] == train["value gradients"]
    left = phase(parked, 128, "generate")
    assert not {"policy optimizer", "policy average", "reference weights"} & set(left.causes)
    assert left.host["parked optimizer"] == train["policy optimizer"] + train["policy average"]
    assert left.host["reference weights"] == generate["reference weights"]
    assert "policy optimizer" in phase(parked, 128, "reshard").causes
    assert "policy optimizer" in phase(parked, 128, "train policy").causes


def test_generation_fills_what_is_free() -> None:
    """`sampling.batch=0` takes at most the rows there are, and never more than the GPU has."""
    some = run("tp8 pp16 dp1 sp", "tp8 pp4", "sampling.batch=0", value="tp8 pp2 sp")
    found = phase(some, 128, "generate")
    cached = cache_bytes(residents.ppo(some, 128)["generate"], 2048)
    assert 32 * cached < found.causes["keys and values"] <= 128 * cached
    assert found.total <= memory.capacity(some)
    all_rows = replace(some, ppo=replace(some.ppo, episodes=8))
    assert phase(all_rows, 128, "generate").causes["keys and values"] == 2 * cached


@pytest.mark.parametrize("recipe", ["pretrain", "sft", "reward"])
def test_the_other_recipes(recipe: str) -> None:
    """One role, its training and its save; nothing of PPO's others."""
    config = load("ppo", ["experiment=instructgpt_6b"])
    train, save = memory.phases(config, 64, recipe=recipe)
    assert train.name == ("train reward" if recipe == "reward" else "train policy")
    assert train.total > save.total
    assert {cause.split()[0] for cause in train.causes} <= {
        *(train.name.removeprefix("train "), "activations", "logits", "gather", "communication", "context")
    }
    assert memory.fits(config, 64, recipe=recipe) == (train.total <= memory.capacity(config))


def test_layouts_that_do_not_divide_are_refused() -> None:
    config = run("tp8 pp16 dp1 sp", "tp8 pp4")
    with pytest.raises(BadInput, match="96 layers do not divide into the 128 chunks"):
        memory.phases(replace(config, layout=replace(config.layout, policy="tp1 pp128")), 128)
