"""Rankings: K responses of a prompt in a labeler's order, for the reward model.

P prompts, K responses of one (the most in the file), T positions.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megatron_rlhf.batch import Rankings
from megatron_rlhf.config.rules import BadInput
from megatron_rlhf.data import comparison, jsonl
from megatron_rlhf.data.cursor import Resumable
from megatron_rlhf.data.rows import pad_rows
from megatron_rlhf.data.tokenizer import Tokenizer

Tokens = tuple[list[int], list[list[int]]]


class RankingStream(Resumable):
    """Rankings in an endless resumable order, padded to the largest K of the file with empty rows of rank 0.

    `fields[i]` is the whole object of element i of `all()`; rankings over the limit are `dropped`.
    """

    def __init__(self, fields: list[dict[str, Any]], tokens: list[Tokens], dropped: int, seed: int) -> None:
        """The kept rankings, their tokens (prompt, responses) and how many were dropped."""
        super().__init__(len(tokens), seed)
        self.fields, self.dropped = fields, dropped
        self._tokens = tokens
        self._most = max(len(responses) for _, responses in tokens)

    @classmethod
    def load(cls, path: Path, tokenizer: Tokenizer, *, max_tokens: int, seed: int) -> RankingStream:
        """The rankings `{prompt, responses, ranks, ended?, ...}` of the JSONL file `path`.

        A response closes with the end token unless `ended` says it did not. A ranking with a row over `max_tokens` is
        dropped; BadInput if nothing is left, or a ranking has one response or ranks that do not fit.
        """
        fields, tokens, dropped = [], [], 0
        for row in jsonl.read(path, comparison.FIELDS, comparison.check):
            encoded = _encoded(row, tokenizer)
            if len(encoded[0]) + max(map(len, encoded[1])) > max_tokens:
                dropped += 1
                continue
            fields.append(row)
            tokens.append(encoded)
        if not tokens:
            raise BadInput(
                f"{path}: none of its {dropped} rankings has only rows of at most {max_tokens} tokens; "
                f"raise data.max_prompt_tokens or data.max_response_tokens"
            )
        return cls(fields, tokens, dropped, seed)

    def take(self, number: int) -> Rankings:
        """The next `number` rankings of the order. Modifies: the place in it."""
        return self._rankings(self._cursor.take(number).tolist())

    def all(self) -> Rankings:
        """Every ranking once, in the order of the file."""
        return self._rankings(list(range(len(self))))

    def _rankings(self, places: list[int]) -> Rankings:
        prompts: list[list[int]] = []
        responses: list[list[int]] = []
        ranks_PK = torch.zeros(len(places), self._most, dtype=torch.int64)
        for row, place in enumerate(places):
            prompt, answers = self._tokens[place]
            empty = self._most - len(answers)
            prompts += [prompt] * len(answers) + [[]] * empty
            responses += answers + [[]] * empty
            ranks_PK[row, : len(answers)] = torch.tensor(self.fields[place]["ranks"])
        rows = pad_rows(prompts, responses)
        shape = (len(places), self._most)
        return Rankings(
            tokens_PKT=rows.tokens_BT.reshape(*shape, -1),
            prompt_lengths_PK=rows.prompt_lengths_B.reshape(shape),
            lengths_PK=rows.lengths_B.reshape(shape),
            ranks_PK=ranks_PK,
        )


def _encoded(row: dict[str, Any], tokenizer: Tokenizer) -> Tokens:
    ended = row.get("ended", [True] * len(row["responses"]))
    closed = [[tokenizer.end] if end else [] for end in ended]
    answers = [[*tokenizer.encode(text), *end] for text, end in zip(row["responses"], closed, strict=True)]
    return tokenizer.encode_prompt(row["prompt"]), answers
