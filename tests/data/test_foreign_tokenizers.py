"""Tokenizers made elsewhere: GPT-2's two files, a tokenizer.json and Llama's kind of sentencepiece give the ids that
transformers or sentencepiece gives; end and begin tokens come from the files; no text spells a control token; id 0 is
a token as any other, the end token too, and padding is none.

Not proved here: published files (the ones here are trained in the test, on a small corpus).
"""

import io
import json

import pytest
import sentencepiece
import torch
import transformers
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from megatron_rlhf.batch import Rollout
from megatron_rlhf.config.rules import BadInput
from megatron_rlhf.data import jsonl, tokenizer
from megatron_rlhf.data.demonstrations import DemonstrationStream
from megatron_rlhf.data.pretraining import PretrainingStream, write
from megatron_rlhf.data.prompts import PromptStream
from megatron_rlhf.data.rankings import RankingStream
from megatron_rlhf.data.rows import pad_rows
from megatron_rlhf.data.tokenizer import Tokenizer
from megatron_rlhf.recipes.judge import texts

END = "<|endoftext|>"
TEXTS = [
    "the cat sees the dog",
    "",
    "\n",
    "two\n\nlines  and spaces ",
    " é 東京 🙂\ttab",
    "!0!",
    "it's 2024, isn't it?",
]
LLAMA = {"unk_id": 0, "bos_id": 1, "eos_id": 2, "pad_id": -1}


def byte_level(texts, specials, first=True):
    """A byte-level BPE with its special tokens at the first ids, or, as GPT-2 has it, at the last."""
    found = Library(models.BPE())
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=340, special_tokens=specials if first else [], initial_alphabet=alphabet, show_progress=False
    )
    found.train_from_iterator(texts, trainer)
    if not first:
        found.add_special_tokens(specials)
    return found


@pytest.fixture(scope="module")
def corpus(made_up):
    return made_up(300)


@pytest.fixture
def gpt2(tmp_path, corpus):
    """A folder with the two files as GPT-2 has them: the end token is the last of the vocabulary, id 0 is "!"."""
    library = byte_level(corpus, [END], first=False)
    merges = json.loads(library.to_str())["model"]["merges"]
    (tmp_path / "vocab.json").write_text(json.dumps(library.get_vocab(), ensure_ascii=True))
    lines = [" ".join(pair) if isinstance(pair, list) else pair for pair in merges]
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *lines]) + "\n", encoding="utf-8")
    return tmp_path


@pytest.fixture
def llama_json(tmp_path, corpus):
    """A folder with a tokenizer.json that opens every text with a begin token and closes it with an end token."""
    library = byte_level(corpus, ["<s>", "</s>", "<|im_end|>"])
    library.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    library.enable_truncation(5)
    library.enable_padding(length=9)
    library.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


@pytest.fixture
def sentences(tmp_path, corpus):
    """A folder with a sentencepiece model as Llama has it: bytes, no padding, id 0 for the unknown."""
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus), model_writer=written, model_type="bpe", vocab_size=360, byte_fallback=True,
        user_defined_symbols=["\n", "<|im_end|>"], minloglevel=2, **LLAMA,
    )  # fmt: skip
    (tmp_path / "tokenizer.model").write_bytes(written.getvalue())
    return tmp_path


def settle(folder, **settings):
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


@pytest.mark.parametrize("names", [("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe")])
def test_gpt2s_files_give_gpt2s_ids(gpt2, names):
    oracle = transformers.GPT2TokenizerFast.from_pretrained(gpt2)
    for old, new in zip(("vocab.json", "merges.txt"), names, strict=True):
        (gpt2 / old).rename(gpt2 / new)
    found = Tokenizer.load(gpt2)
    assert (found.vocabulary, found.end) == (len(oracle), oracle.eos_token_id) == (len(oracle), len(oracle) - 1)
    assert (found.newline, found.opening) == (-1, [])
    assert found.encode_all(TEXTS) == [oracle(text)["input_ids"] for text in TEXTS]
    assert [found.decode(ids) for ids in found.encode_all(TEXTS)] == TEXTS


