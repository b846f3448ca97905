"""Proves that a tokenizer which `prepare` trained goes to Hugging Face with its weights: transformers encodes and
decodes every line as we do, and what comes back here does too.

Not proved here: tokenizers of others, whose files are copied as they are; what stands for an unknown letter in text.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from megatron_rlhf.convert import tokenizer_files
from megatron_rlhf.data import sentence_pieces
from megatron_rlhf.data.tokenizer import Tokenizer


def corpus(letters: str, count: int) -> list[str]:
    chance = random.Random(1)
    words = ["".join(chance.choices(letters, k=chance.randint(1, 6))) for _ in range(count)]
    lines = (" ".join(chance.choices(words, k=chance.randint(1, 12))) for _ in range(3 * count))
    return [f"{line}.\n{next(lines, 'end')}\n" for line in lines]


@pytest.mark.parametrize("spelled", [False, True], ids=["characters", "bytes"])
def test_transformers_reads_it_alike(spelled: bool, tmp_path: Path) -> None:
    """Spaces at either end and doubled, empty lines, letters that it has not seen, with and without bytes."""
    transformers = pytest.importorskip("transformers")
    rare = "".join(chr(code) for code in range(0x4E00, 0x4E00 + 400)) if spelled else ""
    texts = corpus("abcdefghéß", 400) + [rare] * spelled
    (tmp_path / "tokenizer.model").write_bytes(sentence_pieces.train(texts, 600 if spelled else 200))
    ours = Tokenizer.load(tmp_path)
    ids = tokenizer_files.for_hugging_face(tmp_path)
    assert ids == {"bos_token_id": None, "eos_token_id": ours.end}
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    back = Tokenizer.load(tmp_path)
    assert len(theirs) == ours.vocabulary == back.vocabulary
    assert theirs.eos_token_id == ours.end == back.end
    odd = ["", " ", "a", " a", "a ", "  a  b  ", "\n", "\n\na\n\n b", "a\n", "\na", "zzz Q\tx", "abc一丁 é\n☃"]
    for text in [*texts[:300], *odd]:
        expected = ours.encode(text)
        assert theirs.encode(text, add_special_tokens=False) == expected, text
        assert back.encode(text) == expected, text
        if sentence_pieces.UNKNOWN not in expected:
            decoded = theirs.decode(expected, skip_special_tokens=True)
            assert decoded == ours.decode(expected) == back.decode(expected), text
