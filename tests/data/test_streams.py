"""Rows hold prompt, response and padding where they should; prompts, demonstrations and rankings are read, filtered,
resumed and refused as promised.

Not proved here: which prompts are prepared (test_prepare).
"""

import pytest
import torch

from megatron_rlhf.config.rules import BadInput
from megatron_rlhf.data import jsonl
from megatron_rlhf.data.demonstrations import DemonstrationStream
from megatron_rlhf.data.prompts import PromptStream
from megatron_rlhf.data.rankings import RankingStream
from megatron_rlhf.data.rows import pad_rows

LONG = "the cat sees the dog and the dog sees the cat and the house"


def same(left, right) -> bool:
    return all(torch.equal(getattr(left, name), getattr(right, name)) for name in left.__dataclass_fields__)


@pytest.fixture
def prompts(tmp_path, tokens):
    path = tmp_path / "prompts.jsonl"
    jsonl.write(path, [{"prompt": text} for text in ("a cat", LONG, "a dog", "red", "who")])
    return PromptStream.load(path, tokens, max_tokens=6, seed=3)


@pytest.fixture
def demonstrations(tmp_path, tokens):
    path = tmp_path / "demonstrations.jsonl"
    rows = [
        ("a cat\n", "runs"),
        (LONG, "runs"),
        ("a dog\n", LONG),
        ("who\n", ""),
        ("why\n", "the dog."),
        ("red\n", "a"),
    ]
    jsonl.write(path, [{"prompt": prompt, "response": response} for prompt, response in rows])

    def load(**settings):
        return DemonstrationStream.load(path, tokens, max_prompt=6, max_response=6, seed=1, **settings)

    return load


def ranking(**change):
    return {"prompt": "a cat\n", "responses": ["runs", "a dog", "red"], "ranks": [2, 1, 1]} | change


def load_rankings(tmp_path, tokens, rows, most=12):
    jsonl.write(tmp_path / "rankings.jsonl", rows)
    return RankingStream.load(tmp_path / "rankings.jsonl", tokens, max_tokens=most, seed=0)


def test_rows_are_padded_on_the_right():
    rows = pad_rows([[5, 6], [7], []], [[8], [9, 9, 2], []])
    assert rows.tokens_BT.tolist() == [[5, 6, 8, 0], [7, 9, 9, 2], [0, 0, 0, 0]]
    assert rows.prompt_lengths_B.tolist() == [2, 1, 0]
    assert rows.lengths_B.tolist() == [3, 4, 0]
    assert rows.tokens_BT.dtype == rows.lengths_B.dtype == torch.int64
    assert pad_rows([], []).tokens_BT.shape == (0, 1)
    with pytest.raises(ValueError):
        pad_rows([[1]], [])


def test_prompts_carry_their_place_in_the_file(prompts, tokens):
    assert (len(prompts), prompts.dropped, prompts.texts[1]) == (4, 1, LONG)
    taken = prompts.take(4)
    assert sorted(taken.ids_B.tolist()) == [0, 2, 3, 4]
    for row, length, place in zip(taken.tokens_BT, taken.lengths_B, taken.ids_B, strict=True):
        assert tokens.decode(row[:length].tolist()) == prompts.texts[place]
        assert not row[length:].any()


def test_first_prompts_come_in_file_order(prompts):
    prompts.take(3)
    assert prompts.first(3).ids_B.tolist() == [0, 2, 3]
    with pytest.raises(BadInput, match="4 prompts, 5 are asked for"):
        prompts.first(5)


def test_prompts_all_too_long_name_a_limit_that_works(tmp_path, tokens):
    jsonl.write(tmp_path / "long.jsonl", [{"prompt": LONG}])
    with pytest.raises(BadInput, match="data.max_prompt_tokens=") as error:
        PromptStream.load(tmp_path / "long.jsonl", tokens, max_tokens=3, seed=0)
    limit = int(str(error.value).split("max_prompt_tokens=")[1].split()[0])
    assert len(PromptStream.load(tmp_path / "long.jsonl", tokens, max_tokens=limit, seed=0)) == 1


