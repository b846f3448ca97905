"""Seconds of a pass over a batch and of an optimizer step, put together from one stage's. Pure, no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache

from megatron_rlhf.config.layout import Layout
from megatron_rlhf.config.schema import Adam, Model
from megatron_rlhf.plan import parameters
from megatron_rlhf.plan.roofline import Seconds
from megatron_rlhf.plan.stage import Stage


@dataclass(frozen=True, slots=True)
class Cut:
    """How a replica's rows are cut into micro-batches: `count` of `rows` each (train/microbatch.py)."""

    count: int
    rows: int

    @classmethod
    def of(cls, rows: int, micro_batch: int, layout: Layout, each: int = 1) -> Cut:
        """`rows` elements of `each` rows dealt to the layout's replicas, at most `micro_batch` rows at a time; with
        virtual stages the count is a multiple of the stages."""
        local = max(1, math.ceil(rows / layout.dp))
        step = layout.pp if layout.vp > 1 else 1
        count = step * math.ceil(math.ceil(local / max(1, micro_batch // each)) / step)
        return cls(count, math.ceil(local / count) * each)


def run(stage: Stage, cut: Cut, length: int, positions: int, *, backward: bool) -> Seconds:
    """A pass over the micro-batches, the head at `positions` of each row.

    m micro-batches through the busiest stage, and the others' time for one of them over the v virtual stages as bubble:
    with equal stages the (p - 1)/(v m) of Narayanan et al. 2021, section 2.2. Each micro-batch waits for what it
    sends to its neighbour, v times in each direction.
    """
    first, middle, last = _stages(stage, cut.rows, length, positions, backward=backward)
    pp, vp = stage.layout.pp, stage.layout.vp
    busiest = max((first, middle, last) if pp > 1 else (last,), key=lambda seconds: seconds.total)
    others = first.total + last.total + (pp - 2) * middle.total - busiest.total if pp > 1 else 0.0
    sends = cut.count * vp * (2 if backward else 1)
    found = cut.count * busiest + sends * stage.passed(cut.rows * length) + Seconds(bubble=others / vp)
    return waited(found, stage)


def waited(found: Seconds, stage: Stage) -> Seconds:
    """`found` where the slowest of several GPUs is waited for."""
    alone = stage.layout.size == 1
    return found if alone else replace(found, straggler=found.total * (stage.cluster.factors.straggler - 1))


def _stages(
    stage: Stage, rows: float, length: int, positions: int, *, backward: bool
) -> tuple[Seconds, Seconds, Seconds]:
    """One micro-batch on the first, a middle and the last stage; without a pipeline the last is the whole network."""
    layer = stage.layer_forward(rows, length)
    embedded, head = stage.embedded(rows * length), stage.head_forward(rows * positions)
    if backward:
        layer += stage.layer_backward(rows, length)
        head += stage.head_backward(rows * positions)
    middle = stage.layers * layer
    return middle + embedded, middle, middle + head + (embedded if stage.layout.pp == 1 else Seconds())


def update(stage: Stage, adam: Adam, *, averaged: bool = False) -> Seconds:
    """One optimizer step; nothing of it is hidden behind the backward (train/optimizer.py).

    fp32 gradients are reduce-scattered over dp, the weights all-gathered; a tied table's gradients are summed over its
    two stages. Adam reads gradient, weight and two moments and writes all but the gradient (28 bytes a number, and 2
    for the 16-bit weight); the norm reads the gradients and they are emptied; the average adds 12.
    """
    layout, roof = stage.layout, stage.roof
    held = heaviest(stage.model, layout, scalar=stage.scalar)
    near, cards, shard = stage.reach.dp, stage.reach.cards, held / layout.dp
    found = roof.gathered(4 * held, layout.dp, near, cards) + roof.gathered(stage.bytes * held, layout.dp, near, cards)
    if stage.model.tied and not stage.scalar and layout.pp > 1:
        table = stage.model.hidden * stage.model.vocabulary / layout.tp
        found += roof.reduced(4 * table, 2, stage.reach.pp)
    narrow = stage.bytes if stage.bytes < 4 else 0
    found += roof.touched(2 * 4 * held + (12 * shard if averaged else 0))
    if adam.host:
        copied, passes = (4 + stage.bytes) * shard / stage.cluster.host, 28 * shard / stage.cluster.ram
        return waited(found + Seconds(host=copied + passes), stage)
    return waited(found + roof.touched((28 + narrow) * shard), stage)


@cache
def heaviest(model: Model, layout: Layout, *, scalar: bool = False) -> int:
    """Parameters of the fullest rank, the vocabulary padded as on GPUs."""
    return max(parameters.per_rank(model, layout, _padded(model, layout.tp), scalar=scalar))


@cache
def whole(model: Model, *, scalar: bool = False) -> int:
    """Parameters of the network, the vocabulary padded as on GPUs."""
    return parameters.count(model, scalar=scalar, rows=_padded(model, 1))


def _padded(model: Model, tp: int) -> int:
    multiple = math.lcm(tp, parameters.TENSOR_CORES)
    return -(-model.vocabulary // multiple) * multiple
