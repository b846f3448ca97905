"""Which rank takes which place of the target layout, so that it keeps most of what it holds. Pure, no torch.

Where one tp divides the other, a rank can keep something only in the places of its own tp class: the target shard that
its shard is part of, or the target shards that are parts of it. All classes are alike, so one of them is solved: how
many ranks of each source stage go to each target stage is a transport problem. Without virtual stages its solution
keeps W/(t'p') - W/(tp) from travelling when p' divides p: source stage s goes to target stage s // (p / p'). With
them, a stage is given to one of the target stages that its chunks overlap.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from megatron_rlhf.config.layout import ORDERS, Layout
from megatron_rlhf.reshard.layout import TensorSpec
from megatron_rlhf.reshard.shares import ANY, shares
from megatron_rlhf.reshard.topology import Ints, Seats

MOST_UNITS = 256
"""Largest assignment over whole classes, where neither tp divides the other."""

Bytes = NDArray[np.int64]


def grouped(
    source: Layout, target: Layout, source_tensors: Sequence[TensorSpec], target_tensors: Sequence[TensorSpec]
) -> Layout:
    """`target` with its ranks dealt so that most bytes stay where they are, or as it is where its own order keeps as
    much or the two span different ranks.

    A target tp group lies inside one source tp group, or is made of neighbouring ones. Raises BadInput as `plan` does.
    """
    if (source.first, source.size) != (target.first, target.size):
        return target
    world = source.first + source.size
    before, after = Seats.of(source, world), Seats.of(target, world)
    common = _common(source, target, source_tensors, target_tensors)
    ranks = _dealt(common, before, target)
    if ranks is None:
        return target
    places = tuple(ranks.transpose(1, 2, 0).ravel().tolist())
    dealt = replace(target, places=places, order=ORDERS[0])
    mine, theirs = _kept(common, before, Seats.of(dealt, world)), _kept(common, before, after)
    return dealt if mine > theirs else target


def _common(
    source: Layout, target: Layout, source_tensors: Sequence[TensorSpec], target_tensors: Sequence[TensorSpec]
) -> Bytes:
    """Bytes that a source shard and a target shard have in common, [tp, pp, target tp, target pp]."""
    found = np.zeros((source.tp, source.pp, target.tp, target.pp), dtype=np.int64)
    known = {tensor.name for tensor in source_tensors}
    fresh = [tensor.name for tensor in target_tensors if tensor.name not in known]
    for share in shares(source_tensors, source, target_tensors, target, fresh=fresh):
        mine = range(source.tp) if share.source == ANY else [share.source]
        theirs = range(target.tp) if share.target == ANY else [share.target]
        found[np.ix_(mine, share.held, theirs, share.needed)] += share.size
    return found


def _kept(common: Bytes, source: Seats, target: Seats) -> int:
    """Bytes that all ranks together need and hold."""
    inside = source.tp >= 0
    return int(common[source.tp, source.pp, target.tp, target.pp][inside].sum())


def _dealt(common: Bytes, source: Seats, target: Layout) -> Ints | None:
    """The rank of every target place, [tp, pp, dp]; None where the problem is too large."""
    tp, pp, dp = source.ranks.shape
    if tp % target.tp == 0 or target.tp % tp == 0:
        classes = min(tp, target.tp)
        # [class, inner tp, pp, dp] on both sides: only equal classes have shards in common
        blocks = common.reshape(classes, tp // classes, pp, classes, target.tp // classes, target.pp)
        value = sum(blocks[number, :, :, number].sum(axis=(0, 2)) for number in range(classes))
        counts = _transport(value, tp // classes * dp, target.tp // classes * target.dp)
        return _by_class(counts, source, target, classes)
    units = tp * pp * dp // math.gcd(dp, target.dp)
    if units > MOST_UNITS:
        return None
    counts = _transport(common.reshape(tp * pp, target.tp * target.pp), dp, target.dp)
    taken = np.cumsum(counts, axis=1)
    ranks = np.empty((target.tp * target.pp, target.dp), dtype=np.int64)
    for place in range(len(ranks)):
        mine = [
            np.sort(source.ranks.reshape(tp * pp, dp)[row])[taken[row, place] - counts[row, place] : taken[row, place]]
            for row in range(tp * pp)
        ]
        ranks[place] = np.sort(np.concatenate(mine))
    return ranks.reshape(target.tp, target.pp, target.dp)


def _by_class(counts: Ints, source: Seats, target: Layout, classes: int) -> Ints:
    """The rank of every target place, when `counts` [stage, target stage] ranks of each tp class go where they say.

    Positions in a class are taken in the order of the first class's ranks and are the same for all classes, so that
    neighbours, a source tp group above all, stay together.
    """
    tp, pp, dp = source.ranks.shape
    # [class, stage, position]
    ranks = source.ranks.reshape(classes, tp // classes, pp, dp).transpose(0, 2, 3, 1).reshape(classes, pp, -1)
    ranks = np.take_along_axis(ranks, np.argsort(ranks[:1], axis=2), axis=2)
    taken = np.cumsum(counts, axis=1)
    found = np.empty((target.tp, target.pp, target.dp), dtype=np.int64)
    inner = target.tp // classes
    for stage in range(target.pp):
        runs = [slice(taken[row, stage] - counts[row, stage], taken[row, stage]) for row in range(pp)]
        mine = np.concatenate([ranks[:, row, run] for row, run in enumerate(runs)], axis=1)
        mine = mine[:, np.argsort(mine[0])]
        found[:, stage] = mine.reshape(classes, target.dp, inner).transpose(0, 2, 1).reshape(target.tp, target.dp)
    return found


def _transport(value: Bytes, supply: int, demand: int) -> Ints:
    """How many of the `supply` ranks of each row go to each column, which takes `demand`, for the largest total."""
    unit = math.gcd(supply, demand)
    rows, columns = supply // unit, demand // unit
    chosen, places = linear_sum_assignment(np.repeat(np.repeat(value, rows, 0), columns, 1), maximize=True)
    counts = np.zeros(value.shape, dtype=np.int64)
    np.add.at(counts, (chosen // rows, places // columns), unit)
    return counts
