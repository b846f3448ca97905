"""Proves the time model's parts against sums written out by hand, and that each setting moves the seconds the way it
moves the work.

Not proved here: that the machines do what the roofline says (tests/plan/test_published.py).
"""

from __future__ import annotations

import dataclasses
import math

import pytest

from megatron_rlhf.config.layout import Layout
from megatron_rlhf.config.load import load
from megatron_rlhf.config.schema import Adam, Cluster, Compute, Config, Factors, Model
from megatron_rlhf.config.world import needed
from megatron_rlhf.plan import flops, generation, pipeline, times
from megatron_rlhf.plan.generation import Turns
from megatron_rlhf.plan.pipeline import Cut
from megatron_rlhf.plan.roofline import CAUSES, Reach, Roof, Seconds
from megatron_rlhf.plan.stage import Stage
from megatron_rlhf.plan.times import Bill
from megatron_rlhf.reshard.layout import parameters, specs

PLAIN = Factors(gemm=1.0, memory=1.0, nvlink=1.0, nic=1.0, launch=0.0, latency=0.0, straggler=1.0)
IDEAL = Cluster(factors=PLAIN)
SMALL = Model(layers=4, hidden=64, heads=4, vocabulary=1000, precision="bf16")


def stage(layout: Layout, model: Model = SMALL, cluster: Cluster = IDEAL, **compute: object) -> Stage:
    return Stage(model, layout, cluster, Compute(**compute))  # type: ignore[arg-type]


def seconds(config: Config) -> dict[str, float]:
    phases = times.iteration(config, needed(config.layout), Seconds(nic=0.2))
    return {phase.name: phase.seconds.total for phase in phases}


def test_seconds_add_and_multiply_by_cause() -> None:
    found = 2 * (Seconds(gemm=1.0, nic=2.0) + Seconds(gemm=0.5))
    assert found.by_cause() == {"gemm": 3.0, "nic": 4.0}
    assert found.total == 7.0
    assert len(CAUSES) == 9


def test_a_product_takes_the_longer_of_arithmetic_and_memory() -> None:
    roof = Roof(Cluster(flops=100.0, bandwidth=10.0, factors=dataclasses.replace(PLAIN, gemm=0.5)))
    assert roof.product(100.0, 10.0) == Seconds(gemm=2.0)
    assert roof.product(100.0, 50.0) == Seconds(gemm=2.0, memory=3.0)


def test_a_ring_moves_its_bytes() -> None:
    """8 ranks: 7/8 of the bytes once for a gather, twice for a sum, over NVLink inside a node and over the cards that a
    node's members have outside."""
    roof = Roof(IDEAL)
    assert roof.gathered(8e9, 8, True).nvlink == pytest.approx(7e9 / 450e9)
    assert roof.reduced(8e9, 8, False).nic == pytest.approx(14e9 / 50e9)
    assert roof.gathered(8e9, 8, False, 4).nic == pytest.approx(7e9 / 200e9)
    assert roof.reduced(8e9, 1, True) == Seconds()


@pytest.mark.parametrize(
    ("layout", "tp", "pp", "dp", "cards"),
    [
        (Layout(8, 1, 1), True, True, True, 1),
        (Layout(2, 2, 2), True, True, True, 2),
        (Layout(2, 1, 8), True, False, False, 4),
        (Layout(8, 16, 8), True, False, False, 1),
        (Layout(16, 1, 2), False, False, False, 1),
        (Layout(2, 4, 8, order="tp-pp-dp"), True, True, False, 1),
    ],
)
def test_what_stays_inside_a_node(layout: Layout, tp: bool, pp: bool, dp: bool, cards: int) -> None:
    assert Reach.of(layout, 8).tp == tp
    assert Reach.of(layout, 8).dp == dp
    assert Reach.of(layout, 8).cards == cards
    if layout.pp > 1:
        assert Reach.of(layout, 8).pp == pp


def test_a_pipeline_has_the_bubble_of_the_literature() -> None:
    """Equal stages: (p - 1)/m of the work, over v with virtual stages (Narayanan et al. 2021, section 2.2)."""
    for layout in (Layout(1, 4, 1), Layout(1, 4, 1, vp=2)):
        at = stage(layout, dataclasses.replace(SMALL, layers=8))
        found = pipeline.run(at, Cut(16, 1), 512, 0, backward=True)
        work = found.total - found.bubble - found.nic - found.nvlink
        assert found.bubble / work == pytest.approx(3 / 16 / layout.vp, rel=1e-6)


