"""Proves that decoding through the cache draws exactly what a full forward over the finished rows would draw.

The oracle runs whole rows through one rank without a cache, adds the same keyed noise and takes the largest.

Not proved here: 16-bit caches; anything on a GPU.
"""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import pytest
import torch
from torch import Tensor

from megatron_rlhf.batch import Prompts, Rollout
from megatron_rlhf.generate.engine import Generator
from megatron_rlhf.generate.sampling import Draw
from megatron_rlhf.models import decode, roles, vocabulary
from megatron_rlhf.models.transformer import Network
from megatron_rlhf.parallel import random
from megatron_rlhf.parallel.collectives import any_rank, broadcast
from tests.helpers import roles as tiny
from tests.helpers.grid import on_grid

END = 2
MODEL = replace(tiny.MODEL, vocabulary=11, init_std=0.2)
"""Few words, so that rows end early; four shards hold 4, 4, 3 and 0 of them."""
PADDED = 16
NEAR = 1e-5
"""Two perturbed logits closer than this may change places between two orders of addition."""
ROTARY = {
    name: replace(model, vocabulary=11, init_std=0.2)
    for name, model in {"llama": tiny.LLAMA, "neox": tiny.NEOX, "biased": tiny.RELATIVES["biased"]}.items()
}
LAYOUTS = [tiny.ONE, "tp2 dp2", "tp2 pp2", "pp4", "tp4"]


def network(words: str, seed: int = 5) -> Network:
    """The policy under a generate layout. Collective: world."""
    return tiny.network(words, MODEL, rows=PADDED, seed=seed)


def generate(
    words: str,
    draw_as: Draw,
    *,
    rows: int = 64,
    groups: int = 0,
    asked: Prompts | None = None,
    max_tokens: int = 14,
) -> Rollout:
    """What the policy answers under `words`. Collective: world."""
    asked = asked or tiny.prompts(13, vocabulary=MODEL.vocabulary)
    return Generator(network(words), end=END, rows=rows, groups=groups).sample(asked, draw_as, max_tokens)


def recomputed(rollout: Rollout, draw_as: Draw, built: Network | None = None) -> Tensor:
    """Perturbed logits [B, R, V] of every drawn place by a full forward on one rank. Collective: world."""
    built = built or network(tiny.ONE)
    rows, temperature = rollout.rows, draw_as.temperature or 1.0
    found = torch.zeros(len(rows), rows.width, MODEL.vocabulary)
    if built.grid.inside:
        positions = torch.arange(rows.tokens_BT.shape[1]).expand_as(rows.tokens_BT)
        with torch.no_grad():
            hidden = built.chunks[0].eval()(rows.tokens_BT, positions, attention_mask=None)
            logits = vocabulary.logits(built, hidden)
        for place in range(rows.width):
            at_B = (rows.prompt_lengths_B + place - 1).clamp(max=logits.shape[1] - 1)
            found[:, place] = logits[torch.arange(len(rows)), at_B, : MODEL.vocabulary] / temperature
            if draw_as.temperature > 0:
                place_B, sequence_B = torch.full((len(rows),), place), torch.arange(len(rows))
                found[:, place] += random.gumbel(
                    draw_as.seed, draw_as.iteration, sequence_B, place_B, 0, MODEL.vocabulary
                )
    return broadcast(found, 0)


def responses(rollout: Rollout) -> list[list[int]]:
    """The tokens of each response."""
    rows = rollout.rows
    bounds = zip(rows.prompt_lengths_B.tolist(), rows.lengths_B.tolist(), strict=True)
    return [rows.tokens_BT[b, start:end].tolist() for b, (start, end) in enumerate(bounds)]


def flips(rollout: Rollout, perturbed: Tensor) -> int:
    """Rows with a token that is not the best one; each must be a near tie. Raises AssertionError for any other."""
    count = 0
    for b, response in enumerate(responses(rollout)):
        for place, token in enumerate(response):
            best = perturbed[b, place].topk(2)
            if int(best.indices[0]) != token:
                gap = float(best.values[0] - perturbed[b, place, token])
                assert gap < NEAR, f"row {b} token {place} is {token}, {gap} below the best"
                count += 1
                break
    return count


