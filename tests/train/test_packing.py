"""Proves that rows laid end to end in one line cost fewer tokens and change nothing: neither a row's numbers, nor what
a loss sees, nor a gradient.

Not proved here: attention other than our own (Transformer Engine); dropout, whose masks differ where rows lie
elsewhere.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_rlhf.batch import PackedRows, Rows
from megatron_rlhf.config.layout import Layout
from megatron_rlhf.models import roles
from megatron_rlhf.models.attention import block_diagonal
from megatron_rlhf.observe.stats import Stats
from megatron_rlhf.parallel.grid import Grid
from megatron_rlhf.recipes import losses
from megatron_rlhf.train.engine import Engine
from megatron_rlhf.train.microbatch import Part, cut, positions, segments, tokens
from megatron_rlhf.train.packing import first_fit
from tests.helpers import roles as tiny
from tests.helpers.grid import on_grid

SKEWED = [20, 3, 2, 5, 9, 2, 7, 4, 3, 2, 11, 2, 6]
"""One long row and many short ones, as demonstrations are."""


def skewed(lengths: list[int] = SKEWED, seed: int = 2) -> Rows:
    """Rows of these lengths and random tokens, the prompt a third of each."""
    lengths_B, generator = torch.tensor(lengths), torch.Generator().manual_seed(seed)
    tokens_BT = torch.randint(1, 100, (len(lengths), max(lengths)), generator=generator)
    tokens_BT = tokens_BT.masked_fill(torch.arange(max(lengths)) >= lengths_B[:, None], 0)
    return Rows(tokens_BT, (lengths_B // 3).clamp(min=1).minimum(lengths_B), lengths_B)


@given(st.lists(st.integers(0, 12), max_size=40), st.integers(12, 30))
@settings(deadline=None, max_examples=200)
def test_first_fit_decreasing(lengths: list[int], capacity: int) -> None:
    """Every row of any token once, no line above the capacity, each row in the first line that had room for it."""
    lines = first_fit(lengths, capacity)
    assert sorted(row for line in lines for row in line) == [row for row, length in enumerate(lengths) if length]
    plain: list[list[int]] = []
    for row in sorted((row for row, length in enumerate(lengths) if length), key=lambda row: -lengths[row]):
        fits = [line for line in plain if sum(lengths[other] for other in line) + lengths[row] <= capacity]
        if not fits:
            plain.append([])
        (fits or plain[-1:])[0].append(row)
    assert lines == plain


def test_a_row_above_the_capacity_is_refused() -> None:
    with pytest.raises(ValueError, match="a row of 9 tokens does not fit a line of 8"):
        first_fit([3, 9], 8)


@given(
    st.lists(st.integers(0, 17), min_size=1, max_size=25),
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(1, 2),
    st.integers(0, 40),
    st.booleans(),
)
@settings(deadline=None, max_examples=100)
def test_every_token_lies_in_one_place(
    lengths: list[int], dp: int, rows_each: int, buckets: int, pack_tokens: int, sp: bool
) -> None:
    """Over all replicas each row lies once, whole, from its position 0 on and in a segment of its own; shapes agree."""
    whole = skewed([*lengths, 1])
    layout = Layout.parse(f"dp{dp} tp2{' sp' * sp}", 2 * dp)
    every = [
        cut(whole, Grid(layout, None, 0, 0, r), rows_each, buckets=buckets, packed=True, pack_tokens=pack_tokens)
        for r in range(dp)
    ]
    shapes = [[[(part.lines, part.length) for part in parts] for parts in calls] for calls in every]
    assert all(shape == shapes[0] for shape in shapes)
    assert all(len(set(parts)) == 1 for parts in shapes[0])
    longest = max(*lengths, 2)
    seen: list[int] = []
    for part in [part for calls in every for parts in calls for part in parts]:
        assert part.lines <= rows_each
        assert part.length <= max(longest, pack_tokens) + 1
        assert not sp or part.length % 2 == 0
        check(part, whole)
        seen += part.index_e[part.index_e >= 0].tolist()
    assert sorted(seen) == [row for row, length in enumerate([*lengths, 1]) if length]


def check(part: Part, whole: Rows) -> None:
    """A micro-batch's inputs are its rows' tokens, positions and segments and nothing else."""
    laid, places, blocks = tokens(part), positions(part), segments(part)
    assert laid.shape == places.shape == (part.lines, part.length)
    filled = 0
    for b, ((line, start), row) in enumerate(
        zip(torch.stack(part.rows.places(), 1).tolist(), part.index_e.tolist(), strict=True)
    ):
        length = int(whole.lengths_B[row]) if row >= 0 else 0
        here = slice(start, start + length)
        assert torch.equal(laid[line, here], whole.tokens_BT[row, :length])
        assert places[line, here].tolist() == list(range(length))
        if blocks is not None:
            assert (blocks[line, here] == b + 1).all()
        filled += length
    assert int((laid != 0).sum()) == filled
    if blocks is not None:
        assert int((blocks != 0).sum()) == filled
        assert not places[blocks == 0].any()


def test_full_rows_are_not_packed() -> None:
    """Where no two rows share a line, positions, shapes and attention are those of unpacked rows."""
    whole = skewed([8] * 6)
    grid = Grid(Layout.parse("dp1", 1), None, 0, 0, 0)
    (plain,), (packed,) = cut(whole, grid, 4), cut(whole, grid, 4, packed=True)
    assert [part.length for part in plain] == [part.length for part in packed] == [8, 8]
    for left, right in zip(plain, packed, strict=True):
        assert not isinstance(right.rows, PackedRows)
        assert segments(right) is None
        assert torch.equal(tokens(left), tokens(right))


def test_a_query_sees_its_own_segment_up_to_itself() -> None:
    blocks = block_diagonal(torch.tensor([[1, 1, 2, 0, 0]]))
    assert blocks[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 0, 1, 0, 0],
        [0, 0, 0, 1, 0],
        [0, 0, 0, 1, 1],
    ]


def packing(role: Engine, pack_tokens: int = 0, buckets: int = 1) -> Engine:
    """The role with packing on."""
    role.compute = replace(role.compute, packing=True, pack_tokens=pack_tokens, buckets=buckets)
    return role


def lines_of(role: Engine, batch: Rows) -> int:
    """Lines that pass the role's network for a batch, all replicas together."""
    compute = role.compute
    calls = cut(batch, role.network.grid, compute.micro_batch, packed=True, pack_tokens=compute.pack_tokens)
    return sum(part.lines for parts in calls for part in parts) * role.network.grid.layout.dp


