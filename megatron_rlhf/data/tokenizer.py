"""Text to token ids and back, with whichever tokenizer a folder holds.

No id stands for padding: rows are filled with 0 behind their lengths, and lengths alone say where a row ends. Id 0 may
be any token, the end token too, and is an ordinary one inside a row.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

from megatron_rlhf.config.rules import BadInput
from megatron_rlhf.data.json_pieces import JsonPieces
from megatron_rlhf.data.sentence_pieces import SentencePieces
from megatron_rlhf.observe.log import write_bytes, write_json

KINDS = (("tokenizer.json",), ("tokenizer.model",), ("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))
"""Files that make a tokenizer, the first found counts: a tokenizer.json holds added tokens that its source lacks."""
TRAINED = "tokenizer.model"
SETTINGS = "tokenizer_config.json"
"""Beside any of them, Hugging Face's file that names the end token and whether rows open with a begin token."""
ENDS = ("<|endoftext|>", "</s>", "<|im_end|>", "<|end_of_text|>", "<|eot_id|>")


class Pieces(Protocol):
    """A tokenizer as its library reads it; `end` and `newline` are -1 where it names none."""

    vocabulary: int
    end: int
    newline: int
    opening: list[int]
    control: frozenset[int]

    def id(self, text: str) -> int | None:
        """The id of a token."""

    def text(self, id: int) -> str:
        """The token of an id."""

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids."""


class Tokenizer:
    """A tokenizer: its `vocabulary` size, the id `end` that closes a response, the ids `opening` before every prompt
    and document (none, unless the files ask for a begin token), and `newline` (-1 where it is no token of its own)."""

    def __init__(self, pieces: Pieces, where: Path, settings: dict[str, Any], end_token: str = "") -> None:
        """BadInput if no end token is found: the named one, that of `settings`, the pieces' own, or a known one."""
        self._pieces, self._where = pieces, where
        self.vocabulary, self.newline = pieces.vocabulary, pieces.newline
        self.end = self._end(end_token, _named(settings, "eos_token"))
        self.opening = self._opening(settings)
        self._control = pieces.control | {self.end, *self.opening}
        names = sorted((pieces.text(id) for id in self._control), key=len, reverse=True)
        self._names = re.compile("|".join(re.escape(name) for name in names if len(name) > 1) or r"(?!)")

    @classmethod
    def load(cls, path: Path, end_token: str = "") -> Tokenizer:
        """The tokenizer of the folder (or file) `path`; `end_token` says what closes a response, "" what the files say.

        BadInput if there is none, or no end token in it.
        """
        if not path.exists():
            raise BadInput(f"{path} is missing; megatron-rlhf prepare writes it")
        folder = path if path.is_dir() else path.parent
        files = found(path) if path.is_dir() else (path.name,)
        if not files:
            raise BadInput(f"{path} holds no tokenizer; megatron-rlhf prepare writes {TRAINED}")
        pieces: Pieces
        if len(files) == 2:
            pieces = JsonPieces.of_merges(folder / files[0], folder / files[1])
        elif files[0].endswith(".json"):
            pieces = JsonPieces.of_file(folder / files[0])
        else:
            pieces = SentencePieces(folder / files[0])
        return cls(pieces, folder / files[0], _settings(folder), end_token)

    def check_vocabulary(self, rows: int) -> None:
        """BadInput unless a model of `rows` tokens has one for each of this tokenizer's and no other."""
        if self.vocabulary != rows:
            raise BadInput(
                f"{self._where} has {self.vocabulary} tokens and model.vocabulary={rows}; write model.vocabulary="
                f"{self.vocabulary} reward_model.vocabulary={self.vocabulary}, or take the tokenizer of the model"
            )

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, without end token."""
        return self.encode_all([text])[0]

    def encode_prompt(self, text: str) -> list[int]:
        """The ids that a row starts with: the opening, then `text`."""
        return [*self.opening, *self.encode(text)]

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text; where a text spells a control token, it is encoded as any other text."""
        encoded = self._pieces.encode_all(texts)
        return [
            ids if self._control.isdisjoint(ids) else self._spelled(text)
            for ids, text in zip(encoded, texts, strict=True)
        ]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`; control tokens, the end token among them, leave no trace."""
        return self._pieces.decode([int(token) for token in ids if int(token) not in self._control])

    def _spelled(self, text: str) -> list[int]:
        """The ids of a text whose control tokens are cut in two, so that they are read letter by letter."""
        cuts = [0, *(match.start() + 1 for match in self._names.finditer(text)), len(text)]
        parts = self._pieces.encode_all([text[start:end] for start, end in pairwise(cuts)])
        ids = [token for part in parts for token in part]
        if not self._control.isdisjoint(ids):
            raise BadInput(
                f"{self._where} reads a control token out of the text {text[:40]!r}; take it out of the text, or write "
                f"data.end_token=TOKEN with one that no text spells"
            )
        return ids

    def _end(self, asked: str, told: str) -> int:
        for name, source in ((asked, f"data.end_token={asked}"), (told, f"the eos_token of {SETTINGS}, {told},")):
            if name:
                id = self._pieces.id(name)
                if id is None:
                    raise BadInput(f"{source} is no token of {self._where}; write data.end_token={self._some_end()}")
                return id
        known = [id for name in ENDS if (id := self._pieces.id(name)) is not None]
        if self._pieces.end < 0 and not known:
            raise BadInput(f"{self._where} has no end token; write data.end_token=TOKEN with a token of its vocabulary")
        return self._pieces.end if self._pieces.end >= 0 else known[0]

    def _some_end(self) -> str:
        if self._pieces.end >= 0:
            return self._pieces.text(self._pieces.end)
        return next(
            (name for name in ENDS if self._pieces.id(name) is not None), "TOKEN with a token of its vocabulary"
        )

    def _opening(self, settings: dict[str, Any]) -> list[int]:
        wanted = settings.get("add_bos_token")
        if wanted is None:
            return self._pieces.opening
        id = self._pieces.id(_named(settings, "bos_token"))
        return [id] if wanted and id is not None else []


def found(folder: Path) -> tuple[str, ...]:
    """The files of the folder's tokenizer, () where there is none; BadInput where half of one is there."""
    for names in KINDS:
        if all((folder / name).is_file() for name in names):
            return names
    for names in KINDS:
        for name, other in zip(names, reversed(names), strict=True):
            if (folder / name).is_file():
                raise BadInput(f"{folder} has {name} without {other}; a tokenizer is made of both")
    return ()


def copy(source: Path, target: Path, end_token: str = "") -> None:
    """`target` holds the tokenizer of the folder `source`, no other, and remembers the end token where one is named."""
    if source.resolve() != target.resolve():
        names = [*found(source), *([SETTINGS] if (source / SETTINGS).is_file() else [])]
        for name in names:
            write_bytes(target / name, (source / name).read_bytes())
        for other in {SETTINGS, *(name for kind in KINDS for name in kind)} - set(names):
            (target / other).unlink(missing_ok=True)
    if end_token:
        write_json(target / SETTINGS, _settings(target) | {"eos_token": end_token})


def _settings(folder: Path) -> dict[str, Any]:
    path = folder / SETTINGS
    if not path.is_file():
        return {}
    try:
        read = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path} is no JSON; save the tokenizer again, or take the file away") from error
    if not isinstance(read, dict):
        raise BadInput(f'{path} is no JSON object; write for example {{"eos_token": "</s>"}}')
    return read


def _named(settings: dict[str, Any], key: str) -> str:
    """A token's text, which stands there as it is or as the content of an object."""
    token = settings.get(key) or ""
    return str(token.get("content", "") if isinstance(token, dict) else token)