def test_the_busiest_stage_sets_the_pace() -> None:
    """A wide vocabulary makes the last stage's time count once a micro-batch, the first's once a pass."""
    wide = dataclasses.replace(SMALL, vocabulary=200_000)
    at = stage(Layout(1, 2, 1), wide)
    one, two = (pipeline.run(at, Cut(count, 1), 512, 512, backward=False) for count in (1, 2))
    head = at.head_forward(512).total
    layers = (at.layers * at.layer_forward(1, 512)).total
    assert two.total - one.total == pytest.approx(head + layers + at.passed(512).total)
    assert one.total == pytest.approx(head + 2 * layers + at.passed(512).total)


def test_recompute_costs_a_forward() -> None:
    """Full: the layer again; selective: core attention again; the head never."""
    words = ("none", "selective", "full")
    none, selective, full = (stage(Layout(), recompute=word).layer_backward(2, 256) for word in words)
    at = stage(Layout())
    assert (full + -1 * none).total == pytest.approx(at.layer_forward(2, 256).total)
    assert (selective + -1 * none).total == pytest.approx(at.core(2, 256).total)


def test_adam_reads_and_writes_what_it_must() -> None:
    """One rank: 28 bytes a number and 2 for the bf16 weight, 8 for norm and emptying, 12 for the average."""
    at, count = stage(Layout()), pipeline.heaviest(SMALL, Layout())
    assert pipeline.update(at, Adam()).total * 3.35e12 == pytest.approx(38 * count)
    assert pipeline.update(at, Adam(), averaged=True).total * 3.35e12 == pytest.approx(50 * count)
    on_host = pipeline.update(at, Adam(host=True))
    assert on_host.host == pytest.approx(count * (6 / 64e9 + 28 / 76.8e9))


def test_replicas_reduce_in_fp32_and_gather_in_bf16() -> None:
    """And each steps on its share alone."""
    layout = Layout(1, 1, 8)
    found = pipeline.update(stage(layout), Adam())
    held = pipeline.heaviest(SMALL, layout)
    assert found.nvlink == pytest.approx(7 / 8 * 6 * held / 450e9)
    assert found.memory == pytest.approx((8 + 30 / 8) * held / 3.35e12)


@pytest.mark.parametrize("layout", [Layout(), Layout(2, 2, 1), Layout(4, 2, 1, vp=2), Layout(1, 4, 2)])
def test_parameters_of_the_fullest_rank(layout: Layout) -> None:
    """At least the average, and the whole network on one rank."""
    tensors = specs(SMALL, 1024)
    least = parameters(tensors) / (layout.tp * layout.pp)
    assert least <= pipeline.heaviest(SMALL, layout) <= parameters(tensors)
    assert pipeline.heaviest(SMALL, Layout()) == parameters(tensors)


@pytest.mark.parametrize(
    ("rows", "micro", "layout", "each", "cut"),
    [
        (64, 1, Layout(8, 16, 8), 1, Cut(8, 1)),
        (10, 4, Layout(1, 1, 2), 1, Cut(2, 3)),
        (64, 8, Layout(1, 1, 64), 9, Cut(1, 9)),
        (6, 1, Layout(1, 4, 1, vp=2), 1, Cut(8, 1)),
        (1, 4, Layout(1, 1, 8), 1, Cut(1, 1)),
    ],
)
def test_rows_are_cut_as_in_training(rows: int, micro: int, layout: Layout, each: int, cut: Cut) -> None:
    """The numbers of train/microbatch.py."""
    assert Cut.of(rows, micro, layout, each) == cut


@pytest.mark.parametrize(
    ("episodes", "replicas", "batch", "asked", "stages", "turns"),
    [
        (512, 32, 32, 0, 4, Turns(4, 4, 4)),
        (512, 4, 32, 0, 4, Turns(16, 8, 4)),
        (3, 1, 32, 0, 4, Turns(3, 1, 3)),
        (10, 1, 2, 0, 4, Turns(10, 1, 2)),
        (512, 64, 8, 1, 1, Turns(1, 8, 1)),
        (512, 32, 32, 2, 4, Turns(2, 8, 2)),
    ],
)
def test_sequences_take_turns_as_in_generation(
    episodes: int, replicas: int, batch: int, asked: int, stages: int, turns: Turns
) -> None:
    assert Turns.of(episodes, replicas, batch, asked, stages) == turns


