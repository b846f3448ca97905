"""A small tokenizer and a small corpus of made-up people, shared by the tests of the data room."""

import random
from pathlib import Path

import pytest

from megatron_rlhf.data import sentence_pieces, tokenizer

TEXT = "the cat dog sees likes a red blue house tree and why what who runs sleeps here there today never"
WORDS = TEXT.split()


def sentences(count: int, seed: int = 0) -> list[str]:
    """Made-up sentences of 4 to 12 words."""
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(4, 12))) + draw.choice(".?!") for _ in range(count)]


@pytest.fixture(scope="session")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> tokenizer.Tokenizer:
    path: Path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(sentence_pieces.train(sentences(500), 96))
    return tokenizer.Tokenizer.load(path.parent)


@pytest.fixture(scope="session")
def made_up():
    return sentences
