"""Proves that a batch is cut into micro-batches of one shape that cover every element once, over all replicas.

Not proved here: what runs on them (schedule, gradient contract); several lengths (buckets) or rows a line (packing).
"""

from __future__ import annotations

import pytest
import torch

from megatron_rlhf.batch import Rankings, Rows
from megatron_rlhf.config.layout import Layout
from megatron_rlhf.parallel.grid import Grid
from megatron_rlhf.train.microbatch import Part, cut, positions, segments, tokens


def batch(lengths: list[int], width: int = 12) -> Rows:
    """Rows of the given lengths with prompts of one token; row b holds the token b + 1."""
    lengths_B = torch.tensor(lengths)
    tokens_BT = torch.arange(1, len(lengths) + 1)[:, None].expand(-1, width)
    return Rows(
        tokens_BT.masked_fill(torch.arange(width) >= lengths_B[:, None], 0), torch.ones_like(lengths_B), lengths_B
    )


def parts(whole: Rows | Rankings, dp: int, rows_each: int, words: str = "") -> list[list[Part]]:
    """The micro-batches of every replica; without buckets all are of one call."""
    layout = Layout.parse(f"dp{dp} {words}", dp * (2 if "tp2" in words else 1))
    calls = [cut(whole, Grid(layout, None, 0, 0, replica), rows_each) for replica in range(dp)]
    assert {len(mine) for mine in calls} == {1}
    return [parts for (parts,) in calls]


@pytest.mark.parametrize(("count", "dp", "rows_each"), [(1, 1, 4), (7, 2, 2), (8, 4, 1), (3, 4, 8), (13, 3, 5)])
def test_every_element_is_in_one_place(count: int, dp: int, rows_each: int) -> None:
    """All replicas get the same number of parts of the same shape; -1 fills what does not divide."""
    whole = batch([2 + b % 9 for b in range(count)])
    found = parts(whole, dp, rows_each)
    assert len({len(mine) for mine in found}) == 1
    every = [part for mine in found for part in mine]
    assert len({(part.lines, part.length, part.width) for part in every}) == 1
    assert every[0].lines == len(every[0].batch.rows) <= rows_each
    index = torch.cat([part.index_e for part in every])
    assert sorted(index[index >= 0].tolist()) == list(range(count))
    for part in every:
        for place, row in zip(part.index_e.tolist(), part.batch.rows.lengths_B.tolist(), strict=True):
            assert row == (whole.lengths_B[place] if place >= 0 else 0)


def test_replicas_share_the_long_rows() -> None:
    """Dealt longest first: the replicas' tokens differ by less than one longest row."""
    found = parts(batch([12, 11, 10, 9, 4, 3, 2, 2]), 2, 2)
    sums = [sum(int(part.batch.rows.lengths_B.sum()) for part in mine) for mine in found]
    assert abs(sums[0] - sums[1]) < 12


def test_a_ranking_stays_whole() -> None:
    """The K rows of a prompt are never cut apart, and at least one prompt fits."""
    ranks_PK = torch.tensor([[1, 2, 3]]).expand(5, 3).contiguous()
    lengths_PK = torch.arange(15).view(5, 3) % 6 + 2
    whole = Rankings(torch.ones(5, 3, 8, dtype=torch.int64), torch.ones_like(lengths_PK), lengths_PK, ranks_PK)
    for rows_each, prompts in ((2, 1), (7, 2)):
        for part in parts(whole, 1, rows_each)[0]:
            assert part.lines == len(part.batch.rows) == len(part.rows) == 3 * len(part.index_e)
            assert len(part.index_e) <= prompts


def test_length_divides_by_tp_under_sequence_parallelism_only() -> None:
    """Rows are padded or trimmed to the longest row, rounded up where activations are split along it."""
    whole = batch([5, 3])
    assert parts(whole, 1, 2, "tp2")[0][0].length == 5
    (part,) = parts(whole, 1, 2, "tp2 sp")[0]
    assert part.length == 6
    assert tokens(part).tolist() == [[1] * 5 + [0], [2] * 3 + [0] * 3]
    (long,) = parts(batch([5, 3], width=5), 1, 2, "tp2 sp")[0]
    assert tokens(long).tolist() == [[1] * 5 + [0], [2] * 3 + [0] * 3]


def test_a_row_alone_starts_at_position_0_and_needs_no_mask() -> None:
    """Unpacked, positions count up over the whole line and no segments are made."""
    for part in parts(batch([5, 3, 2]), 1, 2)[0]:
        assert positions(part).tolist() == [list(range(5))] * 2
        assert segments(part) is None


@pytest.mark.parametrize("count", [1, 3, 8, 9])
def test_virtual_stages_get_micro_batches_by_the_number_of_stages(count: int) -> None:
    """Megatron's interleaved schedule refuses other numbers; empty micro-batches fill, in every bucket."""
    layout = Layout.parse("pp2 vp2", 2)
    whole = batch([2 + b % 9 for b in range(count)])
    calls = cut(whole, Grid(layout, None, 0, 0, 0), 1, buckets=3)
    assert all(len(parts) % 2 == 0 for parts in calls)
    index = torch.cat([part.index_e for parts in calls for part in parts])
    assert sorted(index[index >= 0].tolist()) == list(range(count))
