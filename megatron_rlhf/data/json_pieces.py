"""A Hugging Face `tokenizer.json`, or the byte-level BPE in GPT-2's two files, read by the library `tokenizers`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from megatron_rlhf.config.rules import BadInput


class JsonPieces:
    """A tokenizer of that library: its `vocabulary` size, the ids `control` that stand for no text, the ids `opening`
    that its files put before a text; it knows no end token (-1) and no newline of its own (-1)."""

    end = newline = -1

    def __init__(self, tokens: tokenizers.Tokenizer) -> None:
        """Wraps `tokens`: nothing is cut to a length or padded, and control tokens are never read out of a text."""
        tokens.no_truncation()
        tokens.no_padding()
        tokens.encode_special_tokens = True
        self._tokens = tokens
        # some files leave holes between their ids, so the count is not the size
        self.vocabulary: int = max(tokens.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        added = tokens.get_added_tokens_decoder()
        self.control = frozenset(id for id, token in added.items() if token.special) - {self._unknown()}
        self.opening = _opening(tokens)

    @classmethod
    def of_file(cls, path: Path) -> JsonPieces:
        """The tokenizer of a `tokenizer.json`; BadInput if it is none."""
        try:
            return cls(tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8")))
        except Exception as error:  # the library raises nothing narrower
            raise BadInput(
                f"{path} is no tokenizer.json of the library tokenizers ({_brief(error)}); save it with save_pretrained"
            ) from error

    @classmethod
    def of_merges(cls, vocabulary: Path, merges: Path) -> JsonPieces:
        """GPT-2's byte-level BPE of a file of ids and a file of merges; BadInput if they are none."""
        try:
            model = models.BPE.from_file(str(vocabulary), str(merges))
        except Exception as error:  # the library raises nothing narrower
            raise BadInput(
                f"{vocabulary} and {merges.name} are no byte-level BPE ({_brief(error)}); GPT-2's files are one"
            ) from error
        tokens = tokenizers.Tokenizer(model)
        missing = [
            letter for letter in sorted(pre_tokenizers.ByteLevel.alphabet()) if tokens.token_to_id(letter) is None
        ]
        if missing:
            raise BadInput(
                f"{vocabulary} spells bytes without {missing[0]!r}; a byte-level BPE has all 256, as GPT-2's"
            )
        tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokens.decoder = decoders.ByteLevel()
        return cls(tokens)

    def id(self, text: str) -> int | None:
        """The id of the token `text`, None where there is none."""
        return self._tokens.token_to_id(text)

    def text(self, id: int) -> str:
        """The token of an id, "" in a hole between ids."""
        return self._tokens.id_to_token(id) or ""

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, without what the files put around it; BadInput where one cannot be spelled."""
        try:
            return [found.ids for found in self._tokens.encode_batch_fast(list(texts), add_special_tokens=False)]
        except Exception as error:  # the library raises nothing narrower
            raise BadInput(
                f"the tokenizer cannot encode a text ({_brief(error)}); take one whose vocabulary spells every byte"
            ) from error

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, none of them a control token."""
        return self._tokens.decode(list(ids), skip_special_tokens=False)

    def _unknown(self) -> int | None:
        model = json.loads(self._tokens.to_str())["model"]
        if model.get("unk_id") is not None:
            return int(model["unk_id"])
        return self._tokens.token_to_id(model["unk_token"]) if model.get("unk_token") else None


def _opening(tokens: tokenizers.Tokenizer) -> list[int]:
    """The control tokens that the file puts before a text; those behind it are not asked for."""
    whole = tokens.encode("a")
    marked = takewhile(lambda pair: pair[1], zip(whole.ids, whole.special_tokens_mask, strict=True))
    return [id for id, _ in marked]


def _brief(error: Exception) -> str:
    return str(error).splitlines()[0][:120] if str(error) else type(error).__name__
