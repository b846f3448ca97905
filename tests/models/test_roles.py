"""Proves what is read off a network: neither padding, nor company, nor the padded vocabulary changes a row's numbers,
and each prompt of a ranking costs one forward a response.

Not proved here: the same numbers across layouts (invariance), against another implementation (parity).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import pad

from megatron_rlhf.batch import PackedRows, Rows
from megatron_rlhf.models import roles, vocabulary
from megatron_rlhf.models.transformer import Network
from megatron_rlhf.parallel.collectives import gather
from megatron_rlhf.recipes import losses
from megatron_rlhf.train import schedule
from megatron_rlhf.train.microbatch import Part, tokens
from tests.helpers import roles as tiny
from tests.helpers.grid import on_grid

READS = {"log-probs": roles.logprobs(), "values": roles.values(), "scores": roles.scores()}


@contextmanager
def counted(network: Network) -> Iterator[list[int]]:
    """The rows with any token that pass this rank's first stage inside the context, one number a forward."""
    seen: list[int] = []

    def count(_: object, arguments: tuple[torch.Tensor, ...], __: object = None) -> None:
        seen.append(int((arguments[0] != 0).any(1).sum()))

    handles = [chunk.register_forward_pre_hook(count) for chunk in network.chunks]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@on_grid(4)
@pytest.mark.parametrize("kind", READS)
@pytest.mark.parametrize("words", ["tp2 dp2 sp", "pp2 dp2"])
def test_padding_and_company_change_nothing(words: str, kind: str) -> None:
    """A row alone, among others, padded further right and with anything behind its end reads the same."""
    role = tiny.engine(words, READS[kind], scalar=kind != "log-probs")
    rows = tiny.rows(8)
    together = role.forward(rows)
    assert together.abs().max() > 0.1
    longest = tiny.rows(1, seed=99, longest=25)
    wide = Rows(pad(rows.tokens_BT, (0, 30)), rows.prompt_lengths_B, rows.lengths_B)
    behind = torch.arange(wide.tokens_BT.shape[1]) >= rows.lengths_B[:, None]
    noisy = Rows(wide.tokens_BT.masked_fill(behind, 7), rows.prompt_lengths_B, rows.lengths_B)
    assert torch.equal(role.forward(wide), together)
    assert torch.equal(role.forward(noisy), together)
    for b in range(len(rows)):
        width = int(rows.response_lengths_B[b])
        expected = together[b] if kind == "scores" else together[b, :width]
        alone = rows.select(torch.tensor([b]))
        torch.testing.assert_close(role.forward(alone)[0], expected, rtol=0, atol=1e-5)
        with_long = Rows(
            torch.cat(
                [
                    pad(alone.tokens_BT, (0, 50 - alone.tokens_BT.shape[1])),
                    pad(longest.tokens_BT, (0, 50 - longest.tokens_BT.shape[1])),
                ]
            ),
            torch.cat([alone.prompt_lengths_B, longest.prompt_lengths_B]),
            torch.cat([alone.lengths_B, longest.lengths_B]),
        )
        found = role.forward(with_long)[0]
        torch.testing.assert_close(found if kind == "scores" else found[:width], expected, rtol=0, atol=1e-5)


@on_grid(4)
@pytest.mark.parametrize("kind", READS)
@pytest.mark.parametrize("words", ["tp2 dp2 sp", "tp2 pp2"])
def test_a_left_padded_batch_reads_like_single_sequences(words: str, kind: str) -> None:
    """Rows that end together, as other programs lay them, in their own segment and counted from their own start: log-
    probs, values and scores within 1e-5 of each sequence alone."""
    role = tiny.engine(words, READS[kind], scalar=kind != "log-probs")
    rows = tiny.rows(8)
    grid, length = role.network.grid, int(rows.lengths_B.max()) // 4 * 4 + 4
    left = PackedRows(rows.tokens_BT, rows.prompt_lengths_B, rows.lengths_B, torch.arange(8), length - rows.lengths_B)
    part = Part(rows, torch.arange(8), left, 8, length, rows.width)
    assert tokens(part)[:, 0].count_nonzero() == 0
    assert tokens(part)[:, -1].count_nonzero() == 8

    def read(output: torch.Tensor, given: Part) -> torch.Tensor:
        return READS[kind].of(role.network, output, given.rows, given.width)

    stages = [chunk.eval() for chunk in role.network.chunks]
    with torch.no_grad():
        outputs = schedule.run(role.network, stages, [part], read, forward_only=True)
    for b in range(len(rows)):
        alone = role.forward(rows.select(torch.tensor([b])))[0]
        if grid.last_stage:
            found = outputs[0][b] if kind == "scores" else outputs[0][b, : len(alone)]
            torch.testing.assert_close(found, alone, rtol=0, atol=1e-5)


