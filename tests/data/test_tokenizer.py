"""Encoding and decoding lose nothing, lines are encoded alike wherever they stand, bad models are refused.

Not proved here: that the pieces are good ones (the validation loss of pretraining shows it).
"""

import random
import re

import pytest
import sentencepiece

from megatron_rlhf.config.rules import BadInput
from megatron_rlhf.data.sentence_pieces import train
from megatron_rlhf.data.tokenizer import Tokenizer


def named(error: BaseException) -> int:
    """The last vocabulary that the sentence names, the one it says would work."""
    return int(re.findall(r"model.vocabulary=(\d+)", str(error))[-1])


def test_ids_are_the_agreed_ones(tokens):
    assert (tokens.end, tokens.newline, tokens.vocabulary, tokens.opening) == (2, 3, 96, [])


@pytest.mark.parametrize("text", ["the cat.", "the cat\n", "\n", "", "  two  spaces ", "a\n\n the dog\nred?\n", " "])
def test_round_trip(tokens, text):
    ids = tokens.encode(text)
    assert tokens.decode(ids) == text
    assert 1 not in ids


def test_round_trip_of_random_text(tokens, made_up):
    texts = ["\n".join(made_up(5, seed)) for seed in range(50)]
    assert [tokens.decode(ids) for ids in tokens.encode_all(texts)] == texts


def test_a_response_has_the_tokens_it_has_inside_a_text(tokens):
    prompt, response = "the cat sees\nwhy?\n", "the dog runs."
    assert tokens.encode(prompt) + tokens.encode(response) == tokens.encode(prompt + response)


def test_all_at_once_is_one_by_one(tokens):
    texts = ["the cat\nthe dog\n", "the dog", "", "the cat\nthe dog\n"]
    together = tokens.encode_all(texts)
    assert together == [tokens.encode(text) for text in texts]
    together[0].append(7)
    assert together[3] == tokens.encode(texts[3])


def test_decoding_skips_padding_and_end(tokens):
    assert tokens.decode([0, *tokens.encode("the cat"), 2, 0, 0]) == "the cat"


def test_rare_characters_are_spelled_where_pieces_are_few(tmp_path, made_up):
    rare = "".join(chr(0x4E00 + place) for place in range(600))
    path = tmp_path / "spelled.model"
    texts = [f"{text} {chr(0x61 + place % 26)}{place}" for place, text in enumerate(made_up(3000))]
    path.write_bytes(train([*texts, *rare], 640))
    found = Tokenizer.load(path)
    assert found.decode(found.encode(rare)) == rare
    assert 1 not in found.encode(rare)
    assert len(found.encode(rare)) > 2 * len(rare)


def test_every_character_is_kept_where_pieces_are_many(tmp_path, made_up):
    path = tmp_path / "kept.model"
    path.write_bytes(train([*made_up(400), "~ once €"], 96))
    found = Tokenizer.load(path)
    assert found.decode(found.encode("~€")) == "~€"


def test_too_little_text_names_a_vocabulary_that_works():
    with pytest.raises(BadInput, match=r"model.vocabulary=(\d+) would work") as error:
        train(["the cat sees the dog"], 500)
    train(["the cat sees the dog"], named(error.value))


def test_too_many_characters_names_a_vocabulary_that_works():
    draw = random.Random(0)
    characters = [chr(0x4E00 + place) for place in range(900)]
    texts = ["".join(characters), *("".join(draw.choices(characters, k=40)) for _ in range(500))]
    with pytest.raises(BadInput, match="900 different characters") as error:
        train(texts, 300)
    train(texts, named(error.value))


def test_a_missing_or_broken_file_is_refused(tmp_path):
    with pytest.raises(BadInput, match="missing"):
        Tokenizer.load(tmp_path / "absent.model")
    (tmp_path / "broken.model").write_text("no model")
    with pytest.raises(BadInput, match="no sentencepiece model"):
        Tokenizer.load(tmp_path / "broken.model")


def test_a_model_without_end_token_is_refused(tmp_path, made_up):
    prefix = str(tmp_path / "endless")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(made_up(300)), model_prefix=prefix, vocab_size=40, eos_id=-1, minloglevel=2
    )
    with pytest.raises(BadInput, match="no end token"):
        Tokenizer.load(tmp_path / "endless.model")


def test_a_model_without_newline_encodes_whole_texts(tmp_path, made_up):
    prefix = str(tmp_path / "foreign")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(made_up(300)), model_prefix=prefix, vocab_size=40, unk_id=0, pad_id=-1,
        eos_id=2, bos_id=-1, minloglevel=2,
    )  # fmt: skip
    found = Tokenizer.load(tmp_path / "foreign.model")
    assert found.newline == -1
    assert found.decode([*found.encode("the dog"), 2]) == "the dog"
    assert found.decode(found.encode("the cat")) == "the cat"
