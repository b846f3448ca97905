"""Proves that the exact KL of an annotated rollout is the sum over the vocabulary, in every layout, with a reference of
its own or one that lodges in the policy's place, a few positions at a time; that the log-probs beside it are those of
the plain passes; that equal models are exactly 0 apart, and that passes which do not fit each other are refused.

Not proved here: 16-bit models, CUDA, and how much memory is gained.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_rlhf.batch import Annotated, Rollout, Rows
from megatron_rlhf.config.schema import Compute, Model
from megatron_rlhf.models import exact_kl, roles, vocabulary
from megatron_rlhf.models.exact_kl import ExactKl
from megatron_rlhf.parallel import vocab
from megatron_rlhf.parallel.collectives import broadcast
from megatron_rlhf.reshard import move
from megatron_rlhf.rollout.annotate import annotate
from megatron_rlhf.train.engine import Engine
from megatron_rlhf.train.offload import Lodger
from tests.helpers import roles as tiny
from tests.helpers.grid import on_grid

COMPUTE = Compute(micro_batch=2, forward_micro_batch=4, buckets=3)
POLICY, REFERENCE = 77, 5
WORDS = ["tp2 pp2", "tp2 pp2 sp", "pp2 dp2", "tp2 dp2 sp", "tp2 pp2 vp2", "tp2 @1-2"]
T = 0.8


def frozen(words: str, seed: int, model: Model = tiny.MODEL, compute: Compute = COMPUTE, **settings: Any) -> Engine:
    """A role that does not learn, at the temperature of these tests. Collective: world."""
    return Engine(tiny.network(words, model, seed=seed, **settings), roles.logprobs(T), compute)


def valued(words: str) -> Engine:
    """A value model. Collective: world."""
    return Engine(tiny.network(words, scalar=True), roles.values(), COMPUTE)


def rollout(rows: Rows) -> Rollout:
    """The rows with made-up scores."""
    mask_BR = rows.response_mask_BR(rows.width)
    return Rollout(rows, mask_BR, torch.ones(len(rows), dtype=torch.int64), torch.zeros(len(rows)))


def oracle(rows: Rows, model: Model) -> Tensor:
    """[4, B, R]: log-prob, entropy, KL and reference log-prob in float64 from whole logits of both models, made on one
    rank, on every rank. Collective: world."""
    networks = [tiny.network(tiny.ONE, model, seed=seed) for seed in (POLICY, REFERENCE)]
    found_4BR = torch.zeros(4, len(rows), rows.width, dtype=torch.float64)
    if networks[0].grid.inside:
        positions_BT = torch.arange(rows.tokens_BT.shape[1]).expand_as(rows.tokens_BT)
        with torch.no_grad():
            p_BTV, q_BTV = (
                (vocabulary.logits(each, each.chunks[0](rows.tokens_BT, positions_BT, attention_mask=None)) / T)[
                    ..., : model.vocabulary
                ]
                .double()
                .log_softmax(-1)
                for each in networks
            )
        for b in range(len(rows)):
            start, end = int(rows.prompt_lengths_B[b]), int(rows.lengths_B[b])
            p_rV, q_rV = p_BTV[b, start - 1 : end - 1], q_BTV[b, start - 1 : end - 1]
            targets_r1 = rows.tokens_BT[b, start:end, None]
            entropy_r, kl_r = -(p_rV.exp() * p_rV).sum(1), (p_rV.exp() * (p_rV - q_rV)).sum(1)
            drawn = [x_rV.gather(1, targets_r1)[:, 0] for x_rV in (p_rV, q_rV)]
            found_4BR[:, b, : end - start] = torch.stack([drawn[0], entropy_r, kl_r, drawn[1]])
    return broadcast(found_4BR, 0)


def answers(annotated: Annotated) -> Tensor:
    """[4, B, R] in the oracle's order."""
    assert annotated.entropy_BR is not None and annotated.exact_kl_BR is not None
    found = (annotated.old_logprobs_BR, annotated.entropy_BR, annotated.exact_kl_BR, annotated.reference_logprobs_BR)
    return torch.stack(found)