def test_a_tokenizer_json_gives_its_ids(llama_json):
    oracle = transformers.PreTrainedTokenizerFast(tokenizer_file=str(llama_json / "tokenizer.json"))
    found = Tokenizer.load(llama_json)
    assert found.vocabulary == oracle.vocab_size
    assert found.opening == [0]
    for text, ids in zip(TEXTS, found.encode_all(TEXTS), strict=True):
        assert ids == oracle(text, add_special_tokens=False, truncation=False, padding=False)["input_ids"]
        assert [*found.encode_prompt(text), 1] == oracle(text, truncation=False, padding=False)["input_ids"]
        assert found.decode([*found.encode_prompt(text), found.end]) == text


def test_llamas_sentencepiece_gives_its_ids(sentences):
    oracle = sentencepiece.SentencePieceProcessor(str(sentences / "tokenizer.model"))
    found = Tokenizer.load(sentences)
    assert (found.end, found.newline, found.opening, found.vocabulary) == (2, -1, [], 360)
    assert found.encode_all(TEXTS) == oracle.encode(TEXTS)
    assert found.decode(found.encode("the cat sees\nthe dog")) == "the cat sees\nthe dog"
    settle(sentences, add_bos_token=True, bos_token={"content": "<s>"}, eos_token="</s>")
    assert Tokenizer.load(sentences).encode_prompt("the") == [1, *oracle.encode("the")]
    assert Tokenizer.load(sentences).decode([1, *oracle.encode("the"), 2]) == "the"


@pytest.mark.parametrize(
    ("settings", "asked", "end"),
    [
        ({}, "", "</s>"),
        ({"eos_token": "<|im_end|>"}, "", "<|im_end|>"),
        ({"eos_token": {"content": "<|im_end|>", "special": True}}, "", "<|im_end|>"),
        ({"eos_token": "<|im_end|>"}, "</s>", "</s>"),
        ({"eos_token": None}, "<s>", "<s>"),
    ],
)
def test_the_end_token_is_the_named_one(llama_json, settings, asked, end):
    settle(llama_json, **settings)
    assert Tokenizer.load(llama_json, asked).end == ["<s>", "</s>", "<|im_end|>"].index(end)


def test_the_end_token_of_a_sentencepiece_can_be_named(sentences):
    assert Tokenizer.load(sentences, "<|im_end|>").end == 4
    settle(sentences, eos_token="<|im_end|>")
    assert Tokenizer.load(sentences).end == 4
    settle(sentences, eos_token="<|added later|>")
    with pytest.raises(BadInput, match="eos_token of tokenizer_config.json, .* write data.end_token=</s>"):
        Tokenizer.load(sentences)


def test_a_begin_token_is_put_where_the_files_say(llama_json):
    settle(llama_json, add_bos_token=False, bos_token="<s>")
    assert Tokenizer.load(llama_json).opening == []
    settle(llama_json, add_bos_token=True, bos_token="<|im_end|>")
    assert Tokenizer.load(llama_json).opening == [2]


@pytest.mark.parametrize("kind", ["gpt2", "llama_json", "sentences"])
def test_no_text_spells_a_control_token(kind, request):
    folder = request.getfixturevalue(kind)
    found = Tokenizer.load(folder, "" if kind == "gpt2" else "<|im_end|>")
    for text in (f"a{END}b", "a</s>b", "<s>", "a<|im_end|>", "<|im_end|><|im_end|> x", f"{END}{END}"):
        ids = found.encode(text)
        assert found.end not in ids
        assert not set(ids) & set(found.opening)
        if kind != "sentences":
            assert found.decode(ids) == text
    assert found.decode([found.end]) == ""


def test_a_spelled_control_token_is_the_text_it_was(tmp_path):
    """Not only no control token: the pieces that these letters have where nobody knows them as one."""
    library = byte_level([f"a {END}"] * 9, [END])
    library.save(str(tmp_path / "tokenizer.json"))
    plain = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "tokenizer.json"), split_special_tokens=True
    )
    found = Tokenizer.load(tmp_path).encode(f"a {END}")
    assert found == plain(f"a {END}")["input_ids"]
    assert any(len(library.id_to_token(token)) > 1 and "<|" in library.id_to_token(token) for token in found)


