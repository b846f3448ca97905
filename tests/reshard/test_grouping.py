"""Proves that the dealing of ranks keeps what the formulae say, never less than the target's own order, and that target
tp groups stay inside nodes.

Not proved here: that a dealt layout is moved rightly (test_plan.py).
"""

from __future__ import annotations

import math
import random
from itertools import permutations, product

import pytest

from megatron_rlhf.config.layout import Layout
from megatron_rlhf.config.schema import Model
from megatron_rlhf.reshard.grouping import grouped
from megatron_rlhf.reshard.layout import TensorSpec, specs, stage
from megatron_rlhf.reshard.plan import plan
from megatron_rlhf.reshard.topology import Cluster
from tests.helpers.reshard import layouts, model

GPT_175B = specs(Model(layers=96, hidden=12288, heads=96, vocabulary=51200, tied=False, precision="bf16"), 51200)


def moved(known: tuple[TensorSpec, ...], source: Layout, target: Layout) -> int:
    """Bytes that all ranks receive together."""
    return int(plan(known, source, known, target, Cluster(node=1)).transfers.size.sum())


def tensors(source: Layout, target: Layout) -> tuple[TensorSpec, ...]:
    """Of a small model, its vocabulary a multiple of both tp."""
    shape = model(source, target, "gpt", False)
    multiple = math.lcm(source.tp, target.tp)
    return specs(shape, math.ceil(shape.vocabulary / multiple) * multiple)


def test_never_worse_than_the_own_order() -> None:
    """And the same ranks, whatever the axes."""
    draw = random.Random(0)
    for _ in range(150):
        ranks = draw.choice([4, 6, 8, 12, 16])
        source, target = draw.choice(layouts(ranks, 3)), draw.choice(layouts(ranks, 3))
        known = tensors(source, target)
        dealt = grouped(source, target, known, known)
        assert dealt == target or moved(known, source, dealt) < moved(known, source, target)


@pytest.mark.parametrize(("source", "target"), list(product(layouts(4), layouts(4))))
def test_no_dealing_of_four_ranks_keeps_more(source: Layout, target: Layout) -> None:
    """All 24 dealings."""
    known = tensors(source, target)
    best = min(moved(known, source, Layout(target.tp, target.pp, target.dp, target.vp, places=places))
               for places in permutations(range(4)))  # fmt: skip
    assert moved(known, source, grouped(source, target, known, known)) == best


@pytest.mark.parametrize(
    "words", [("tp2 pp3", "tp3 pp2"), ("tp3 pp2", "tp2 dp3"), ("tp3 dp2", "tp2 pp3"), ("tp2", "tp3")]
)
def test_no_dealing_of_six_ranks_keeps_more_where_neither_tp_divides(words: tuple[str, str]) -> None:
    """All 720 dealings of whole classes."""
    source, target = (Layout.parse(word, 6) for word in words)
    known = tensors(source, target)
    best = min(moved(known, source, Layout(target.tp, target.pp, target.dp, places=places))
               for places in permutations(range(6)))  # fmt: skip
    assert moved(known, source, grouped(source, target, known, known)) == best


@pytest.mark.parametrize("order", ["tp-dp-pp", "tp-pp-dp"])
@pytest.mark.parametrize(
    ("policy", "generate", "kept"),
    [
        ("tp8 pp16 dp8", "tp8 pp4", 1 / 128),
        ("tp8 pp16 dp8", "tp4 pp8", 1 / 128),
        ("tp8 pp16 dp8", "tp1 pp2", 1 / 128),
        ("tp4 pp16", "tp8 pp4", 1 / 128),
        ("tp8 pp16 dp8", "tp16 pp1", 1 / 256),
        ("tp8 pp16 vp2 dp8", "tp8 pp4", 1 / 256),
    ],
)
def test_what_is_kept_is_what_the_formulae_say(policy: str, generate: str, kept: float, order: str) -> None:
    """W/(tp) of the finer layout; with v virtual stages one v-th of it. W without embeddings, which end stages keep."""
    source = Layout.parse(f"{policy} order={order}", 1024)
    target = Layout.parse(generate, 1024)
    dealt = grouped(source, target, GPT_175B, GPT_175B)
    summary = plan(GPT_175B, source, GPT_175B, dealt).summary()
    layers = sum(2 * math.prod(tensor.shape) for tensor in GPT_175B if tensor.layer >= 0)
    assert summary.kept_bytes_min == pytest.approx(kept * layers, rel=0.005)


def test_the_own_order_stays_where_it_keeps_most() -> None:
    """Megatron's order with equal tp; and where the ranks are not the same."""
    source = Layout.parse("tp8 pp16 dp8", 1024)
    for words, first in (("tp8 pp4", 0), ("tp8 pp1", 0), ("tp8 pp16", 0)):
        target = Layout.parse(words, 1024)
        assert grouped(source, target, GPT_175B, GPT_175B) == target, first
    apart = Layout(8, 4, 32, first=1024)
    assert grouped(source, apart, GPT_175B, GPT_175B) == apart


@pytest.mark.parametrize(
    ("policy", "generate", "nodes"),
    [
        ("tp8 pp16 dp8", "tp4 pp8", 1),
        ("tp8 pp16 dp8", "tp2 pp1", 1),
        ("tp8 pp16 dp8", "tp16 pp1", 2),
        ("tp2 pp4", "tp8 pp1", 1),
        ("tp2 pp4 order=tp-pp-dp", "tp8 pp1", 1),
        ("tp4 pp16 vp2", "tp2 pp4", 1),
    ],
)
def test_target_tp_groups_stay_inside_nodes(policy: str, generate: str, nodes: int) -> None:
    """One node a group, or as many as it needs."""
    source, target = Layout.parse(policy, 1024), Layout.parse(generate, 1024)
    dealt = grouped(source, target, GPT_175B, GPT_175B)
    assert dealt.places
    for pp, dp in product(range(dealt.pp), range(dealt.dp)):
        assert len({dealt.rank(tp, pp, dp) // 8 for tp in range(dealt.tp)}) == nodes


def test_interleaved_stages_go_where_their_chunks_are() -> None:
    """Every rank keeps one of its two chunks."""
    source, target = Layout(1, 4, 2, 2), Layout(1, 4, 2)
    known = tensors(source, target)
    dealt = grouped(source, target, known, known)
    for rank in range(8):
        _, before, _ = source.coordinate(rank) or (0, 0, 0)
        _, after, _ = dealt.coordinate(rank) or (0, 0, 0)
        mine = {tensor.layer for chunk in (0, 1) for tensor in stage(known, source, before, chunk)}
        theirs = {tensor.layer for tensor in stage(known, dealt, after)}
        assert len((mine & theirs) - {-1}) == 1
    assert dealt.places
