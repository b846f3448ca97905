"""From raw data to the files of a run: no user and no prompt on two sides, limits kept, the same files every time.

Not proved here: that what is kept teaches anything; the quickstart's evaluation measures that.
"""

import importlib.util
import json
import random
from types import SimpleNamespace

import pytest
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, pre_tokenizers

from megatron_rlhf.config.rules import BadInput
from megatron_rlhf.config.schema import Data
from megatron_rlhf.data import chitchat, jsonl, sources, tokenizer
from megatron_rlhf.data.candidates import candidates, recent
from megatron_rlhf.data.demonstrations import DemonstrationStream
from megatron_rlhf.data.pretraining import PretrainingStream
from megatron_rlhf.data.prompts import PromptStream
from megatron_rlhf.data.tokenizer import Tokenizer
from megatron_rlhf.recipes.prepare import prepare, run

HAS_CHITCHAT = importlib.util.find_spec("chitchat_dataset") is not None
PROMPTS = ("prompts.train", "prompts.rank", "prompts.rank_valid", "prompts.test")
LETTERS = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "</s>", "<|im_end|>"]
FILES = ("demonstrations.train", "demonstrations.valid", *PROMPTS)


def settings(folder, seed=1, vocabulary=96, **data):
    limits = {
        "max_prompt_tokens": 40,
        "min_response_tokens": 8,
        "max_response_tokens": 20,
        "shared_prefix_tokens": 30,
        "prompts_per_user": 9,
    }
    return SimpleNamespace(
        out=str(folder / "out"),
        seed=seed,
        model=SimpleNamespace(vocabulary=vocabulary),
        data=Data(**(limits | {"source": str(folder), "valid_share": 0.3} | data)),
    )


@pytest.fixture
def folder(tmp_path, made_up):
    draw = random.Random(5)
    words = made_up(900, seed=9)
    rows = [
        {"prompt": f"{words[place]}\n", "response": words[place + 450], "user": f"u{draw.randrange(30)}", "id": place}
        for place in range(450)
    ]
    rows += rows[:20] + [{"prompt": "a " * 60, "response": "red", "user": "u1"}]
    jsonl.write(tmp_path / "demonstrations.jsonl", rows)
    return tmp_path


def read(directory):
    return {name: jsonl.read(directory / f"{name}.jsonl", ["prompt"]) for name in FILES}


def users(rows):
    return {user for row in rows for user in sources.users_of(row)}


def check(files, directory, data, vocabulary):
    """No leak, no shared prompt, all limits kept; what every prepared folder owes."""
    tokens = Tokenizer.load(directory / "tokenizer.model")
    train = users(files["demonstrations.train"]) | users(files["prompts.train"]) | users(files["prompts.rank"])
    held = users(files["demonstrations.valid"]) | users(files["prompts.rank_valid"]) | users(files["prompts.test"])
    assert not train & held
    assert tokens.vocabulary == vocabulary
    prefixes = []
    for name, rows in files.items():
        prompts = tokens.encode_all([row["prompt"] for row in rows])
        replies = tokens.encode_all([row.get("response", row.get("reference")) for row in rows])
        assert max(map(len, prompts)) <= data.max_prompt_tokens
        assert {data.min_response_tokens <= len(ids) + 1 <= data.max_response_tokens for ids in replies} == {True}
        prefixes += [tuple(ids[: data.shared_prefix_tokens]) for ids in prompts if name in PROMPTS]
    assert len(set(prefixes)) == len(prefixes)


def test_a_folder_of_demonstrations_is_all_it_takes(folder):
    config = settings(folder)
    report = run(config)
    directory = folder / "out" / "data"
    files = read(directory)
    check(files, directory, config.data, 96)
    counts = report["counters"]
    assert counts["demonstrations"]["read"] == counts["prompts"]["read"] == 471
    for kind, names in (("demonstrations", FILES[:2]), ("prompts", PROMPTS)):
        dropped = sum(value for name, value in counts[kind].items() if name != "read")
        assert sum(len(files[name]) for name in names) == 471 - dropped
    assert counts["demonstrations"]["prompt_too_long"] == 1 or counts["demonstrations"]["over_user_cap"] > 0
    assert {name: part["rows"] for name, part in report["files"].items()} == {k: len(v) for k, v in files.items()}
    assert report == json.loads((directory / "prepare.json").read_text())
    assert all("id" in row and "reference" in row for name in PROMPTS for row in files[name])


def test_streams_read_what_was_prepared(folder):
    config = settings(folder)
    run(config)
    directory = folder / "out" / "data"
    tokens = Tokenizer.load(directory / "tokenizer.model")
    found = DemonstrationStream.load(
        directory / "demonstrations.train.jsonl", tokens, max_prompt=40, max_response=20, seed=1
    )
    assert found.dropped == 0
    for name in PROMPTS:
        assert PromptStream.load(directory / f"{name}.jsonl", tokens, max_tokens=40, seed=1).dropped == 0
    assert len(PretrainingStream(directory / "pretraining.train", 64, seed=1)) > 10
    assert len(PretrainingStream(directory / "pretraining.valid", 64, seed=1)) > 1