def test_a_token_that_text_is_matched_with_is_cut(tmp_path):
    """Where the library reads the end token out of a text (a word of the vocabulary, not special), it is spelled."""
    letters = {letter: place for place, letter in enumerate("</s> abcdefgh")} | {"</s>": 13}
    library = Library(models.Unigram([(piece, 0.0 if piece == "</s>" else -5.0) for piece in letters], unk_id=12))
    library.decoder = decoders.Fuse()
    library.save(str(tmp_path / "tokenizer.json"))
    assert library.encode("a</s>b").ids == [letters[piece] for piece in ("a", "</s>", "b")]
    found = Tokenizer.load(tmp_path)
    assert found.end == 13
    assert found.encode("a</s>b</s></s>") == [letters[piece] for piece in "a</s>b</s></s>"]
    assert found.decode(found.encode("a</s>b")) == "a</s>b"
    library.normalizer = normalizers.Replace("g", "</s>")
    library.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(BadInput, match="reads a control token out of the text 'ag'"):
        Tokenizer.load(tmp_path).encode("ag")


def test_id_0_is_a_token_and_padding_is_none(gpt2, tmp_path):
    """GPT-2's id 0 is "!": it survives in a row, and what fills a row behind its length is not read."""
    found = Tokenizer.load(gpt2)
    assert found.encode("!") == [0] != [found.end]
    rows = pad_rows([found.encode("!a!"), found.encode("a")], [[*found.encode("!!"), found.end], [found.end]])
    rollout = Rollout(rows, torch.zeros(2, 3), torch.ones(2), torch.zeros(2))
    assert texts(rollout, found) == ["!!", ""]
    assert rows.lengths_B.tolist() == [6, 2]
    assert (rows.tokens_BT[0, :6] == found.end).sum() == 1


def test_the_end_token_may_be_id_0(tmp_path, corpus):
    """As in GPT-NeoX and SmolLM: rows end where their length says, not where a 0 stands."""
    byte_level(corpus, [END]).save(str(tmp_path / "tokenizer.json"))
    found = Tokenizer.load(tmp_path)
    assert found.end == 0
    jsonl.write(tmp_path / "d.jsonl", [{"prompt": "a cat", "response": "!"}, {"prompt": "a", "response": END}])
    rows = DemonstrationStream.load(tmp_path / "d.jsonl", found, max_prompt=9, max_response=30, seed=1).all_rows()
    for row, begin, end in zip(rows.tokens_BT.tolist(), rows.prompt_lengths_B, rows.lengths_B, strict=True):
        assert row[:end].index(0) == end - 1
        assert row[begin : end - 1] in (found.encode("!"), found.encode(END))
    jsonl.write(
        tmp_path / "r.jsonl", [{"prompt": "a", "responses": ["b", "c"], "ranks": [1, 2], "ended": [True, False]}]
    )
    rankings = RankingStream.load(tmp_path / "r.jsonl", found, max_tokens=9, seed=1).all()
    assert rankings.lengths_PK.tolist() == [[3, 2]]


def test_rows_and_documents_open_as_the_files_say(llama_json):
    found = Tokenizer.load(llama_json)
    text, plain = "the cat", found.encode("the cat")
    jsonl.write(llama_json / "p.jsonl", [{"prompt": text}])
    jsonl.write(llama_json / "d.jsonl", [{"prompt": text, "response": text}])
    jsonl.write(llama_json / "r.jsonl", [{"prompt": text, "responses": [text, text], "ranks": [1, 2]}])
    size = len(plain) + 1
    asked = PromptStream.load(llama_json / "p.jsonl", found, max_tokens=size, seed=1).take(1)
    assert asked.tokens_BT.tolist() == [[0, *plain]]
    told = DemonstrationStream.load(llama_json / "d.jsonl", found, max_prompt=size, max_response=size, seed=1)
    assert told.all_rows().tokens_BT.tolist() == [[0, *plain, *plain, found.end]]
    ranked = RankingStream.load(llama_json / "r.jsonl", found, max_tokens=2 * size, seed=1).all()
    assert ranked.tokens_PKT.tolist() == [[[0, *plain, *plain, found.end]] * 2]
    assert write([text, text], found, llama_json / "text") == 2 * (size + 1)
    assert PretrainingStream(llama_json / "text", size + 1, seed=1).take(1).tokens_BT.tolist() == [
        [0, *plain, found.end]
    ]


