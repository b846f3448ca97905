"""Proves that damaged lines of demonstrations, rankings and prompts, and damaged files of a tokenizer, are read or
refused in one sentence: no crash, no hang.

Not proved here: text that is well-formed and nonsense; the indexed files that `prepare` writes.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from megatron_rlhf.data import comparison, jsonl, sources
from megatron_rlhf.data.demonstrations import DemonstrationStream
from megatron_rlhf.data.prompts import PromptStream
from megatron_rlhf.data.rankings import RankingStream
from megatron_rlhf.data.tokenizer import Tokenizer
from tests.helpers import checkpoints as tiny
from tests.helpers import guard
from tests.helpers.damage import changed, damaged, json_bytes

ROWS: dict[str, list[dict[str, object]]] = {
    "demonstrations": [{"prompt": "the quick", "response": "brown", "user": "a"}, {"prompt": "p", "response": ""}],
    "rankings": [{"prompt": "the dog", "responses": ["a", "b", "c"], "ranks": [1, 2, 2], "ended": [True, False, True]}],
    "prompts": [{"prompt": "jumps over", "users": ["a"], "reference": "the"}, {"prompt": "lazy"}],
}


@pytest.mark.parametrize("numbers", [range(200), pytest.param(range(200, 2500), marks=pytest.mark.slow)], ids=len)
def test_damaged_lines(numbers: range, tokens: Tokenizer, tmp_path: Path) -> None:
    """Through the check before a run, the streams that training takes from, and what `prepare` reads."""

    def case(folder: Path, chance: random.Random) -> guard.Load:
        kind = chance.choice(list(ROWS))
        lines = [json_bytes(changed(r, chance), chance) if chance.random() < 0.8 else json.dumps(r).encode()
                 for r in ROWS[kind]]  # fmt: skip
        path = folder / f"{kind}.jsonl"
        path.write_bytes(b"\n".join(lines) + chance.choice((b"\n", b"", b"\r\n", b"\0", b"\n\n ")))

        def stream() -> object:
            if kind == "rankings":
                jsonl.read(path, comparison.FIELDS, comparison.check)
                return RankingStream.load(path, tokens, max_tokens=20, seed=1).take(3)
            if kind == "prompts":
                return PromptStream.load(path, tokens, max_tokens=20, seed=1).take(3)
            return DemonstrationStream.load(path, tokens, max_prompt=20, max_response=20, seed=1).take(3)

        return stream if chance.random() < 0.8 else lambda: sources.folder(folder)

    found = guard.each("lines", case, numbers, tmp_path)
    assert found["read"] and found["refused"], found


@pytest.mark.parametrize("numbers", [range(50), pytest.param(range(50, 400), marks=pytest.mark.slow)], ids=len)
def test_damaged_tokenizers(numbers: range, tmp_path: Path) -> None:
    """tokenizer.json, the settings beside it, and tokenizer.model."""
    words = {"</s>": 0, "a": 1, "b": 2, "ab": 3, "<unk>": 4}
    tree = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": 0, "content": "</s>", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
             "special": True},
        ],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "vocab": words, "merges": [["a", "b"]], "unk_token": "<unk>", "dropout": None},
    }  # fmt: skip
    settings = {"eos_token": "</s>", "bos_token": {"content": "</s>"}, "add_bos_token": True}
    pieces = tiny.pieces(64)

    def case(folder: Path, chance: random.Random) -> guard.Load:
        files = {"tokenizer.json": json.dumps(tree).encode(), "tokenizer_config.json": json.dumps(settings).encode()}
        match chance.randrange(3):
            case 0:
                files["tokenizer.json"] = json_bytes(changed(tree, chance), chance)
            case 1:
                files["tokenizer_config.json"] = json_bytes(changed(settings, chance), chance)
            case _:
                files = {"tokenizer.model": damaged(pieces, chance)}
        for name, data in files.items():
            (folder / name).write_bytes(data)

        def read() -> None:
            found = Tokenizer.load(folder)
            found.decode(found.encode_prompt("ab the quick </s>"))

        return read

    found = guard.each("tokenizers", case, numbers, tmp_path)
    assert found["read"] and found["refused"], found