@on_grid(4)
@pytest.mark.parametrize(
    ("words", "draw_as"),
    [(words, Draw(seed=3)) for words in LAYOUTS]
    + [("tp2 pp2", Draw(temperature=0.0)), ("tp2 dp2", Draw(temperature=0.7, seed=4))]
    + [pytest.param(words, Draw(temperature=0.0), marks=pytest.mark.slow) for words in LAYOUTS if words != "tp2 pp2"]
    + [pytest.param(words, Draw(temperature=0.7), marks=pytest.mark.slow) for words in LAYOUTS if words != "tp2 dp2"],
    ids=str,
)
def test_the_cache_equals_full_recompute(words: str, draw_as: Draw) -> None:
    """Tokens and their log-probs of ragged prompts whose rows end early, and while the cache is packed."""
    with mock.patch.object(decode.Cache, "keep", autospec=True, side_effect=decode.Cache.keep) as packed:
        rollout = generate(words, draw_as)
    perturbed = recomputed(rollout, draw_as)
    assert flips(rollout, perturbed) <= 1
    trained = tiny.learner(network("tp2 pp2"), roles.logprobs(draw_as.temperature or 1.0)).forward(rollout.rows)
    mask = rollout.rows.response_mask_BR(rollout.rows.width)
    torch.testing.assert_close(rollout.drawn_logprobs_BR * mask, trained, rtol=0, atol=1e-5)
    if draw_as.temperature:
        assert any_rank(packed.call_count > 0), "no row ended early: the test proves nothing about packing"
        assert len({len(response) for response in responses(rollout)}) > 3


@on_grid(4)
@pytest.mark.parametrize(
    ("style", "words"), [("llama", "tp2 dp2"), ("llama", "pp4"), ("neox", "tp2 pp2"), ("biased", "tp2 dp2")]
)
def test_rotary_positions_are_each_rows_own(style: str, words: str) -> None:
    """Ragged prompts: a new token turns by the place it has in its row, on every stage; of GPT-NeoX half a head."""
    model = ROTARY[style]
    draw_as, asked = Draw(seed=3), tiny.prompts(13, vocabulary=model.vocabulary)
    rollout = Generator(tiny.network(words, model, rows=PADDED), end=END, rows=64).sample(asked, draw_as, 14)
    assert flips(rollout, recomputed(rollout, draw_as, tiny.network(tiny.ONE, model, rows=PADDED))) <= 1
    assert len({len(response) for response in responses(rollout)}) > 3


@on_grid(4)
def test_the_oracle_sees_a_wrong_cache() -> None:
    """One slot that is read too late, or rows packed in another order, is more than a near tie."""
    append = decode.CoreAttention._append
    keep = decode.Cache.keep

    def forgetful(cache: decode.LayerCache, key: Tensor, value: Tensor) -> Tensor:
        mask = append(cache, key, value).clone()
        mask[..., 0] = False
        return mask

    def mixed(cache: decode.Cache, rows: Tensor) -> None:
        keep(cache, rows.flip(0))

    for target, name, fault in (
        (decode.CoreAttention, "_append", staticmethod(forgetful)),
        (decode.Cache, "keep", mixed),
    ):
        with mock.patch.object(target, name, fault):
            rollout = generate("tp2 dp2", Draw(seed=3))
        with pytest.raises(AssertionError, match="below the best"):
            flips(rollout, recomputed(rollout, Draw(seed=3)))


@on_grid(4)
def test_a_rollout_is_whole() -> None:
    """Prompts are kept, responses close with the end token or at the limit, `ended_B` tells which, the rest is 0."""
    asked = tiny.prompts(13, vocabulary=MODEL.vocabulary)
    rollout = generate("tp2 pp2", Draw(seed=3), asked=asked)
    rows = rollout.rows
    assert torch.equal(rows.prompt_lengths_B, asked.lengths_B)
    assert 0 < int(rollout.ended_B.sum()) < len(rollout)
    for b, response in enumerate(responses(rollout)):
        start = int(asked.lengths_B[b])
        assert rows.tokens_BT[b, :start].tolist() == asked.tokens_BT[b, :start].tolist()
        assert END not in response[:-1]
        assert (response[-1] == END) == bool(rollout.ended_B[b])
        assert len(response) == 14 or rollout.ended_B[b]
        assert not rows.tokens_BT[b, start + len(response) :].any()
        assert not rollout.drawn_logprobs_BR[b, len(response) :].any()
    assert not rollout.scores_B.any()