def test_holes_between_ids_are_counted(tmp_path, corpus):
    library = byte_level(corpus, [END])
    stored = json.loads(library.to_str())
    stored["model"]["vocab"]["the last"] = 500
    (tmp_path / "tokenizer.json").write_text(json.dumps(stored))
    assert Tokenizer.load(tmp_path).vocabulary == 501 > library.get_vocab_size() + 1


def test_the_first_kind_counts_and_one_is_copied(gpt2, llama_json, tmp_path):
    assert gpt2 == llama_json
    settle(gpt2, eos_token="</s>")
    (gpt2 / "room").mkdir()
    (gpt2 / "room" / "tokenizer.model").write_text("of an earlier run")
    tokenizer.copy(gpt2, gpt2 / "room", "<|im_end|>")
    assert {path.name for path in (gpt2 / "room").iterdir()} == {"tokenizer.json", "tokenizer_config.json"}
    assert Tokenizer.load(gpt2 / "room").end == 2
    (gpt2 / "tokenizer.json").unlink()
    (gpt2 / "tokenizer_config.json").unlink()
    tokenizer.copy(gpt2, gpt2 / "room")
    assert {path.name for path in (gpt2 / "room").iterdir()} == {"vocab.json", "merges.txt"}
    before = sorted(gpt2.iterdir())
    tokenizer.copy(gpt2, gpt2)
    assert sorted(gpt2.iterdir()) == before


@pytest.mark.parametrize(
    ("files", "asked", "said"),
    [
        ({}, "", "holds no tokenizer; megatron-rlhf prepare writes tokenizer.model"),
        ({"vocab.json": "{}"}, "", "has vocab.json without merges.txt"),
        ({"vocab.bpe": ""}, "", "has vocab.bpe without encoder.json"),
        ({"vocab.json": "{", "merges.txt": ""}, "", "are no byte-level BPE"),
        ({"vocab.json": '{"a": 0}', "merges.txt": ""}, "", "spells bytes without '!'"),
        ({"tokenizer.json": "{}"}, "", "is no tokenizer.json of the library tokenizers (Model missing"),
        ({"tokenizer.json": "good", "tokenizer_config.json": "{"}, "", "is no JSON"),
        ({"tokenizer.json": "good", "tokenizer_config.json": "[]"}, "", "is no JSON object"),
        ({"tokenizer.json": "good"}, "<|x|>", "data.end_token=<|x|> is no token of"),
        ({"tokenizer.json": "good", "tokenizer_config.json": '{"eos_token": "<y>"}'}, "", "write data.end_token=</s>"),
        ({"tokenizer.json": "endless"}, "", "has no end token; write data.end_token=TOKEN"),
    ],
)
def test_what_is_no_tokenizer_is_refused(tmp_path, corpus, files, asked, said):
    made = {"good": ["</s>"], "endless": []}
    for name, text in files.items():
        (tmp_path / name).write_text(byte_level(corpus, made[text]).to_str() if text in made else text)
    with pytest.raises(BadInput) as error:
        Tokenizer.load(tmp_path, asked)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_another_vocabulary_is_refused_with_one_that_works(gpt2):
    found = Tokenizer.load(gpt2)
    found.check_vocabulary(found.vocabulary)
    with pytest.raises(BadInput, match=f"vocab.json has {found.vocabulary} tokens and model.vocabulary=2048; write"):
        found.check_vocabulary(2048)