def test_demonstrations_end_with_the_end_token_and_obey_limits(demonstrations, tokens):
    found = demonstrations()
    rows = found.all_rows()
    assert found.prompts == ["a cat\n", "who\n", "why\n", "red\n"]
    assert (len(found), found.dropped) == (4, 2)
    for place, (row, begin, end) in enumerate(zip(rows.tokens_BT, rows.prompt_lengths_B, rows.lengths_B, strict=True)):
        assert tokens.decode(row[:begin].tolist()) == found.prompts[place]
        assert tokens.decode(row[begin:end].tolist()) == found.responses[place]
        assert row[end - 1] == tokens.end
        assert (row == tokens.end).sum() == 1


def test_the_response_limit_counts_the_end_token(tmp_path, tokens):
    size = len(tokens.encode("the dog runs"))
    jsonl.write(tmp_path / "d.jsonl", [{"prompt": "a", "response": "the dog runs"}])

    def load(most):
        return DemonstrationStream.load(tmp_path / "d.jsonl", tokens, max_prompt=9, max_response=most, seed=0)

    assert len(load(size + 1)) == 1
    with pytest.raises(BadInput, match="max_response_tokens"):
        load(size)


def test_a_limit_takes_the_first_demonstrations(demonstrations):
    assert demonstrations(limit=2).prompts == ["a cat\n", "who\n"]


def test_rankings_are_padded_to_the_largest(tmp_path, tokens):
    two = {"prompt": "who\n", "responses": ["red", "a"], "ranks": [1, 2], "ended": [True, False]}
    found = load_rankings(tmp_path, tokens, [ranking(), two, ranking(prompt=LONG)]).all()
    assert found.ranks_PK.tolist() == [[2, 1, 1], [1, 2, 0]]
    assert found.lengths_PK[1, 2] == found.prompt_lengths_PK[1, 2] == found.tokens_PKT[1, 2].abs().sum() == 0
    last = found.tokens_PKT.gather(2, (found.lengths_PK - 1).clamp(min=0)[..., None])[..., 0]
    assert (last == tokens.end).tolist() == [[True, True, True], [True, False, False]]
    begin, end = found.prompt_lengths_PK[0, 1], found.lengths_PK[0, 1]
    assert tokens.decode(found.tokens_PKT[0, 1, begin:end].tolist()) == "a dog"


def test_rankings_over_the_limit_are_counted(tmp_path, tokens):
    found = load_rankings(tmp_path, tokens, [ranking(), ranking(prompt=LONG), ranking(labeler="x")])
    assert (len(found), found.dropped, found.fields[1]["labeler"]) == (2, 1, "x")
    with pytest.raises(BadInput, match="none of its 1 rankings"):
        load_rankings(tmp_path, tokens, [ranking(prompt=LONG)])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"responses": ["a"], "ranks": [1]}, "has 1 response; a comparison needs at least 2"),
        ({"ranks": [1, 2]}, "3 responses and 2 ranks"),
        ({"ranks": [0, 1, 2]}, "whole numbers from 1"),
        ({"ranks": [1, 2, 2.5]}, "whole numbers from 1"),
        ({"ranks": [1, 2, True]}, "whole numbers from 1"),
        ({"responses": ["a", "b", 3]}, "not text"),
        ({"ended": [True]}, "true or false for each of the 3"),
        ({"responses": ["a", "", "b"], "ended": [True, False, True]}, "without any token"),
    ],
)
def test_bad_rankings_are_refused_with_their_line(tmp_path, tokens, change, said):
    with pytest.raises(BadInput) as error:
        load_rankings(tmp_path, tokens, [ranking(), ranking(**change)])
    assert said in str(error.value)
    assert "rankings.jsonl line 2" in str(error.value)


def test_streams_go_on_where_they_were_saved(prompts, demonstrations, tmp_path, tokens):
    rankings = [ranking(prompt=f"{word}\n") for word in ("a", "red", "who", "why")]
    for make in (
        lambda: PromptStream.load(tmp_path / "prompts.jsonl", tokens, max_tokens=6, seed=3),
        demonstrations,
        lambda: load_rankings(tmp_path, tokens, rankings),
    ):
        straight, saved, resumed = make(), make(), make()
        for stream in (straight, saved):
            stream.take(5)
        resumed.restore(saved.state())
        assert same(resumed.take(6), straight.take(6))
