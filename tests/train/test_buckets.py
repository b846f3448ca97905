"""Proves that several row lengths in one pass save padding as well as can be, and change no loss, gradient or value.

Not proved here: what the extra calls of the schedule cost; packed rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rlhf.batch import Rows
from megatron_rlhf.config.layout import Layout
from megatron_rlhf.models import roles
from megatron_rlhf.parallel.grid import Grid
from megatron_rlhf.recipes import losses
from megatron_rlhf.train.engine import Engine
from megatron_rlhf.train.microbatch import cut
from megatron_rlhf.train.packing import groups
from tests.helpers import roles as tiny
from tests.helpers.grid import on_grid

CANCELLED = ("head.bias", "decoder.final_layernorm.bias")
"""What moves all scores alike has no gradient in a loss of pairs; what is left of it is rounding noise."""
LIMIT = {"rows": 1e-6, "experience": 2e-6, "rankings": 2e-6}
"""Relative; advantages and differences of scores have both signs and cancel more digits."""
MORE = ["dp4", "pp4", "tp4 sp", "tp2 pp2 sp"]
SLOW = pytest.mark.slow
FALLING = st.lists(st.integers(0, 9), min_size=1, max_size=9).map(lambda lengths: sorted(lengths, reverse=True))


def passed(lengths: Sequence[int], sizes: Sequence[int]) -> int:
    """Tokens that pass, for one row a micro-batch, when each group has the length of its first."""
    starts = [sum(sizes[:place]) for place in range(len(sizes))]
    return sum(size * lengths[start] for start, size in zip(starts, sizes, strict=True))


@given(FALLING, st.integers(1, 4))
@settings(deadline=None, max_examples=200)
def test_no_other_boundaries_pass_fewer_tokens(lengths: list[int], most: int) -> None:
    """All ways to cut are tried; of equal ones none has fewer groups."""
    found = groups(lengths, most)
    assert sum(found) == len(lengths)
    assert len(found) <= most
    ways = []
    for count in range(1, most + 1):
        for cuts in combinations(range(1, len(lengths)), count - 1):
            edges = [0, *cuts, len(lengths)]
            sizes = [end - start for start, end in zip(edges, edges[1:], strict=False)]
            ways.append((passed(lengths, sizes), count))
    assert (passed(lengths, found), len(found)) == min(ways)


@given(FALLING, st.integers(1, 4), st.integers(1, 3))
@settings(deadline=None, max_examples=100)
def test_groups_are_multiples_of_the_step(lengths: list[int], most: int, step: int) -> None:
    found = groups(lengths, most, step)
    assert sum(found) == len(lengths)
    assert all(size % step == 0 for size in found[:-1])


@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=30),
    st.integers(1, 3),
    st.integers(1, 5),
    st.integers(1, 4),
    st.booleans(),
)
@settings(deadline=None, max_examples=60)
def test_every_element_is_in_one_place_on_all_replicas(
    lengths: list[int], dp: int, rows_each: int, buckets: int, sp: bool
) -> None:
    """Calls have the same shapes on all replicas, lengths fall and hold their rows; more buckets pass fewer tokens."""
    lengths_B = torch.tensor(lengths)
    whole = Rows(torch.ones(len(lengths), 40, dtype=torch.int64), lengths_B.clamp(max=1), lengths_B)
    layout = Layout.parse(f"dp{dp} tp2{' sp' * sp}", 2 * dp)
    every = [cut(whole, Grid(layout, None, 0, 0, replica), rows_each, buckets=buckets) for replica in range(dp)]
    shapes = [[[(part.lines, part.length) for part in parts] for parts in calls] for calls in every]
    assert all(shape == shapes[0] for shape in shapes)
    assert len(shapes[0]) <= buckets
    assert all(len(set(parts)) == 1 for parts in shapes[0])
    line_lengths = [parts[0][1] for parts in shapes[0]]
    assert line_lengths == sorted(set(line_lengths), reverse=True)
    if sp:
        assert all(length % 2 == 0 for length in line_lengths)
    parts = [part for calls in every for parts in calls for part in parts]
    index = torch.cat([part.index_e for part in parts])
    assert sorted(index[index >= 0].tolist()) == list(range(len(lengths)))
    assert all(int(part.rows.lengths_B.max()) <= part.length for part in parts)
    (one,) = cut(whole, Grid(layout, None, 0, 0, 0), rows_each)
    tokens = sum(lines * length for parts in shapes[0] for lines, length in parts)
    assert tokens <= len(one) * one[0].lines * one[0].length


def bucketed(role: Engine, buckets: int) -> Engine:
    """The role with that many lengths a pass."""
    role.compute = replace(role.compute, buckets=buckets)
    return role


def cases() -> dict[str, tuple[roles.Read, Any, Callable[..., Any]]]:
    """(read, batch, loss) of the kinds of batches that engines take."""
    return {
        "rows": (roles.logprobs(), tiny.rows(13), losses.language),
        "experience": (roles.logprobs(), tiny.experience(count=13), losses.policy(0.2)),
        "rankings": (roles.scores(), tiny.rankings(9), losses.ranking("surviving")),
    }


@on_grid(4)
@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("rows", tiny.ONE),
        ("rows", "tp2 pp2"),
        ("rows", "tp2 dp2 sp"),
        ("experience", "tp2 dp2 sp"),
        ("rankings", "tp2 pp2"),
        *(pytest.param(kind, words, marks=SLOW) for kind in ("rows", "experience", "rankings") for words in MORE),
    ],
)
def test_losses_gradients_and_values_are_those_of_one_length(kind: str, words: str) -> None:
    """Three lengths in a pass: the loss and every gradient are plain autograd's over the whole batch."""
    read, batch, loss = cases()[kind]
    scalar = kind == "rankings"
    role = bucketed(tiny.engine(words, read, micro_batch=4 if scalar else 2, scalar=scalar), 3)
    if role.network.grid.inside:
        calls = cut(batch, role.network.grid, role.compute.micro_batch, buckets=3)
        assert len({parts[0].length for parts in calls}) == len(calls) > 1
    one = bucketed(tiny.engine(words, read, micro_batch=20, scalar=scalar), 1)
    torch.testing.assert_close(role.forward(batch), one.forward(batch), rtol=1e-5, atol=1e-6)
    stats, whole = role.accumulate(batch, loss), one.accumulate(batch, loss)
    for name in stats.sums:
        assert stats[name] == pytest.approx(whole[name], rel=1e-6, abs=1e-7), name
    oracle = tiny.plain_gradients(tiny.network(tiny.ONE, scalar=scalar), read, [(batch, loss, 1.0)])
    found = tiny.step(role)[1]
    for name in CANCELLED if scalar else ():
        assert max(found.pop(name).abs().max(), oracle.pop(name).abs().max()) < 1e-7
    assert tiny.distance(found, oracle) < LIMIT[kind]