def test_duplicates_and_long_rows_are_counted(folder):
    counts = prepare(
        settings(folder, prompts_per_user=1000, min_response_tokens=1, max_response_tokens=60), folder / "a"
    )["counters"]["demonstrations"]
    assert counts["prompt_too_long"] >= 1
    assert counts["shared_prefix"] >= 19
    assert counts["over_user_cap"] == 0


def test_no_user_exceeds_the_cap(folder):
    prepare(settings(folder), folder / "a")
    rows = [row["user"] for row in jsonl.read(folder / "a" / "demonstrations.train.jsonl", ["prompt"])]
    assert max(map(rows.count, rows)) <= 9
    assert len(rows) > 100


def test_the_same_settings_give_the_same_bytes(folder):
    for name in ("a", "b"):
        prepare(settings(folder), folder / name)
    assert {path.name: path.read_bytes() for path in (folder / "a").iterdir()} == {
        path.name: path.read_bytes() for path in (folder / "b").iterdir()
    }
    prepare(settings(folder, seed=2), folder / "c")
    assert (folder / "a" / "prompts.test.jsonl").read_bytes() != (folder / "c" / "prompts.test.jsonl").read_bytes()


def test_rows_without_user_prompts_and_text_of_their_own(folder, made_up):
    rows = [{"prompt": text, "response": "the red house and why"} for text in made_up(40, seed=3)]
    jsonl.write(folder / "demonstrations.jsonl", rows)
    jsonl.write(folder / "prompts.jsonl", [{"prompt": f"why {text}", "use_case": "x"} for text in made_up(60, seed=4)])
    jsonl.write(folder / "text.jsonl", [{"text": text} for text in made_up(300, seed=6)])
    prepare(settings(folder, min_response_tokens=1), folder / "a")
    files = read(folder / "a")
    assert all(row["prompt"].startswith("why ") and row["use_case"] == "x" for name in PROMPTS for row in files[name])
    assert all("reference" not in row for row in files["prompts.test"])
    assert not users(files["prompts.train"]) & users(files["prompts.test"])


def test_no_held_out_prompt_was_trained_on_by_another_user(folder):
    rows = jsonl.read(folder / "demonstrations.jsonl", ["prompt"])
    asked = [{"prompt": row["prompt"], "user": f"u{(place * 7) % 30}"} for place, row in enumerate(rows)]
    jsonl.write(folder / "prompts.jsonl", asked)
    counts = prepare(settings(folder), folder / "a")["counters"]
    files = {name: {row["prompt"] for row in rows} for name, rows in read(folder / "a").items()}
    train = files["demonstrations.train"] | files["prompts.train"] | files["prompts.rank"]
    held = files["demonstrations.valid"] | files["prompts.rank_valid"] | files["prompts.test"]
    assert not train & held
    assert counts["prompts"]["held_out_but_seen_in_training"] > 5


def test_a_reply_counts_its_end_token(tokens):
    rows = [{"prompt": "who\n", "reference": "the cat"}, {"prompt": "a\nb"}]
    found = candidates(rows, "reference", tokens)
    assert [one.reply_tokens for one in found] == [len(tokens.encode("the cat")) + 1, 0]
    assert [one.prompt for one in found] == [tokens.encode("who\n"), tokens.encode("a\nb")]


def test_a_tokenizer_in_the_folder_is_used(folder, tokens, made_up):
    prepare(settings(folder), folder / "a")
    (folder / "tokenizer.model").write_bytes((folder / "a" / "tokenizer.model").read_bytes())
    text = [{"text": "why who " * 20, "user": f"u{number}"} for number in range(30)]
    jsonl.write(folder / "text.jsonl", text)
    prepare(settings(folder), folder / "b")
    assert (folder / "b" / "tokenizer.model").read_bytes() == (folder / "tokenizer.model").read_bytes()
    with pytest.raises(BadInput, match="model.vocabulary=96"):
        prepare(settings(folder, vocabulary=97), folder / "c")