def compare(words: str, recompute: str, pack_tokens: int, buckets: int, normalisation: str) -> None:
    """Loss and gradients of packed rows are those of plain autograd over the batch as it is. Collective: world."""
    batch, loss = skewed(), losses.language_per(normalisation)
    role = packing(tiny.engine(words, micro_batch=2, recompute=recompute), pack_tokens, buckets)
    if role.network.grid.inside:
        assert lines_of(role, batch) <= len(batch) // 2 + 2
    stats = role.accumulate(batch, loss, 2.0, packable=True)
    plain = tiny.engine(words, micro_batch=2).accumulate(batch, loss, 2.0, packable=True)
    assert stats["loss.language"] == pytest.approx(plain["loss.language"], rel=1e-6)
    oracle = tiny.plain_gradients(tiny.network(tiny.ONE), roles.logprobs(), [(batch, loss, 2.0)])
    assert tiny.distance(tiny.step(role)[1], oracle) < 1e-6


@on_grid(4)
@pytest.mark.parametrize(
    ("words", "recompute"),
    [(tiny.ONE, "none"), ("tp2 pp2", "none"), ("tp2 dp2 sp", "none"), ("tp2 pp2", "full"), ("tp2 dp2 sp", "selective")],
)
def test_packed_is_unpacked(words: str, recompute: str) -> None:
    """The gradient of every tensor and the loss, over pipeline, shards, replicas and recomputed layers."""
    compare(words, recompute, 0, 1, "tokens")