@on_grid(4)
def test_company_and_layout_change_no_token() -> None:
    """3 rows at a time or all, alone, in any layout: the same tokens; another seed or iteration: others."""
    asked = tiny.prompts(13, vocabulary=MODEL.vocabulary)
    base = generate("tp2 dp2", Draw(seed=3), asked=asked)
    for words in [*LAYOUTS, "pp2 dp2"]:
        other = generate(words, Draw(seed=3), rows=3, asked=asked)
        assert responses(other) == responses(base), words
        torch.testing.assert_close(other.drawn_logprobs_BR, base.drawn_logprobs_BR, rtol=0, atol=1e-5)
    first = generate("tp4", Draw(seed=3), asked=asked.select(torch.arange(1)))
    assert responses(first) == responses(base)[:1]
    assert responses(generate("tp2 dp2", Draw(seed=4), asked=asked)) != responses(base)
    assert responses(generate("tp2 dp2", Draw(seed=3, iteration=1), asked=asked)) != responses(base)


@on_grid(4)
@pytest.mark.parametrize(
    ("words", "numbers"),
    [("pp4", (2, 3, 4, 6)), ("tp2 pp2", (2, 5)), ("pp2 dp2", (3,)), (tiny.ONE, (3,))],
    ids=str,
)
def test_groups_change_no_token(words: str, numbers: tuple[int, ...]) -> None:
    """Rows of ragged ends in several groups are drawn as in one: more groups than stages and fewer, all rows at once
    or new groups in the place of those that are done, fewer rows than groups, a replica without rows."""
    base = generate(words, Draw(seed=3), groups=1)
    assert len(set(map(len, responses(base)))) > 3
    with mock.patch.object(decode.Cache, "keep", autospec=True, side_effect=decode.Cache.keep) as packed:
        for groups in numbers:
            for rows in (64, groups):
                other = generate(words, Draw(seed=3), rows=rows, groups=groups)
                assert responses(other) == responses(base), (groups, rows)
                assert torch.equal(other.ended_B, base.ended_B)
                torch.testing.assert_close(other.drawn_logprobs_BR, base.drawn_logprobs_BR, rtol=0, atol=1e-5)
    assert any_rank(packed.call_count > 0)
    for count in (1, 2):
        asked = tiny.prompts(13, vocabulary=MODEL.vocabulary).select(torch.arange(count))
        few = generate(words, Draw(seed=3), groups=numbers[-1], asked=asked)
        assert responses(few) == responses(base)[:count]


@on_grid(4)
def test_fewer_prompts_than_replicas() -> None:
    """A replica without a prompt waits for the others."""
    asked = tiny.prompts(3, vocabulary=MODEL.vocabulary)
    assert responses(generate("dp4", Draw(seed=3), asked=asked)) == responses(
        generate(tiny.ONE, Draw(seed=3), asked=asked)
    )


@on_grid(4)
def test_a_limit_of_one_token() -> None:
    """One token a row is drawn from the prompt alone."""
    rollout = generate("tp2 pp2", Draw(seed=3), max_tokens=1)
    assert rollout.rows.response_lengths_B.tolist() == [1] * 13
    assert flips(rollout, recomputed(rollout, Draw(seed=3))) == 0


