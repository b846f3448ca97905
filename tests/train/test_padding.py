"""Proves that padding changes no gradient: empty rows, longer lines, odd lengths under sequence parallelism, and
rankings of different K in one call.

Not proved here: what is read of padded rows (models/test_roles), packed rows.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad

from megatron_rlhf.batch import Rankings, Rows, joined
from megatron_rlhf.models import roles
from megatron_rlhf.observe.stats import Stats
from megatron_rlhf.recipes import losses
from megatron_rlhf.train.microbatch import cut
from tests.helpers import roles as tiny
from tests.helpers.grid import on_grid

LAYOUTS = [tiny.ONE, "tp2 pp2", "tp2 dp2 sp"]


def longest_is(length: int) -> Rows:
    """Ragged rows of which the longest has `length` tokens."""
    rows = tiny.rows(9)
    lengths_B = rows.lengths_B.clamp(max=length)
    lengths_B[0] = length
    tokens_BT = pad(rows.tokens_BT, (0, 20))[:, :length].masked_fill(torch.arange(length) >= lengths_B[:, None], 0)
    tokens_BT[0] = torch.arange(1, length + 1)
    return Rows(tokens_BT, rows.prompt_lengths_B.minimum(lengths_B - 1), lengths_B)


def oracle(rows: Rows) -> dict[str, Tensor]:
    """The gradient of the language loss by plain autograd. Collective: world."""
    return tiny.plain_gradients(tiny.network(tiny.ONE), roles.logprobs(), [(rows, losses.language, 1.0)])


@on_grid(4)
@pytest.mark.parametrize("words", LAYOUTS)
def test_empty_rows_and_longer_lines_change_no_gradient(words: str) -> None:
    """Five empty rows, columns of padding, and a row of prompt alone that makes every line 40 tokens long."""
    rows = tiny.rows(7)
    expected = oracle(rows)
    wide = Rows(pad(rows.tokens_BT, (0, 30)), rows.prompt_lengths_B, rows.lengths_B)
    with_empty = wide.select(torch.tensor([-1, 0, 1, -1, 2, 3, 4, -1, -1, 5, 6, -1]))
    prompt = Rows(torch.full((1, 40), 3), torch.tensor([40]), torch.tensor([40]))
    for padded in (with_empty, joined(with_empty, prompt)):
        role = tiny.engine(words)
        stats = role.accumulate(padded, losses.language)
        assert stats.weights["loss.language"] == int(rows.response_lengths_B.sum())
        assert tiny.distance(tiny.step(role)[1], expected) < 1e-6


@on_grid(4)
@pytest.mark.parametrize(
    ("words", "length"), [("tp2 dp2 sp", 3), ("tp2 dp2 sp", 17), ("tp4 sp", 2), ("tp4 sp", 13), ("tp2 pp2 sp", 13)]
)
def test_any_length_passes_under_sequence_parallelism(words: str, length: int) -> None:
    """The line is rounded up to a multiple of tp; loss and gradients are those of the rows as they are."""
    rows = longest_is(length)
    role = tiny.engine(words)
    tp = role.network.grid.layout.tp
    if role.network.grid.inside:
        (parts,) = cut(rows, role.network.grid, 4)
        assert {part.length for part in parts} == {-(-length // tp) * tp}
    role.accumulate(rows, losses.language)
    assert tiny.distance(tiny.step(role)[1], oracle(rows)) < 1e-6


def whole_loss(ranked: Rankings) -> losses.Loss:
    """The ranking loss of a part, divided by the prompts of `ranked`."""
    inner = losses.ranking("surviving")

    def loss(scores: Tensor, part: Rankings, _: Rankings) -> tuple[Tensor, Stats]:
        return inner(scores, part, ranked)

    return loss


@on_grid(4)
@pytest.mark.parametrize("words", LAYOUTS)
def test_rankings_of_different_k_in_one_call(words: str) -> None:
    """Filled up to the largest K and cut over micro-batches, or each prompt alone with its own K: one gradient."""
    ranked = tiny.rankings(7, most=5)
    k_P = (ranked.ranks_PK > 0).sum(1).tolist()
    assert len(set(k_P)) > 2
    role = tiny.engine(words, roles.scores(), micro_batch=10, scalar=True)
    role.accumulate(ranked, losses.ranking("surviving"))
    terms = []
    for place, k in enumerate(k_P):
        one = ranked.select(torch.tensor([place]))
        alone = Rankings(
            one.tokens_PKT[:, :k], one.prompt_lengths_PK[:, :k], one.lengths_PK[:, :k], one.ranks_PK[:, :k]
        )
        terms.append((alone, whole_loss(ranked), 1.0))
    expected = tiny.plain_gradients(tiny.network(tiny.ONE, scalar=True), roles.scores(), terms)
    found = tiny.step(role)[1]
    for name in ("head.bias", "decoder.final_layernorm.bias"):  # a shift of all scores cancels: rounding noise
        assert max(found.pop(name).abs().max(), expected.pop(name).abs().max()) < 1e-7
    assert tiny.distance(found, expected) < 2e-6