@on_grid(4)
@pytest.mark.slow
@pytest.mark.parametrize(
    ("pack_tokens", "buckets", "normalisation"), [(0, 2, "tokens"), (33, 1, "rows"), (70, 2, "tokens")]
)
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("words", ["tp4 sp", "pp4", "dp4", "tp2 pp2 sp", "pp2 dp2"])
def test_packed_is_unpacked_everywhere(
    words: str, recompute: str, pack_tokens: int, buckets: int, normalisation: str
) -> None:
    """More layouts; lines longer than a row, and than the model's context (64); several lengths."""
    compare(words, recompute, pack_tokens, buckets, normalisation)


@on_grid(4)
@pytest.mark.parametrize("words", [tiny.ONE, "pp2 dp2"])
def test_lines_may_be_longer_than_the_context(words: str) -> None:
    """Positions start anew with each row, so 70 tokens a line pass a network that knows 64 positions."""
    compare(words, "none", 70, 1, "tokens")


@on_grid(4)
@pytest.mark.parametrize("words", ["tp2 pp2", "tp2 dp2 sp"])
def test_a_loss_sees_what_it_sees_unpacked(words: str) -> None:
    """The log-probs of every row's response, column for column, at the same width; empty rows are left out."""
    batch = skewed()
    batch = batch.select(torch.tensor([-1, *range(len(batch)), -1]))
    role = packing(tiny.engine(words))
    expected_BR = role.forward(batch)
    seen: list[int] = []

    def loss(logprobs_bR: Tensor, part: Rows, whole: Rows) -> tuple[Tensor, Stats]:
        for b in range(len(part)):
            if part.lengths_B[b]:
                (row,) = (part.tokens_BT[b] == whole.tokens_BT).all(1).nonzero().flatten().tolist()
                torch.testing.assert_close(logprobs_bR[b], expected_BR[row], rtol=0, atol=1e-5)
                seen.append(row)
        return losses.language(logprobs_bR, part, whole)

    role.accumulate(batch, loss, packable=True)
    grid = role.network.grid
    if grid.layout.dp == 1 and grid.last_stage:
        assert sorted(seen) == list(range(1, len(batch) - 1))
    tiny.step(role)


@on_grid(4)
@pytest.mark.parametrize("kind", ["log-probs", "values", "scores"])
def test_neighbours_in_a_line_change_no_bit(kind: str) -> None:
    """Other tokens in all other rows leave a row's numbers as they are; alone it reads the same up to rounding."""
    read = {"log-probs": roles.logprobs(), "values": roles.values(), "scores": roles.scores()}[kind]
    role = tiny.engine(tiny.ONE, read, scalar=kind != "log-probs")
    if not role.network.grid.inside:
        return
    batch, other = skewed(), skewed(seed=3)
    stage = role.network.chunks[0].eval()

    def read_off(rows: Rows) -> Tensor:
        (parts,) = cut(rows, role.network.grid, len(rows), packed=True)
        (part,) = parts
        with torch.no_grad():
            output = stage(tokens(part), positions(part), attention_mask=segments(part))
            found = read.of(role.network, output, part.rows, part.width)
        return found[part.index_e.argsort()]

    packed = read_off(batch)
    for b in range(len(batch)):
        mixed = replace(other, tokens_BT=other.tokens_BT.clone())
        mixed.tokens_BT[b] = batch.tokens_BT[b]
        assert torch.equal(read_off(mixed)[b], packed[b])
        alone = batch.select(torch.tensor([b]))
        with torch.no_grad():
            line = alone.tokens_BT[:, : max(2, int(alone.lengths_B))]
            output = stage(line, torch.arange(line.shape[1])[None], attention_mask=None)
        expected = read.of(role.network, output, alone, batch.width)[0]
        torch.testing.assert_close(packed[b], expected, rtol=0, atol=1e-5)


@on_grid(4)
def test_packing_is_for_what_may_be_packed() -> None:
    """Without `packable`, or with the setting off, rows lie alone: the same bits as ever."""
    batch = skewed()
    gradients = []
    for packable, setting in ((False, True), (True, False), (False, False)):
        role = tiny.engine("tp2 dp2 sp")
        role.compute = replace(role.compute, packing=setting)
        role.accumulate(batch, losses.language, packable=packable)
        gradients.append(tiny.step(role)[1])
    assert tiny.equal(gradients[0], gradients[2])
    assert tiny.equal(gradients[1], gradients[2])