def same(left: Annotated, right: Annotated, *, but: tuple[str, ...] = ()) -> bool:
    """Whether all tensors are bit-equal, `but` some fields."""
    names = [field.name for field in fields(left) if field.name not in ("rollout", *but)]
    return all(torch.equal(getattr(left, name), getattr(right, name)) for name in names)


@on_grid(4)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("words", WORDS)
def test_the_kl_is_the_sum_over_the_vocabulary(words: str, tied: bool) -> None:
    """To 1e-5 of float64 over whole logits, as entropy and both log-probs are; those are within 1e-6 of the plain
    passes', which know no KL; values are the same bits. 13 rows, so that replicas pad."""
    model, rows = replace(tiny.MODEL, tied=tied), tiny.rows(13)
    policy, reference, value = frozen(words, POLICY, model), frozen(words, REFERENCE, model), valued(words)
    with mock.patch.object(vocabulary, "FORWARD_ROWS", 5):
        found = annotate(rollout(rows), policy, reference, value, ExactKl(T))
    expected_4BR = oracle(rows, model)
    torch.testing.assert_close(answers(found).double(), expected_4BR, rtol=0, atol=1e-5)
    assert expected_4BR[2].max() > 0.1 and expected_4BR[1].max() > 1
    assert found.exact_kl_BR is not None and found.exact_kl_BR.min() >= 0
    plain = annotate(rollout(rows), policy, reference, value)
    assert plain.exact_kl_BR is None and plain.entropy_BR is None
    for name in ("old_logprobs_BR", "reference_logprobs_BR"):
        torch.testing.assert_close(getattr(found, name), getattr(plain, name), rtol=0, atol=1e-6)
    assert torch.equal(found.values_BR, plain.values_BR) and torch.equal(found.mask_BR, plain.mask_BR)


@on_grid(4)
@pytest.mark.parametrize(("words", "tied"), [("tp2 pp2", True), ("tp2 dp2 sp", False), ("tp2 pp2 vp2", True)])
def test_a_reference_that_lodges_is_compared_like_one_of_its_own(words: str, tied: bool) -> None:
    """Bit for bit, before the policy has moved (exactly 0 apart) and after; the policy keeps its weights."""
    model, rows = replace(tiny.MODEL, tied=tied), tiny.rows(13)
    policy, own, value = frozen(words, REFERENCE, model), frozen(words, REFERENCE, model), valued(words)
    lodger = Lodger(policy, roles.logprobs(T), COMPUTE)
    for reference in (own, lodger):
        found = annotate(rollout(rows), policy, reference, value, ExactKl(T))
        assert found.exact_kl_BR is not None and not found.exact_kl_BR.any()
        assert torch.equal(found.old_logprobs_BR, found.reference_logprobs_BR)
    move.copy(tiny.network(words, model, seed=POLICY), policy.network)
    before = [parameter.detach().clone() for parameter in policy.network.parameters.values()]
    found, expected = (annotate(rollout(rows), policy, reference, value, ExactKl(T)) for reference in (lodger, own))
    assert same(found, expected)
    torch.testing.assert_close(answers(found).double(), oracle(rows, model), rtol=0, atol=1e-5)
    after = policy.network.parameters.values()
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