@on_grid(4)
@pytest.mark.parametrize("words", ["tp2 dp2", pytest.param("tp4", marks=pytest.mark.slow), "pp4"])
def test_narrow_sampling(words: str) -> None:
    """top-k 1 and a vanishing top-p are greedy; else every token is among the k best, or in the nucleus."""
    greedy = responses(generate(words, Draw(temperature=0.0)))
    assert responses(generate(words, Draw(top_k=1, seed=3))) == greedy
    assert responses(generate(words, Draw(top_p=1e-6, seed=3))) == greedy
    full = responses(generate(words, Draw(seed=3)))
    assert responses(generate(words, Draw(seed=3, top_k=MODEL.vocabulary))) == full
    drawn = set()
    for draw_as in (Draw(seed=3, top_k=3), Draw(seed=3, top_p=0.6), Draw(temperature=0.7, seed=3, top_k=4, top_p=0.8)):
        rollout = generate(words, draw_as)
        logits = recomputed(rollout, replace(draw_as, temperature=0.0)) / draw_as.temperature
        for b, response in enumerate(responses(rollout)):
            for place, token in enumerate(response):
                share = logits[b, place].softmax(0)
                better = share[share > share[token] + 1e-6]
                assert not draw_as.top_k or len(better) < draw_as.top_k
                assert float(better.sum()) < draw_as.top_p
                drawn.add(len(better))
        # the log-prob is of the full softmax, not of the narrowed one
        scaled = roles.logprobs(draw_as.temperature)
        trained = tiny.learner(network("tp2 pp2"), scaled).forward(rollout.rows)
        mask = rollout.rows.response_mask_BR(rollout.rows.width)
        torch.testing.assert_close(rollout.drawn_logprobs_BR * mask, trained, rtol=0, atol=1e-5)
    assert drawn > {0, 1}


@on_grid(4)
@pytest.mark.parametrize("words", ["tp2 pp2", "tp4"])
def test_padded_words_are_never_drawn(words: str) -> None:
    """Rows behind the vocabulary that would win every draw change nothing."""
    built = network(words)
    asked = tiny.prompts(13, vocabulary=MODEL.vocabulary)
    before = Generator(built, end=END, rows=64).sample(asked, Draw(seed=3), 14)
    name = "embedding.word_embeddings.weight"
    if name in built.parameters:
        with torch.no_grad():
            built.parameters[name][max(0, MODEL.vocabulary - built.vocab_start) :] = 50.0
    for draw_as in (Draw(seed=3), Draw(temperature=0.0), Draw(seed=3, top_k=8), Draw(seed=3, top_p=0.99)):
        after = Generator(built, end=END, rows=64).sample(asked, draw_as, 14)
        assert int(after.rows.tokens_BT.max()) < MODEL.vocabulary
        assert draw_as != Draw(seed=3) or responses(after) == responses(before)


@on_grid(4)
def test_generation_leaves_the_stage_as_it_was() -> None:
    """After it, a forward uses no cache, even where generation failed in the middle, several groups under way."""
    built = network("tp2 dp2")
    role = tiny.learner(built)
    rows = tiny.rows(6, vocabulary=MODEL.vocabulary)
    before = role.forward(rows)
    generator = Generator(built, end=END, rows=64, groups=3)
    generator.sample(tiny.prompts(13, vocabulary=MODEL.vocabulary), Draw(seed=3), 4)
    with (
        mock.patch.object(decode, "advance", side_effect=RuntimeError("planted")),
        pytest.raises(RuntimeError, match="planted"),
    ):
        generator.sample(tiny.prompts(13, vocabulary=MODEL.vocabulary), Draw(seed=3), 4)
    assert torch.equal(role.forward(rows), before)


@on_grid(4)
def test_the_end_token_may_be_id_0() -> None:
    """Padding is 0 too: rows end at the first 0 that was drawn, and one that was cut off has not ended."""
    rollout = Generator(network("tp2 pp2"), end=0, rows=64).sample(
        tiny.prompts(13, vocabulary=MODEL.vocabulary), Draw(seed=3), 14
    )
    assert flips(rollout, recomputed(rollout, Draw(seed=3))) <= 1
    found = responses(rollout)
    assert [int(0 in response) for response in found] == rollout.ended_B.tolist()
    assert all(response.index(0) == len(response) - 1 for response in found if 0 in response)
    assert 0 < rollout.ended_B.sum() < len(found), "all ended, or none: the test proves nothing"