def test_any_tokenizer_of_the_folder_is_used_and_its_end_token_kept(folder):
    """GPT-2's two files or a tokenizer.json take the place of what an earlier run left in the data room."""
    library = Library(models.BPE({letter: place for place, letter in enumerate(LETTERS)}, []))
    library.pre_tokenizer, library.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    prepare(settings(folder), folder / "room")
    limits = {"min_response_tokens": 1, "max_prompt_tokens": 90, "max_response_tokens": 90}
    for names, end in (({"vocab.json", "merges.txt"}, ""), ({"tokenizer.json", "tokenizer_config.json"}, LETTERS[-1])):
        if end:
            library.save(str(folder / "tokenizer.json"))
        library.model.save(str(folder))
        prepare(settings(folder, vocabulary=len(LETTERS), end_token=end, **limits), folder / "room")
        kinds = {*(name for kind in tokenizer.KINDS for name in kind), tokenizer.SETTINGS}
        assert {path.name for path in (folder / "room").iterdir()} & kinds == names
        found = Tokenizer.load(folder / "room")
        assert found.end == LETTERS.index(end or "</s>")
        stream = PretrainingStream(folder / "room" / "pretraining.valid", 200, seed=1)
        assert (stream.first(1).tokens_BT == found.end).any()


def test_bad_sources_are_refused(tmp_path, folder):
    with pytest.raises(BadInput, match="is no folder"):
        prepare(settings(tmp_path, source=str(tmp_path / "absent")), tmp_path / "a")
    with pytest.raises(BadInput, match=r"none of its 270 demonstrations is left \(prompt too long: 270\); write for "):
        prepare(settings(folder, max_prompt_tokens=1), tmp_path / "b")
    jsonl.write(folder / "demonstrations.jsonl", [{"prompt": "the cat sees the dog", "response": "red"}])
    with pytest.raises(BadInput):
        prepare(settings(folder, vocabulary=24), tmp_path / "c")
    assert not any((tmp_path / name).exists() for name in "abc"), "nothing is written where a part stays empty"


def test_a_missing_package_is_named_with_its_command(monkeypatch):
    monkeypatch.setattr(chitchat, "find_spec", lambda name: None)
    with pytest.raises(BadInput, match="pip install --no-deps chitchat-dataset==0.9.0"):
        sources.load("chitchat", 1)


def test_a_long_conversation_loses_its_oldest_turns(tokens):
    prompt = "the cat sees the dog\nwhy\nred house\n"
    size = len(tokens.encode(prompt))

    def shortened(most):
        (found,) = candidates([{"prompt": prompt, "response": "a"}], "response", tokens)
        short = recent(found, tokens.newline, most)
        assert short.prompt == tokens.encode(short.row["prompt"])
        return short.row["prompt"]

    assert shortened(size) == prompt
    assert shortened(size - 1) == "why\nred house\n"
    assert shortened(len(tokens.encode("why\nred house\n")) - 1) == "red house\n"
    assert shortened(1) == "red house\n"


def test_conversations_become_replies_and_text():
    talk = chitchat.Conversation("x", ("a", "b", "c", "d", "e"), ("u", "v", "u", "v", "u"), 5.0)
    poor = chitchat.Conversation("y", ("a", "b"), ("u", "w"), 4.0)
    corpora = [sources.conversations([talk, poor], seed) for seed in range(20)]
    assert {bool(corpus.demonstrations) for corpus in corpora} == {True, False}
    for corpus in corpora:
        rows = corpus.demonstrations + corpus.prompts
        replies = [(row["prompt"], row.get("response", row.get("reference")), row["user"]) for row in rows]
        assert replies == [("a\n", "b", "v"), ("a\nb\n", "c", "u"), ("a\nb\nc\n", "d", "v"), ("b\nc\nd\n", "e", "u")]
        assert [row["text"] for row in corpus.text] == ["a\nb\nc\nd", "e", "a\nb"]
        assert corpus.counters == {"conversations": 2, "turns": 7, "poorly_rated_conversations": 1}


@pytest.mark.slow
@pytest.mark.skipif(not HAS_CHITCHAT, reason="chitchat-dataset is not installed")
def test_the_quickstarts_corpus_is_large_enough(tmp_path):
    config = settings(tmp_path, vocabulary=2048, source="chitchat", max_prompt_tokens=48, max_response_tokens=40)
    config.data = Data(
        source="chitchat", max_prompt_tokens=48, max_response_tokens=40, min_response_tokens=6, shared_prefix_tokens=24
    )
    report = prepare(config, tmp_path / "data")
    files = read(tmp_path / "data")
    check(files, tmp_path / "data", config.data, 2048)
    least = {"demonstrations.train": 8000, "demonstrations.valid": 500, "prompts.train": 3000, "prompts.rank": 2000}
    least |= {"prompts.rank_valid": 300, "prompts.test": 400}
    assert all(len(files[name]) >= number for name, number in least.items())
    assert report["pretraining_tokens"]["pretraining.train"] >= 2_000_000
    assert all(row["prompt"].endswith("\n") and row["reference"] for row in files["prompts.test"])
    talks = [{row["conversation"] for row in files[name]} for name in FILES]
    assert sum(map(len, talks)) == len(set().union(*talks)) + len(talks[1] & set().union(*talks[4:]))