class Widest(TorchDispatchMode):
    """The most rows that any tensor of `width` columns has, but for the transposed head itself."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.width = width
        self.head = (hidden, width)
        self.rows = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for each in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(each, Tensor) and each.shape[-1:] == (self.width,) != each.shape != self.head:
                self.rows = max(self.rows, each.numel() // self.width)
        return result


@contextlib.contextmanager
def counted() -> Iterator[list[int]]:
    """Rows of every call of `vocab.kl` inside."""
    seen: list[int] = []
    inner = vocab.kl

    def counting(logits: Tensor, reference: Tensor, targets: Tensor, **where: Any) -> tuple[Tensor, ...]:
        assert logits.shape == reference.shape
        seen.append(len(targets))
        return inner(logits, reference, targets, **where)

    with mock.patch.object(vocab, "kl", counting):
        yield seen


@on_grid(4)
@pytest.mark.parametrize(("head_rows", "most"), [(0, 7), (3, 3), (100, 7)])
def test_logits_exist_for_a_few_positions_at_a_time(head_rows: int, most: int) -> None:
    """`head_rows`, and never more than FORWARD_ROWS (here 7), of either model: no tensor as wide as a slice of the
    vocabulary has more rows. What was kept is given back."""
    model, rows = replace(tiny.MODEL, vocabulary=203), tiny.rows(13)
    policy, reference = (frozen("tp2 pp2", seed, model, rows=208) for seed in (POLICY, REFERENCE))
    value, compared = valued("tp2 pp2"), ExactKl(T, head_rows=head_rows)
    with mock.patch.object(vocabulary, "FORWARD_ROWS", 7), counted() as seen, Widest(104, model.hidden) as widest:
        annotate(rollout(rows), policy, reference, value, compared)
    last = policy.network.grid.last_stage
    assert sum(seen) == (int(rows.response_lengths_B.sum()) if last else 0)
    assert max(seen, default=most) == most == (widest.rows or most)
    assert not compared._waiting


@on_grid(4)
def test_what_does_not_fit_is_refused() -> None:
    """Another layout, another cut, other rows, rows that one pass alone reads."""
    rows, others = tiny.rows(12), tiny.rows(12, seed=4)
    policy, value = frozen("tp2 dp2", POLICY), valued("tp2 dp2")
    elsewhere = frozen("tp2 pp2", REFERENCE)
    with pytest.raises(ValueError, match="in one layout, not in tp2 pp1 dp2 and tp2 pp2 dp1"):
        annotate(rollout(rows), policy, elsewhere, value, ExactKl(T))
    reference = frozen("tp2 dp2", REFERENCE, compute=replace(COMPUTE, buckets=1))
    with pytest.raises(ValueError, match="cut alike, into the same micro-batches and buckets"):
        annotate(rollout(rows), policy, reference, value, ExactKl(T))
    compared = ExactKl(T)
    with pytest.raises(RuntimeError, match="a micro-batch that the reference did not"):
        policy.forward(rows, compared.compared())
    kept_B = reference.forward(rows, compared.kept(lent=False))
    assert kept_B.tolist() == rows.response_lengths_B.tolist()
    with pytest.raises(RuntimeError, match="other rows in this micro-batch"):
        policy.forward(others, compared.compared())
    with pytest.raises(RuntimeError, match="micro-batches that the policy did not"):
        compared.finish()
    moved = Rows(rows.tokens_BT, rows.prompt_lengths_B + (rows.prompt_lengths_B < rows.lengths_B - 1), rows.lengths_B)
    assert not exact_kl._same(rows, moved) and exact_kl._same(rows, rows.select(torch.arange(12)))


def test_the_sample_mean_of_k1_is_the_exact_kl() -> None:
    """Over 200,000 draws a row, within 5 standard errors; the exact number has no spread at all."""
    generator = torch.Generator().manual_seed(1)
    p_NV, q_NV = (torch.randn(3, 11, generator=generator) * 1.5 for _ in range(2))
    for p_V, q_V in zip(p_NV, q_NV, strict=True):
        drawn_D = torch.multinomial(p_V.double().softmax(0), 200_000, replacement=True, generator=generator)
        logprobs, _, exact, reference = vocab.kl(
            p_V.expand(11, -1), q_V.expand(11, -1), torch.arange(11), vocab_start=0, vocab_size=11
        )
        k1_D = (logprobs - reference).double()[drawn_D]
        assert exact.unique().numel() == 1 and exact[0] > 0.1
        assert abs(float(k1_D.mean() - exact[0])) < 5 * float(k1_D.std()) / 200_000**0.5


def test_an_exact_kl_travels_with_its_episodes_and_may_be_absent() -> None:
    made = tiny.experience()
    kl_BR = torch.rand(made.mask_BR.shape, generator=torch.Generator().manual_seed(2)) * made.mask_BR
    annotated = replace(made.annotated, exact_kl_BR=kl_BR)
    index = torch.tensor([4, -1, 0])
    picked = annotated.select(index)
    assert picked.exact_kl_BR is not None and picked.entropy_BR is None
    assert torch.equal(picked.exact_kl_BR[[0, 2]], kl_BR[[4, 0]]) and not picked.exact_kl_BR[1].any()
    assert made.annotated.select(index).exact_kl_BR is None