@on_grid(4)
def test_reads_stand_where_the_contract_says() -> None:
    """Column t is read at the position that predicts response token t; a score at the last response token."""
    rows = tiny.rows(6)
    policy, scalar = tiny.network(tiny.ONE), tiny.network(tiny.ONE, scalar=True)
    found = {
        kind: tiny.learner(policy if kind == "log-probs" else scalar, read).forward(rows)
        for kind, read in READS.items()
    }
    if not policy.grid.inside:
        return
    positions = torch.arange(rows.tokens_BT.shape[1]).expand_as(rows.tokens_BT)
    with torch.no_grad():
        logits = vocabulary.logits(policy, policy.chunks[0](rows.tokens_BT, positions, attention_mask=None))
        values = scalar.chunks[0](rows.tokens_BT, positions, attention_mask=None).squeeze(-1)
    for b in range(len(rows)):
        start, end = int(rows.prompt_lengths_B[b]), int(rows.lengths_B[b])
        width = end - start
        targets = rows.tokens_BT[b, start:end]
        expected = logits[b, start - 1 : end - 1, : tiny.MODEL.vocabulary].log_softmax(-1)
        expected = expected.gather(1, targets[:, None]).squeeze(1)
        torch.testing.assert_close(found["log-probs"][b, :width], expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(found["values"][b, :width], values[b, start - 1 : end - 1], rtol=0, atol=1e-5)
        torch.testing.assert_close(found["scores"][b], values[b, end - 1], rtol=0, atol=1e-5)
        assert not found["log-probs"][b, width:].any()
        assert not found["values"][b, width:].any()


@on_grid(4)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("words", "vocabulary"), [("tp2 pp2", 100), ("tp4", 100), ("tp4", 90)])
def test_the_padded_vocabulary_is_in_no_softmax(words: str, vocabulary: int, tied: bool) -> None:
    """Rows from the vocabulary on may hold anything: log-probs keep every bit, and no gradient reaches them.

    With 90 words the last of four shards has no true row at all.
    """
    model = replace(tiny.MODEL, vocabulary=vocabulary, tied=tied)
    role = tiny.engine(words, model=model)
    rows = tiny.rows(vocabulary=vocabulary)
    before = role.forward(rows)
    name = "embedding.word_embeddings.weight" if tied else "output_layer.weight"
    if name in role.network.parameters:
        true = max(0, vocabulary - role.network.vocab_start)
        with torch.no_grad():
            role.network.parameters[name][true:] = 50.0
    assert torch.equal(role.forward(rows), before)
    role.accumulate(rows, losses.language)
    gradient = tiny.step(role)[1][name]
    assert not gradient[vocabulary:].any()
    assert gradient[:vocabulary].any()


@on_grid(4)
def test_temperature_divides_logits() -> None:
    """Log-probs of the temperature-scaled softmax, over all words summing to 1."""
    role = tiny.engine("tp2 pp2")
    row = tiny.rows(1)
    every = torch.arange(tiny.MODEL.vocabulary)
    prompt = row.tokens_BT[:, : int(row.prompt_lengths_B)].expand(len(every), -1)
    lengths_B = torch.full((len(every),), prompt.shape[1])
    rows = Rows(torch.cat([prompt, every[:, None]], 1), lengths_B, lengths_B + 1)
    cold = role.forward(rows, roles.logprobs(0.5)).squeeze(1)
    plain = role.forward(rows).squeeze(1)
    torch.testing.assert_close(cold.exp().sum(), torch.tensor(1.0))
    torch.testing.assert_close(cold, (2 * plain).log_softmax(0), rtol=0, atol=1e-5)


@on_grid(4)
@pytest.mark.parametrize("words", [tiny.ONE, "dp2 @0-1", "tp2 pp2"])
def test_a_ranking_of_k_costs_k_forwards(words: str) -> None:
    """Each completion passes the network once, in training and in scoring; pairs would be K(K-1) rows."""
    rankings = tiny.rankings(8)
    existing = int((rankings.lengths_PK > 0).sum())
    k_P = (rankings.ranks_PK > 0).sum(1)
    assert existing == int(k_P.sum()) < int((k_P * (k_P - 1)).sum())
    role = tiny.engine(words, roles.scores(), scalar=True, micro_batch=8)
    for run in (lambda: role.accumulate(rankings, losses.ranking("surviving")), lambda: role.forward(rankings)):
        with counted(role.network) as seen:
            run()
        grid = role.network.grid
        mine = sum(seen) if grid.inside and grid.first_stage and grid.tp_rank == 0 else 0
        assert int(gather(torch.tensor([mine])).sum()) == existing