def test_decoding_reads_weights_and_cache() -> None:
    """One stage, one rank: at least the layers' weights, the table and the slots of the cache once a token."""
    at, turns = stage(Layout()), Turns(1, 4, 1)
    found = generation.decoded(at, turns, 2048, 10)
    read = 4 * (flops.layer_weights(SMALL) + 4 * 2048 * 2 * 64) + 1000 * 64
    assert 10 * 2 * read / 3.35e12 < found.total < 1.3 * 10 * 2 * read / 3.35e12


def test_fewer_groups_than_stages_leave_a_bubble() -> None:
    at = stage(Layout(1, 4, 1))
    alone, full = (generation.decoded(at, Turns(groups, 4, groups), 2048, 10) for groups in (1, 4))
    assert alone.bubble == pytest.approx(3 * (alone.total - alone.bubble))
    assert full.bubble == 0
    assert alone.total == pytest.approx(full.total)


def test_an_iteration_is_its_phases() -> None:
    """The paper's 1,024 GPUs: every phase of recipes/ppo.py, none empty; the mix is most of the work."""
    config = load("plan", ["layout=1024gpu", "cluster=h100"])
    phases = times.iteration(config, 1024, Seconds(nic=0.2))
    assert [phase.name for phase in phases] == [
        *("reshard", "prefill", "decode", "score", "reference", "old log-probs", "values"),
        *("train value", "update value", "train policy", "train pretraining mix", "update policy"),
    ]
    assert all(phase.seconds.total > 0 for phase in phases)
    assert {phase.times for phase in phases if phase.name.startswith(("train", "update"))} == {8}
    bill = Bill.of(phases, config, 1024, 512 * 2048)
    assert bill.seconds == pytest.approx(math.fsum(phase.seconds.total for phase in phases))
    assert bill.gpu_hours == pytest.approx(bill.seconds * 1024 / 3600)
    assert bill.kilowatt_hours == pytest.approx(bill.gpu_hours * 1.275)
    assert bill.price == 0
    mixed = next(phase for phase in phases if phase.name == "train pretraining mix")
    assert mixed.flops > 0.7 * math.fsum(phase.flops for phase in phases)


def test_each_setting_moves_its_phase() -> None:
    """And no other."""
    usual = seconds(load("plan", ["layout=128gpu"]))
    for words, moved in (
        (["ppo.pretraining_ratio=4"], {"train pretraining mix"}),
        (["sampling.batch=64"], {"prefill", "decode"}),
        (["adam.host=true"], {"update value", "update policy"}),
        (["layout.reward=tp8 pp1 dp16 sp"], {"score"}),
        (["compute.forward_micro_batch=1"], {"score", "reference", "old log-probs", "values"}),
    ):
        found = seconds(load("plan", ["layout=128gpu", *words]))
        assert {name for name in usual if found[name] != usual[name]} == moved, words
    assert "train pretraining mix" not in seconds(load("plan", ["layout=128gpu", "ppo.pretraining_coef=0"]))
    assert "save" in seconds(load("plan", ["layout=128gpu", "checkpoint.every=10"]))


@pytest.mark.parametrize("recipe", ["pretrain", "sft", "rl_start", "reward"])
def test_a_step_of_a_supervised_recipe(recipe: str) -> None:
    """More GPUs take less time and no less of them altogether."""
    few, many = (load("plan", [f"layout={name}"]) for name in ("128gpu", "1024gpu"))
    found = [
        Bill.of(times.step(config, ranks, recipe), config, ranks, 1) for config, ranks in ((few, 128), (many, 1024))
    ]
    assert found[1].seconds < found[0].seconds
    assert found[1].gpu_hours > found[0].gpu_hours
    assert 0 < found[0].mfu < 0.65


def test_a_parked_optimizer_travels_twice() -> None:
    config = load("plan", ["layout=128gpu", "reshard.park_optimizer=true"])
    found = times.switched(config, 128, nic=0.16, nvlink=0.01)
    assert found.nic == pytest.approx(0.2)
    assert found.host == pytest.approx(2 * 16 * pipeline.heaviest(config.model, Layout(8, 16, 1)) / 64e9)


def test_a_state_is_written_by_all_ranks() -> None:
    config = load("plan", ["layout=1024gpu", "checkpoint.asynchronous=false"])
    save = times.saved(config, 1024)
    assert save.seconds.disk == pytest.approx(times.written(config, 1024))
    assert save.seconds.disk * 0.25e9 * 1024 == pytest.approx(16 * 174.6e9 + 12 * 6.65e9, rel=0.01)
